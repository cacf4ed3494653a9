"""The W&B workspace: what it shows is what runs log; what goes wrong is one line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_config

from chargpt import cli
from chargpt.config import to_plain

pytest.importorskip("wandb_workspaces")

from chargpt.study.dashboard import build, specification

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # wandb-workspaces' own

# To make it again: chargpt dashboard out=tests/golden/dashboard.json
GOLDEN = ROOT / "tests" / "golden" / "dashboard.json"
LAYERS = range(12)
ATTENTION, FEED_FORWARD = (
    {f"grad_norm/{part}_{layer}" for layer in LAYERS} for part in ("attention", "feed_forward")
)
ENTROPY = {f"attention_entropy/layer_{layer}" for layer in LAYERS}
# In the lines of metrics.jsonl, and in those that evaluate: Run.line, Loop._evaluate
HISTORY = {"trainer/step", "trainer/tokens", "trainer/seconds", "trainer/skipped_steps"}
HISTORY |= {"train/loss", "train/grad_norm", "optim/learning_rate"}
HISTORY |= {"grad_norm/embedding", "grad_norm/head", *ATTENTION, *FEED_FORWARD, *ENTROPY}
HISTORY |= {"throughput/tokens_per_second", "throughput/mfu"}
HISTORY |= {"val/loss", "val/accuracy", "val/bpc", "val/raw_loss"}
DERIVED = {"mha_type", "num_params", "kv_cache_bytes_per_token", "flops_per_token"}
DERIVED |= {"device", "num_devices", "dataset"}
# Recorder.summary
SUMMARY = {"best/val_loss", "best/step", "final/val_loss", "final/step", "tokens_per_second"}
SUMMARY |= {"decode_tokens_per_second", "peak_memory_bytes", "compile_seconds", "train_seconds"}
SUMMARY |= DERIVED


def test_the_names_here_are_those_that_a_run_logs() -> None:
    files = ("run/evaluate.py", "run/loop.py", "run/recorder.py", "train.py")
    code = "".join((ROOT / "src" / "chargpt" / name).read_text() for name in files)
    written = {re.sub(r"_\d+$", "_{layer}", name) for name in HISTORY | SUMMARY}
    written = {name.removeprefix("grad_norm/").replace("_{layer}", "") for name in written}
    spelled = {name for name in written if f'"{name}"' in code or f"{name}_{{layer}}" in code}
    assert written - spelled == set()


# ---- the specification


@pytest.fixture(scope="module")
def text() -> str:
    return specification(build("entity", "chargpt"))


@pytest.fixture(scope="module")
def panels(text: str) -> list[dict[str, Any]]:
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_the_specification_is_the_same_to_the_byte(text: str) -> None:
    assert text.encode() == GOLDEN.read_bytes()


def test_panels_are_numbered_and_their_titles_differ(panels: list[dict[str, Any]]) -> None:
    numbered = [f"panel-{number}" for number in range(len(panels))]
    assert [panel["__id__"] for panel in panels] == numbered
    titles = [panel["config"].get("chartTitle", "samples") for panel in panels]
    assert len(set(titles)) == len(titles) == 23


def test_every_line_that_is_drawn_is_logged_by_a_run(panels: list[dict[str, Any]]) -> None:
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    axes = {config["xAxis"] for config in lines}
    assert axes == {"trainer/step", "trainer/tokens", "trainer/seconds"} and axes <= HISTORY
    drawn = [name for config in lines for name in config["metrics"]]
    assert len(drawn) > 10 and set(drawn) <= HISTORY
    patterns = [config["metricRegex"] for config in lines if "metricRegex" in config]
    found = [{name for name in HISTORY if re.search(pattern, name)} for pattern in patterns]
    assert found == [ATTENTION, FEED_FORWARD, ENTROPY]
    assert all(config["metrics"] or config["useMetricRegex"] for config in lines)


def test_every_cost_is_in_the_summary_of_a_run(panels: list[dict[str, Any]]) -> None:
    dots = [panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot"]
    assert {config["yAxis"] for config in dots} == {"summary:best/val_loss"}
    costs = [config["xAxis"].removeprefix("summary:") for config in dots]
    assert len(costs) == 6 and set(costs) <= SUMMARY
    (bars,) = (panel["config"] for panel in panels if panel["viewType"] == "Bar Chart")
    assert (bars["metrics"], bars["groupBy"]) == (["best/val_loss"], "mha_type.value")


def test_runs_are_grouped_by_their_attention_type(text: str) -> None:
    (runs,) = json.loads(text)["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "mha_type.value"}]
    # W&B's config holds what is derived and what is configured, side by side.
    assert "mha_type" in DERIVED and "mha_type" not in to_plain(small_config())


def test_samples_are_shown_from_the_table_that_a_run_logs(panels: list[dict[str, Any]]) -> None:
    (table,) = (panel for panel in panels if panel["viewType"] == "Weave")
    assert table["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] == "samples"
    assert '{"samples": table' in (ROOT / "src" / "chargpt" / "run" / "tracking.py").read_text()


# ---- the command


def run_tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run_tool(["dashboard", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_offline_the_specification_is_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = "dashboard.json\nmode=online entity=… saves the workspace at W&B\n"
    assert run_tool(capsys) == (0, printed, "")
    assert (tmp_path / "dashboard.json").read_bytes() == GOLDEN.read_bytes()
    assert run_tool(capsys, "entity=team", "project=other", "out=other.json")[0] == 0
    changed = json.loads((tmp_path / "other.json").read_text())
    assert changed == json.loads(GOLDEN.read_text()) | {"entity": "team", "project": "other"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["mode=disabled"], "mode=disabled: makes no dashboard; write mode=offline or mode=online"),
        (["mode=online"], "entity: is needed online; write entity=ACCOUNT-OR-TEAM"),
        (
            ["mode=onlin"],
            "mode=onlin: is not one of offline, online, disabled; did you mean online?",
        ),
        (
            ["entty=me"],
            "entty: there is no such option; did you mean entity? (write entity project mode out)",
        ),
    ],
)
def test_what_makes_no_dashboard_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert run_tool(capsys, *arguments) == (2, "", f"error: {line}\n")


def test_without_wandb_workspaces_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    needs = "error: dashboard: needs wandb-workspaces; write pip install -e '.[dashboard]'\n"
    assert run_tool(capsys) == (2, "", needs)


def test_a_place_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run_tool(capsys, f"out={tmp_path}/no/dashboard.json")
    assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ")


def test_a_server_out_of_reach_is_one_line_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A client for this test only, which starts no service
    monkeypatch.setattr("wandb.sdk.wandb_setup._singleton", None)
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
    folders = ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    places = dict.fromkeys(folders, str(tmp_path))
    for name, value in (server | places).items():
        monkeypatch.setenv(name, value)
    code, out, err = run_tool(capsys, "mode=online", "entity=me")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: dashboard: http://127.0.0.1:9 is out of reach (")
