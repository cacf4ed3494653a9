"""What holds of the repository as a whole."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

import chargpt

SOURCES = sorted((ROOT / "src").rglob("*.py"))
README = (ROOT / "README.md").read_text()


def test_every_module_that_handles_arrays_is_shape_checked() -> None:
    annotated = {
        path.relative_to(ROOT / "src" / "chargpt").parts[0].removesuffix(".py")
        for path in SOURCES
        if re.search(
            r"^from jaxtyping import (?!install_import_hook)", path.read_text(), re.MULTILINE
        )
    }
    assert annotated == set(chargpt.CHECKED)


def test_nothing_that_was_loaded_is_ever_executed() -> None:
    forbidden = r"pickle\.|torch\.load|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|allow_pickle=True|shell=True|instantiate\("
    assert [path.name for path in SOURCES if re.search(forbidden, path.read_text())] == []


def test_wandb_is_imported_in_one_file() -> None:
    importing = [
        path.name
        for path in SOURCES
        if re.search(r"^\s*(import|from) wandb\b", path.read_text(), re.MULTILINE)
    ]
    assert importing == ["tracking.py"]


def test_the_readme_names_every_source_file() -> None:
    for path in SOURCES:
        name = str(path.relative_to(ROOT / "src" / "chargpt"))
        assert name in README or name == "__init__.py", name


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cuda.lock"])
def test_lock_files_hold_hashes_and_no_addresses(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|^-|@ ", text, re.MULTILINE)
    requirements = re.findall(
        r"^[\w.-]+(?:\[[\w,-]+\])?==.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert len(requirements) > 50 and all(
        "--hash=sha256:" in requirement for requirement in requirements
    )


@pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="nix is not installed")
def test_flake_parses() -> None:
    subprocess.run(
        ["nix-instantiate", "--parse", str(ROOT / "flake.nix")], check=True, capture_output=True
    )
