"""The cache of executables: where it is, who may write to it, its size, and damage to a file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import time_limit

from chargpt.run import cache

TWICE = """
import jax, jax.numpy as jnp
from pathlib import Path
from chargpt.run import cache

def product():
    jax.clear_caches()
    with cache.kept_executables(print):
        return float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))

def paths():
    return Path(jax.config.jax_compilation_cache_dir).glob("jit__lambda*-cache")

def entries():
    return sorted(path.read_bytes() for path in paths())

first = product(), cache.reads
kept = entries()
second = product(), cache.reads
for path in paths():
    path.write_bytes(path.read_bytes()[:100])  # as a killed process may leave it
third = product(), cache.reads
fourth = product(), cache.reads
assert first[0] == second[0] == third[0] == fourth[0] == 64**3
assert len(kept) == 1 and first[1] < second[1], (first, second)
assert fourth[1] - third[1] == second[1] - first[1] > third[1] - second[1], (second, third, fourth)
"""


def test_executables_are_read_the_next_time_and_damaged_ones_are_compiled_again(
    tmp_path: Path,
) -> None:
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | always
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (folder,) = (tmp_path / "chargpt").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (said,) = done.stdout.splitlines()
    assert said == f"the executable of jit__lambda in {folder} is damaged: compiling it again"


@pytest.fixture
def settings() -> Any:
    """Changes JAX's settings, which are restored after the test."""
    names = ["enable_compilation_cache", "compilation_cache_dir"]
    names += ["persistent_cache_min_compile_time_secs"]
    names += ["remove_custom_partitioning_ptr_from_cache_key"]
    before = {name: getattr(jax.config, f"jax_{name}") for name in names}

    def change(**values: Any) -> None:
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)

    yield change
    change(**before)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_a_folder_that_others_may_write_to_is_reported_and_not_used(
    tmp_path: Path, settings: Any, mode: int
) -> None:
    tmp_path.chmod(mode)
    settings(compilation_cache_dir=str(tmp_path))
    said: list[str] = []
    with cache.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
        assert int(jax.jit(lambda x: x + mode)(jnp.int32(1))) == mode + 1
    (line,) = said
    assert str(tmp_path) in line and "others may write to it" in line
    assert "JAX_COMPILATION_CACHE_DIR=DIR" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_user_is_reported_and_not_used(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 4711)
    settings(compilation_cache_dir=str(tmp_path))
    said: list[str] = []
    with cache.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert "belongs to another user" in said[0]


def test_a_folder_that_cannot_be_created_is_reported_and_training_continues(
    tmp_path: Path, settings: Any
) -> None:
    (tmp_path / "file").touch()
    settings(compilation_cache_dir=str(tmp_path / "file" / "folder"))
    said: list[str] = []
    with cache.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert "Not a directory" in said[0]


def test_a_cache_that_is_turned_off_writes_nothing(tmp_path: Path, settings: Any) -> None:
    settings(enable_compilation_cache=False, compilation_cache_dir=str(tmp_path / "none"))
    said: list[str] = []
    with cache.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert said == [] and not (tmp_path / "none").exists()


def test_addresses_are_left_out_of_the_keys(tmp_path: Path, settings: Any) -> None:
    """tests/test_gpu.py shows that keys differ otherwise."""
    settings(
        compilation_cache_dir=str(tmp_path), remove_custom_partitioning_ptr_from_cache_key=False
    )
    tmp_path.chmod(0o700)
    with cache.kept_executables(print):
        assert jax.config.jax_remove_custom_partitioning_ptr_from_cache_key


def test_every_kind_of_processor_has_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = cache.default_folder()
    assert here == cache.default_folder() and here.parent == tmp_path / "chargpt"
    monkeypatch.setattr(cache, "processor", lambda: "another one")
    assert cache.default_folder() != here
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder().parent == Path.home() / ".cache" / "chargpt"


def test_the_oldest_files_are_removed_until_the_others_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LARGEST", 250)
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "a stranger").write_bytes(bytes(1000))
    with time_limit(5):
        cache.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "middle-cache", "a stranger"}
