"""The wheel: configurations and corpus travel in it, and it trains far from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without the network, from a copy: building leaves files in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("src", "configs", "data", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_file_that_the_program_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        "data": ["*.txt"],
        "configs": ["*.yaml", "*/*.yaml"],
        "src/chargpt": ["**/*.py", "**/*.html", "**/*.css", "**/*.js"],
    }
    for folder, patterns in shipped.items():
        inside = "chargpt" if folder == "src/chargpt" else f"chargpt/{folder}"
        for path in (path for pattern in patterns for path in (ROOT / folder).glob(pattern)):
            assert f"{inside}/{path.relative_to(ROOT / folder)}" in names


def test_it_trains_and_samples_in_the_current_folder(wheel: Path, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    with zipfile.ZipFile(wheel) as file:  # what installing a pure wheel does
        file.extractall(installed)

    def chargpt(*arguments: str) -> str:
        process = subprocess.run(
            [sys.executable, "-m", "chargpt", *arguments],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "100"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
        return process.stdout

    out = chargpt("train", "experiment=debug", "mode=disabled")
    assert "chargpt train resume=outputs/" in out  # there is no main.py to name
    (run,) = (here / "outputs").glob("*/*")
    assert (run / "summary.json").is_file()
    assert chargpt("sample", "num_chars=10", "prompt=A").startswith("A")
