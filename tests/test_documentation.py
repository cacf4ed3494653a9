"""The documentation is true: its commands run, at a small size; its links and options exist.

The commands of a page run in order, in a folder like a reader's. A command that is not recognised
fails.
"""

import importlib.util
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest
import uvicorn
import yaml
from conftest import ROOT, SMALL, filled, make_config, small_config
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.numpy import save_file

import chargpt
from chargpt import checkpoint, cli, weights
from chargpt.compose import change, read_overrides
from chargpt.config import CONFIGS, options
from chargpt.model import GPT
from chargpt.study.space import read_space
from chargpt.train import Stream, random_key

# wandb-workspaces' own
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")

RECORDS = ("results.md", "comparison.md")  # what was measured once, with the command of that day
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDED = [page for page in PAGES if page.name not in RECORDS]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Indented blocks that are no commands, by how they begin.
OTHER_BLOCKS = {
    "from chargpt.attention.fused": "test_recipe.py follows it",
    "main.py   ": "the tree of files",
}
# Fences that hold no commands, by their language.
OTHER_FENCES = {"python", "yaml", "text"}
# Training takes seconds: runs that are resumed, and the sweeps of this page, train; others compose.
SWEPT = "README.md"
# Commands that are only checked, by how they begin. The others run.
NOT_RUN = {
    "make": "would change the environment, or run all tests; its target and its ARGS are checked",
    "pip": "needs the network; its extra is checked, and test_wheel.py makes the wheel",
    "python -m build": "test_wheel.py makes the wheel",
    "pre-commit": "would change this checkout; its package is checked",
    "pytest": "would run tests; the file and the word are checked",
    "wandb": "needs an account or a terminal; its subcommand is checked",
    "chargpt dashboard entity=": "needs an account; its options are checked",
    "python main.py experiment=compare": "18 runs; test_sweeping.py runs them",
    "chargpt convert run=outputs/mqa": "needs a run with heads of 32; test_origin.py converts one",
    "srun": "needs a cluster; what it starts is checked",
    "python main.py --multirun launcher=": "other processes; test_sweeping.py starts them",
}
FAST = ["trainer.log_every=4", "trainer.eval_tokens=64", "trainer.sample_chars=0", "mode=disabled"]
QUICK = [*SMALL, "model.num_layers=1", "trainer.num_steps=4", *FAST]
FILES = (".py", ".md", ".safetensors", ".json")
GROUPS = ("experiment=", "launcher=")
SHORTER = {"sample": ["num_chars=20"], "search": ["num_trials=1"], "inspect": ["prompt=To be"]}
SHORTER["play"] = ["host=127.0.0.1", "port=0"]


def code_blocks(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """(language, lines) of fenced code blocks, (None, lines) of indented ones."""
    fence, block, blank = None, [], True
    for line in [*text.split("\n"), ""]:
        if fence is not None:
            if line.startswith("```"):
                yield fence, block
                fence, block = None, []
            else:
                block.append(line)
        elif line.startswith("```"):
            fence = line.removeprefix("```").strip()
        elif line.startswith("    ") and (block or blank):
            block.append(line[4:])
        elif line.strip() and block:
            yield None, block
            block = []
        blank = not line.strip()
    if block:
        yield None, block


def commands_of(text: str) -> list[str]:
    """The commands that a page prints, without comments."""
    found = []
    for language, lines in code_blocks(text):
        if language in OTHER_FENCES or lines[0].startswith(tuple(OTHER_BLOCKS)):
            continue
        joined = "\n".join(lines).replace("\\\n", " ")
        found += [line for line in joined.split("\n") if line.strip()]
    return [shlex.join(shlex.split(line, comments=True)) for line in found]


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


# ---- a reader's folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: two runs, two texts, small search spaces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as cli.train sets it
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)  # it would serve until a signal
    runs = sorted((ROOT / "tests" / "runs").iterdir())[-1]  # the newest version
    shutil.copytree(runs / "standard", "outputs/2026-01-01/12-00-00_standard")
    shutil.copytree(runs / "mla", "multirun/sweep/0_mla")
    for kept in (ROOT / "docs" / "evidence").glob("*.jsonl"):  # two runs of each are enough
        here = Path("docs/evidence") / kept.name
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_text("".join(kept.read_text().splitlines(keepends=True)[:2]))
    for name in ("my.txt", "other.txt"):
        Path(name).write_text("To be, or not to be, that is the question:\n" * 20)
    for path in (CONFIGS / "search").glob("*.yaml"):
        space = yaml.safe_load(path.read_text())
        space["overrides"] += [*QUICK, "optimizer.warmup_steps=0"]
        space["parameters"] = dict(
            list(space["parameters"].items())[:1]
        )  # others need larger models
        here = Path("configs/search") / path.name
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_text(yaml.safe_dump(space))
    disabled = {n: log for n, log in logging.root.manager.loggerDict.items() if is_on(log)}
    handlers, hydra_cfg = list(logging.root.handlers), HydraConfig.instance().cfg
    yield tmp_path
    logging.root.handlers, HydraConfig.instance().cfg = handlers, hydra_cfg
    for log in disabled.values():  # Hydra's job_logging=disabled switches all of them off
        log.disabled = False


def is_on(log: object) -> bool:
    return isinstance(log, logging.Logger) and not log.disabled


def make_llama(path: Path) -> None:
    """A Hugging Face Llama with random weights, as large as the bundled text's alphabet asks."""
    config = small_config("model.activation=swiglu")
    header, _, _ = checkpoint.read_header(Path("multirun/sweep/0_mla/checkpoints/best.eqx"))
    size = config.model, len(header.vocabulary), config.dataset.seq_len
    shapes = eqx.filter_eval_shape(lambda: GPT(*size, key=random_key(0, Stream.init)))
    path.mkdir()
    save_file(weights.to_tensors(filled(shapes, scale=0.02)), path / "model.safetensors")
    llama = {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "hidden_size": config.model.d_model,
        "num_hidden_layers": config.model.num_layers,
        "num_attention_heads": config.model.num_heads,
        "intermediate_size": config.model.ff_width,
        "max_position_embeddings": config.dataset.seq_len,
    }
    (path / "config.json").write_text(json.dumps(llama))


# ---- one command


def follow(command: str, page: str) -> None:
    """Run or check a command; AssertionError if it fails or is not recognised."""
    program, *arguments = shlex.split(filled_in(command))
    match [program, *arguments]:
        case ["make", target, *settings]:
            check_make(target, settings)
        case ["wandb", subcommand, *_]:
            from wandb.cli.cli import cli as wandb

            assert subcommand in wandb.commands, command
        case ["pytest", file, "-k", word]:
            assert word in (ROOT / file).read_text(encoding="utf-8"), command
        case ["pip", "install", *what]:
            check_pip(what)
        case ["python", "-m", module, *_] | [("pre-commit" as module), *_]:
            assert importlib.util.find_spec(module.replace("-", "_")), command
        case ["srun", *options] if "main.py" in options:
            train(command, options[options.index("main.py") + 1 :], page)
        case ["python", "main.py", *overrides] | ["chargpt", "train", *overrides]:
            train(command, overrides, page)
        case ["chargpt", tool, *rest] if tool in cli.TOOLS:
            if reason_not_to_run(command):
                cli.parse_options(cli.load_tool(tool)[0], rest)
            else:
                assert cli.run_tool([tool, *rest, *SHORTER.get(tool, [])]) == 0, command
        case _:
            pytest.fail(f"{page} prints a command that nothing checks: {command}")


def filled_in(command: str) -> str:
    """The command with a real run, and real names, for its placeholders."""
    for root, run in (("outputs", "2026-01-01/12-00-00_standard"), ("multirun", "sweep")):
        command = command.replace(f"{root}/…", f"{root}/{run}")
    return command.replace("offline-run-…", "offline-run-1")


def check_make(target: str, settings: list[str]) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}: no such target"
    for setting in settings:
        name, _, value = setting.partition("=")
        assert re.search(rf"^{name} \?=$", MAKEFILE, re.MULTILINE), setting
        make_config(*shlex.split(value))


def check_pip(what: list[str]) -> None:
    for argument in what:
        if argument.endswith(".whl"):
            assert Path(argument).name.startswith(f"{PROJECT['name']}-{PROJECT['version']}-")
        for extra in re.findall(r"\[(\w+)\]", argument):
            assert extra in PROJECT["optional-dependencies"], argument


def train(command: str, overrides: list[str], page: str) -> None:
    """Compose every job of a training command; run it if that is cheap enough."""
    sweep = "--multirun" in overrides
    plain = [override for override in overrides if override != "--multirun"]
    batches = [plain]
    if sweep:
        (batches,) = BasicSweeper.split_arguments(
            OverridesParser.create().parse_overrides(plain), None
        )
    resumes = any(override.startswith("resume=") for override in plain)
    if not resumes:
        first = make_config(*batches[0])
        for job in batches[1:]:  # faster than composing it
            change(first, read_overrides([o for o in job if not o.startswith(GROUPS)]))
    if reason_not_to_run(command) or not (resumes or (sweep and page == SWEPT)):
        return
    reduced = [*FAST, "trainer.num_steps=12"] if resumes else QUICK
    arguments = ["--multirun", *fewer_values(plain)] if sweep else plain
    assert cli.train([*arguments, *reduced]) == 0, command


def fewer_values(overrides: list[str]) -> list[str]:
    """The same sweep with two values of the last option that varies, and one of each other."""
    varying = [override for override in overrides if "," in override]
    kept = {o: ",".join(o.split(",")[: 2 if o == varying[-1] else 1]) for o in varying}
    return [kept.get(override, override) for override in overrides]


# ---- the tests


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, folder: Path) -> None:
    commands = commands_of(page.read_text(encoding="utf-8"))
    if any("llama/" in command for command in commands):
        make_llama(Path("llama"))
    for command in commands:
        follow(command, page.name)
        HydraConfig.instance().cfg = None  # each command starts a process


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: page.name)
def test_commands_within_its_sentences_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"`((?:make|pip|wandb) [^`\n]+)`", text):
        follow(command, page.name)
    tools = re.findall(r"`chargpt (\w+)", text)
    assert {*tools} <= {"train", *cli.TOOLS}


def test_commands_in_the_comments_of_the_configurations_are_right(folder: Path) -> None:
    found = 0
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for command in re.findall(r"^# ((?:python main\.py|chargpt) .+)", text, re.MULTILINE):
            found += 1
            _, second, *rest = shlex.split(command)
            if second == "main.py":
                train(command, rest, path.name)
            else:
                given = cli.parse_options(cli.load_tool(second)[0], rest)
                assert (ROOT / given.space).samefile(path)
    assert found > 8


def test_make_help_tells_what_there_is(folder: Path) -> None:
    # Within `make test` this make would announce its directory.
    quietly = ["make", "--no-print-directory", "help"]
    out = subprocess.run(quietly, cwd=ROOT, capture_output=True, text=True).stdout
    lines = out.splitlines()
    assert len(lines) >= 6 and all(line.startswith("make ") for line in lines)
    for line in lines:
        target = line.split()[1]
        follow(f"make {target}", "make help")
        for example in re.findall(r'\bARGS="[^"…]+"', line):
            follow(f"make {target} {example}", "make help")
    assert 'ARGS="model.mha_type=mla trainer.num_steps=50"' in out


def test_every_tool_is_in_the_documentation_and_runs_there() -> None:
    shown = {
        command.split()[1]
        for page in COMMANDED
        for command in commands_of(page.read_text(encoding="utf-8"))
        if command.startswith("chargpt ") and not reason_not_to_run(command)
    }
    assert shown == {"train", *cli.TOOLS}


@pytest.mark.parametrize("command", ["chargpt smaple", "python train.py", "uv run main.py"])
def test_a_command_that_nothing_checks_fails(command: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="that nothing checks"):
        follow(command, "a page")


def test_commands_are_found_in_every_block_but_those_of_other_languages() -> None:
    page = (
        "Text\n\n    make one  # said\n    make two \\\n      ARGS='a b'\n\n    make three\n\n"
        "- a list\n    that continues\n\n```\nmake four\n```\n\n```python\nmake = 5\n```\n"
    )
    assert commands_of(page) == ["make one", "make two 'ARGS=a b'", "make three", "make four"]


def test_the_python_of_its_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_before(*overrides: str, run_dir: str | None = None) -> object:
        make_config(*overrides)
        return chargpt.load()

    monkeypatch.setattr(chargpt, "train", trained_before)  # test_trained.py trains
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for language, lines in code_blocks(text):
        if language == "python":
            exec("\n".join(lines), names)
    assert names["losses"] and names["weights"].shape[-1] == len("To be, or not")
    for attribute in re.findall(r"`run\.(\w+)", text):
        assert hasattr(names["run"], attribute), attribute


def test_the_space_of_its_page_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "searches.md").read_text(encoding="utf-8")
    (lines,) = [lines for language, lines in code_blocks(text) if language == "yaml"]
    path = tmp_path / "space.yaml"
    path.write_text("\n".join(lines))
    assert len(read_space(path).parameters) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#\s]*)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
    if page.name == "README.md":
        reached = {page, *((page.parent / target).resolve() for target in targets)}
        reached |= {ROOT / "docs" / name for name in ("comparison.md", "results.md")}
        assert {*PAGES} <= reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?<![\w./])(?:model|dataset|optimizer|trainer|wandb)\.[a-z_.]*[a-z]"
    named = {name for name in re.findall(pattern, text) if not name.endswith(FILES)}
    assert named <= {*options()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_has_at_most_100_columns(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))] == []
