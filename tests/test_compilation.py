"""What XLA compiled is kept: where, for whom, how much of it, and what happens to it when it is damaged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import time_limit

from chargpt import compilation

TWICE = """
import jax, jax.numpy as jnp
from pathlib import Path
from chargpt import compilation

def product():
    jax.clear_caches()
    with compilation.kept_executables(print):
        return float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))

def entries():
    return sorted(path.read_bytes() for path in Path(jax.config.jax_compilation_cache_dir).glob("jit__lambda*-cache"))

first = product(), compilation.reads
kept = entries()
second = product(), compilation.reads
for path in Path(jax.config.jax_compilation_cache_dir).glob("jit__lambda*-cache"):
    path.write_bytes(path.read_bytes()[:100])  # as a process that is killed may leave it
third = product(), compilation.reads
fourth = product(), compilation.reads
assert first[0] == second[0] == third[0] == fourth[0] == 64**3
assert len(kept) == 1 and first[1] < second[1], (first, second)
assert fourth[1] - third[1] == second[1] - first[1] > third[1] - second[1], (second, third, fourth)
"""


def test_what_was_compiled_is_read_the_next_time_and_what_is_damaged_is_compiled_anew(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (folder,) = (tmp_path / "chargpt").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (said,) = done.stdout.splitlines()
    assert said == f"what was kept of jit__lambda in {folder} is damaged: it is compiled anew"


@pytest.fixture
def settings() -> Any:
    """JAX's settings, put back after the test."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda **changes: [jax.config.update(f"jax_{name}", value) for name, value in changes.items()]
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_a_folder_that_others_may_write_to_is_said_and_not_used(tmp_path: Path, settings: Any, mode: int) -> None:
    tmp_path.chmod(mode)
    settings(compilation_cache_dir=str(tmp_path))
    said: list[str] = []
    with compilation.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
        assert int(jax.jit(lambda x: x + mode)(jnp.int32(1))) == mode + 1
    (line,) = said
    assert str(tmp_path) in line and "others may write to it" in line and "JAX_COMPILATION_CACHE_DIR=DIR" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_user_is_said_and_not_used(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 4711)
    settings(compilation_cache_dir=str(tmp_path))
    said: list[str] = []
    with compilation.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert "belongs to another user" in said[0]


def test_a_folder_that_cannot_be_made_is_said_and_training_goes_on(tmp_path: Path, settings: Any) -> None:
    (tmp_path / "file").touch()
    settings(compilation_cache_dir=str(tmp_path / "file" / "folder"))
    said: list[str] = []
    with compilation.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert "Not a directory" in said[0]


def test_switched_off_it_writes_nowhere(tmp_path: Path, settings: Any) -> None:
    settings(enable_compilation_cache=False, compilation_cache_dir=str(tmp_path / "none"))
    said: list[str] = []
    with compilation.kept_executables(said.append):
        assert not jax.config.jax_enable_compilation_cache
    assert said == [] and not (tmp_path / "none").exists()


def test_every_kind_of_processor_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = compilation.default_folder()
    assert here == compilation.default_folder() and here.parent == tmp_path / "chargpt"
    monkeypatch.setattr(compilation, "processor", lambda: "another one")
    assert compilation.default_folder() != here
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation.default_folder().parent == Path.home() / ".cache" / "chargpt"


def test_what_was_written_first_goes_first_once_there_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LARGEST", 250)
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "a stranger").write_bytes(bytes(1000))
    with time_limit(5):
        compilation.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "middle-cache", "a stranger"}
