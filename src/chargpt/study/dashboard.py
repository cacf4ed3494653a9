"""`chargpt dashboard`: a Weights & Biases workspace of this project's runs, as code."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from chargpt.config import Mode
from chargpt.errors import ConfigError, RunFailed, one_line, require
from chargpt.run.tracking import own_settings, why_not_online
from chargpt.study.figures import AXES, COSTS

STEP = "trainer/step"
NAME = "chargpt: what attention costs, and what it buys"


@dataclasses.dataclass
class DashboardOptions:
    """A W&B workspace for this project's runs: saved with mode=online, otherwise a file."""

    entity: str | None = None  # W&B account or team
    project: str = "chargpt"
    mode: Mode = Mode.offline  # offline | online
    out: str = "dashboard.json"  # the specification

    def __post_init__(self) -> None:
        problem = "mode=disabled: makes no dashboard; write mode=offline or mode=online"
        require(self.mode is not Mode.disabled, problem)
        problem = "entity: is needed online; write entity=ACCOUNT-OR-TEAM"
        require(self.mode is Mode.offline or self.entity is not None, problem)


def dashboard(options: DashboardOptions) -> None:
    """Write the workspace's specification to `out`, or save it at W&B and print its address."""
    try:
        workspace = build(options.entity or "entity", options.project)
    except ImportError:
        needs = "needs wandb-workspaces; write pip install -e '.[dashboard]'"
        raise ConfigError(f"dashboard: {needs}") from None
    if options.mode is Mode.offline:
        Path(options.out).write_text(specification(workspace), encoding="utf-8")
        print(f"{options.out}\nmode=online entity=… saves the workspace at W&B")
        return
    if reason := why_not_online(own_settings()):
        raise RunFailed(f"dashboard: {reason}")
    try:
        workspace.save()
    except Exception as error:  # whatever requests, wandb and gql raise
        raise RunFailed(f"dashboard: W&B refused it ({one_line(error)[:200]})") from error
    print(workspace.url)


def specification(workspace: Any) -> str:
    """The workspace as W&B's own JSON, its random panel ids numbered: reproducible."""
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)
    ids = list(dict.fromkeys(re.findall(r'"__id__":"(\w+)"', text)))
    for number, identity in enumerate(ids):
        text = text.replace(f'"{identity}"', f'"panel-{number}"')
    return json.dumps(json.loads(text), indent=1) + "\n"


def build(entity: str, project: str) -> Any:
    """The workspace: runs grouped by attention type, panels on the axes that a run logs."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def line(title: str, *names: str, x: str = STEP, regex: str | None = None) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(names), metric_regex=regex)

    def scatter(title: str, name: str) -> Any:
        x, y = wr.SummaryMetric(name), wr.SummaryMetric("best/val_loss")
        return wr.ScatterPlot(title=title, x=x, y=y, running_ymin=False)

    loss = "best validation loss"
    logged = [axis for name, axis in AXES.items() if name != "FLOPs"]
    sections = {
        "Loss": [
            *(line(f"validation loss after {what}", "val/loss", x=x) for x, what in logged),
            line("training loss", "train/loss"),
            line("validation accuracy", "val/accuracy"),
            line("validation bits per character", "val/bpc"),
        ],
        "What it costs, what it buys": [
            wr.BarPlot(title=loss, metrics=["best/val_loss"], groupby="mha_type"),
            *(scatter(f"{loss} against {title}", name) for name, (title, _) in COSTS.items()),
        ],
        "Gradients": [
            line("gradient norm", "train/grad_norm"),
            line("of attention, by layer", regex=r"grad_norm/attention_\d+"),
            line("of feed-forward layers", regex=r"grad_norm/feed_forward_\d+"),
            line("of embedding and head", "grad_norm/embedding", "grad_norm/head"),
            line("learning rate", "optim/learning_rate"),
            line("steps skipped: loss or gradient not finite", "trainer/skipped_steps"),
        ],
        "Attention": [
            line(
                "entropy of attention in nats, mean of a layer's heads",
                regex=r"attention_entropy/layer_\d+",
            )
        ],
        "Machine": [
            line("tokens per second", "throughput/tokens_per_second"),
            line("model FLOP utilisation", "throughput/mfu"),
        ],
        "Samples": [wr.WeavePanelSummaryTable(table_name="samples")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name, panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("mha_type")]),
        auto_generate_panels=False,
    )
