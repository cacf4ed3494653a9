"""Where a run's numbers go: metrics.jsonl always, Weights & Biases beside it. The only file that imports wandb.

W&B never stops, delays or alters training: it lives behind a queue on a thread of its own, every wait for it is bounded,
and when it fails the run says so once and goes on; metrics.jsonl is complete either way.
"""

import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chargpt.config import Config, Mode, to_plain

INIT_TIMEOUT = 20.0  # seconds, each of them a bound
PROBE_TIMEOUT = 5.0
FINISH_TIMEOUT = 20.0


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is logged."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def log(self, metrics: dict[str, int | float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, int | float | None]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class WandbRun:
    """One Weights & Biases run, online or offline, behind a queue.

    `say` prints a line to the person. `id` is the W&B run id (None: W&B is off), to be kept for a resume.
    """

    def __init__(
        self, config: Config, derived: dict[str, Any], run_dir: Path, run_id: str | None, say: Callable[[str], None]
    ):
        self.id: str | None = None
        self.sync_command: str | None = None  # what uploads an offline run
        self._say = say
        self._samples: list[tuple[int, str]] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._run: Any = None
        self._failed = config.mode is Mode.disabled
        if self._failed:
            return
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        started = threading.Event()
        self._tasks.put(lambda: self._init(config, derived, run_dir, run_id, started))
        if not started.wait(2 * INIT_TIMEOUT + PROBE_TIMEOUT):
            self._fail("it did not start in time")

    def log(self, metrics: dict[str, int | float]) -> None:
        self._tasks.put(lambda: self._run.log(metrics))

    def log_sample(self, step: int, text: str) -> None:
        self._samples.append((step, text))
        rows = list(self._samples)
        self._tasks.put(lambda: self._log_samples(step, rows))

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Hand over the summary and wait, a bounded time, until W&B has it."""
        if self._failed:
            return
        self._tasks.put(lambda: self._finish(summary, exit_code))
        self._tasks.put(None)
        self._thread.join(FINISH_TIMEOUT + 10)
        if self._thread.is_alive():
            self._fail("it did not finish in time")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._failed:
                continue
            try:
                task()
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(
                f"W&B: stopped ({' '.join(reason.split())[:200]}); training goes on, metrics.jsonl has everything"
            )

    def _init(
        self, config: Config, derived: dict[str, Any], run_dir: Path, run_id: str | None, started: threading.Event
    ) -> None:
        try:
            self._start(config, derived, run_dir, run_id)
        finally:
            started.set()

    def _start(self, config: Config, derived: dict[str, Any], run_dir: Path, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else even an offline run opens a connection
        import wandb

        mode = config.mode.name
        if config.mode is Mode.online and (reason := why_not_online(wandb.setup().settings)):
            self._say(f"W&B: {reason}; this run is logged offline")
            mode = "offline"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            x_transaction_log_flush_interval=1,
        )
        arguments = dict(
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            name=config.wandb.name,
            tags=config.wandb.tags,
            config=to_plain(config) | derived,
            dir=run_dir,
            id=run_id,
            resume="allow" if run_id else None,
            reinit="finish_previous",
            settings=settings,
        )
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode != "online":
                raise
            self._say(f"W&B: the server refused the run ({' '.join(str(error).split())[:200]}); it is logged offline")
            mode = "offline"
            self._run = wandb.init(mode=mode, **arguments)
        self.id = self._run.id
        self._run.define_metric("*", step_metric="trainer/step")
        if mode == "offline":
            self.sync_command = f"wandb sync {Path(self._run.dir).parent}"

    def _log_samples(self, step: int, rows: list[tuple[int, str]]) -> None:
        import wandb

        table = wandb.Table(columns=["step", "text"], data=rows)
        self._run.log({"samples": table, "trainer/step": step})

    def _finish(self, summary: dict[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            self._run.summary[name] = value
        self._run.finish(exit_code=exit_code)


def why_not_online(settings: Any) -> str | None:
    """The reason an online run cannot start, or None. Asked first: a failed online start can spoil an offline one."""
    from wandb.sdk.lib import wbauth

    key = os.environ.get("WANDB_API_KEY") or settings.api_key or wbauth.read_netrc_auth(host=settings.base_url)
    if not key:
        return "no API key (write `wandb login`, or set WANDB_API_KEY)"
    try:
        urllib.request.urlopen(settings.base_url, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any answer at all is a server
    except (OSError, ValueError) as error:
        return f"{settings.base_url} is out of reach ({getattr(error, 'reason', error)})"
    return None
