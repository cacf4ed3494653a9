"""`chargpt dashboard`: a Weights & Biases workspace of this project's runs, as code."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from chargpt.config import Mode
from chargpt.errors import ConfigError, RunFailed, require
from chargpt.run.tracking import own_settings, why_not_online
from chargpt.study.figures import AXES, COSTS

STEP = "trainer/step"


@dataclasses.dataclass
class DashboardOptions:
    """A W&B workspace for this project's runs: saved with mode=online, else written to a file."""

    entity: str | None = None  # W&B account or team
    project: str = "chargpt"
    mode: Mode = Mode.offline  # offline | online
    out: str = "dashboard.json"  # the specification

    def __post_init__(self) -> None:
        require(
            self.mode is not Mode.disabled,
            "mode=disabled: makes no dashboard; write mode=offline or mode=online",
        )
        require(
            self.mode is Mode.offline or self.entity is not None,
            "entity: is needed online; write entity=ACCOUNT-OR-TEAM",
        )


def dashboard(options: DashboardOptions) -> None:
    """Write the workspace's specification to `out`, or save it at W&B and print its address."""
    try:
        workspace = build(options.entity or "entity", options.project)
    except ImportError:
        raise ConfigError(
            "dashboard: needs wandb-workspaces; write pip install -e '.[dashboard]'"
        ) from None
    if options.mode is Mode.offline:
        Path(options.out).write_text(specification(workspace), encoding="utf-8")
        print(f"{options.out}\nmode=online entity=… saves the workspace at W&B")
        return
    if reason := why_not_online(own_settings()):
        raise RunFailed(f"dashboard: {reason}")
    try:
        workspace.save()
    except Exception as error:  # requests', wandb's and gql's, whatever they raise
        raise RunFailed(
            f"dashboard: W&B refused it ({' '.join(str(error).split())[:200]})"
        ) from error
    print(workspace.url)


def specification(workspace: Any) -> str:
    """The workspace as W&B's own JSON, with numbers for its random panel ids: reproducible."""
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

    axes = {"steps": STEP, "tokens": "trainer/tokens", "seconds": "trainer/seconds"}

    def line(
        title: str, *names: str, x: str = STEP, regex: str | None = None, log: bool = False
    ) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(names), metric_regex=regex, log_y=log or None)

    losses = [
        line(f"validation loss after {AXES[name]}", "val/loss", x=axis)
        for name, axis in axes.items()
    ]
    losses += [line("training loss", "train/loss"), line("validation accuracy", "val/accuracy")]
    losses += [line("validation bits per character", "val/bpc")]
    best = wr.SummaryMetric("best/val_loss")
    costs = [
        wr.BarPlot(title="best validation loss", metrics=["best/val_loss"], groupby="mha_type")
    ]
    costs += [
        wr.ScatterPlot(
            title=f"best validation loss against {title}",
            x=wr.SummaryMetric(name),
            y=best,
            running_ymin=False,
        )
        for name, (title, _) in COSTS.items()
    ]
    gradients = [
        line("gradient norm", "train/grad_norm"),
        line("of attention, by layer", regex=r"grad_norm/attention_\d+"),
        line("of feed-forward layers", regex=r"grad_norm/feed_forward_\d+"),
        line("of embedding and head", "grad_norm/embedding", "grad_norm/head"),
        line("learning rate", "optim/learning_rate"),
        line("steps skipped: loss or gradient not finite", "trainer/skipped_steps"),
    ]
    attention = [
        line(
            "entropy of attention in nats, mean of a layer's heads",
            regex=r"attention_entropy/layer_\d+",
        )
    ]
    machine = [
        line("tokens per second", "throughput/tokens_per_second"),
        line("model FLOP utilisation", "throughput/mfu"),
    ]
    sections = {
        "Loss": losses,
        "What it costs, what it buys": costs,
        "Gradients": gradients,
        "Attention": attention,
        "Machine": machine,
        "Samples": [wr.WeavePanelSummaryTable(table_name="samples")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="chargpt: what attention costs, and what it buys",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("mha_type")]),
        auto_generate_panels=False,
    )
