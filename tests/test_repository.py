"""Rules that the repository keeps: imports, names, locks."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, layer_of

import chargpt
from chargpt.config import AttentionType

PACKAGE = ROOT / "src" / "chargpt"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text()


def module_of(path: Path) -> str:
    """The module of a source file, within the package: run.cache, attention.__init__."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules_named(name: str) -> set[str]:
    """The part of an import that names our module: "run.cache" of chargpt.run.cache.reads."""
    parts = name.split(".")
    if parts[0] != "chargpt":
        return set()
    for end in range(len(parts), 1, -1):
        place = PACKAGE.joinpath(*parts[1:end])
        if place.is_dir() or place.with_suffix(".py").is_file():
            return {".".join(parts[1:end])}
    return {"__init__"}  # the Python interface


def names_in(path: Path) -> set[str]:
    """Dotted names that a file imports or reaches through attributes, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                assert node.level == 0, f"{path}: imports are absolute here"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            case ast.Attribute():
                found.add(ast.unparse(node))
    return found


# All others: 0
FLOORS = {"run": 1, "study": 2, "play": 3, "cli": 4, "__main__": 5, "__init__": 5}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way_from_the_root_up_to_the_command_line(path: Path) -> None:
    """The science does not import runs, runs do not import studies, nothing imports the CLI."""
    own = FLOORS.get(module_of(path).partition(".")[0], 0)
    for name in names_in(path):
        for module in modules_named(name):
            floor = FLOORS.get(module.partition(".")[0], 0)
            assert floor <= own, f"{module_of(path)} imports chargpt.{module}"


COMPOSITION = re.compile(
    r"hydra\.(compose|initialize|_internal\.core_plugins\.basic_sweeper|core\.override_parser)"
)


def test_only_one_file_calls_hydras_composition() -> None:
    calling = {module_of(path) for path in SOURCES if any(map(COMPOSITION.match, names_in(path)))}
    assert calling == {"compose"}


def test_no_file_outside_attention_names_an_attention_type() -> None:
    """Except for the enum itself, and llama.py, which knows what Llama's attention is here."""
    classes = {type(layer_of(kind)).__name__ for kind in AttentionType}
    members = {f"AttentionType.{kind.name}" for kind in AttentionType}
    for path in SOURCES:
        if module_of(path).startswith("attention.") or module_of(path) in ("config", "llama"):
            continue
        for name in names_in(path):
            assert name.rpartition(".")[2] not in classes, f"{module_of(path)}: {name}"
            assert not name.endswith(tuple(members)), f"{module_of(path)}: {name}"


def test_every_module_that_handles_arrays_is_shape_checked() -> None:
    annotation = re.compile(r"^from jaxtyping import (?!install_import_hook)", re.MULTILINE)
    annotated = {module_of(path) for path in SOURCES if annotation.search(path.read_text())}
    packages = {name for name in chargpt.CHECKED if (PACKAGE / name).is_dir()}
    inside = {name for name in annotated if name.partition(".")[0] in packages}
    assert {name.partition(".")[0] for name in inside} == packages
    assert annotated - inside == set(chargpt.CHECKED) - packages


def test_nothing_that_was_loaded_is_ever_executed() -> None:
    calls = r"pickle\.|torch\.load|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|instantiate\("
    forbidden = rf"{calls}|allow_pickle=True|shell=True"
    assert [path.name for path in SOURCES if re.search(forbidden, path.read_text())] == []


def test_wandb_is_imported_in_one_file() -> None:
    importing = re.compile(r"^\s*(import|from) wandb\b", re.MULTILINE)
    files = [path.name for path in SOURCES if importing.search(path.read_text())]
    assert files == ["tracking.py"]


def test_the_readme_names_every_module() -> None:
    """Except for a reader's own attention type, which is found by its enum."""
    named = set(re.findall(r"\w+\.py\b", README))
    types = {type(layer_of(kind)).__module__ for kind in AttentionType}
    own = {f"{module.rpartition('.')[2]}.py" for module in types}
    assert {path.name for path in SOURCES} - {"__init__.py"} - own <= named
    assert {"grouped.py", "selective.py", "latent.py", "reference.py"} <= named


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-cuda.lock"])
def test_lock_files_hold_hashes_and_no_addresses(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|^-|@ ", text, re.MULTILINE)
    requirement = re.compile(r"^[\w.-]+(?:\[[\w,-]+\])?==.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
    found = requirement.findall(text)
    assert len(found) > 50 and all("--hash=sha256:" in lines for lines in found)


@pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="nix is not installed")
def test_flake_parses() -> None:
    command = ["nix-instantiate", "--parse", str(ROOT / "flake.nix")]
    subprocess.run(command, check=True, capture_output=True)


def test_importing_every_module_touches_no_device() -> None:
    """JAX takes the number of CPU devices only before it has looked for devices."""
    names = [f"chargpt.{module_of(path)}" for path in SOURCES if path.stem[0] != "_"]
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\n"
    code += (
        "import jax\njax.config.update('jax_num_cpu_devices', 3)\nassert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
