"""Where a run's numbers go: metrics.jsonl always, Weights & Biases beside it. The only file that imports wandb.

W&B never stops, delays or alters training: it lives behind a queue on a thread of its own, every wait for it is bounded,
and when it fails the run says so once and goes on; metrics.jsonl is complete either way.
"""

import os
import queue
import shlex
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
TABLE_TIMEOUT = 20.0  # wandb's own, 17.5, and a little


class WandbRun:
    """One Weights & Biases run, online or offline, behind a queue.

    `say` prints a line to the person. `id` is the W&B run id (None: W&B is off); it is kept in wandb/run_id, so that a
    resumed run is the same W&B run.
    """

    def __init__(
        self, config: Config, derived: dict[str, Any], run_dir: Path, say: Callable[[str], None]
    ):
        self.id: str | None = None
        self.url: str | None = None  # where an online run is shown
        self.sync_command: str | None = None  # what uploads an offline run
        self._say = say
        self._samples: list[tuple[int, str]] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._run: Any = None
        self._exit_code = 0
        self._tables_arrive = True
        self._thread: threading.Thread | None = None
        self._failed = config.mode is Mode.disabled
        if self._failed:
            return
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        started = threading.Event()
        self._tasks.put(lambda: self._init(config, derived, run_dir, started))
        if not started.wait(2 * INIT_TIMEOUT + PROBE_TIMEOUT):
            self._fail("it did not start in time")

    def log(self, metrics: dict[str, int | float]) -> None:
        if self._thread is not None:  # else nobody would take it from the queue
            self._tasks.put(lambda: self._run.log(metrics))

    def log_sample(self, step: int, text: str) -> None:
        if self._thread is None:
            return
        self._samples.append((step, text))
        rows = list(self._samples)
        self._tasks.put(lambda: self._log_samples(step, rows))

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Hand over the summary and wait, a bounded time, until W&B has it."""
        if self._thread is None:
            return
        self._exit_code = exit_code
        self._tasks.put(lambda: self._run.summary.update(summary))
        self._tasks.put(None)
        self._thread.join(FINISH_TIMEOUT + TABLE_TIMEOUT)
        if self._thread.is_alive():
            self._fail("it did not finish in time")
        if self._failed:
            abandon_service()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not self._failed:
                self._attempt(task)
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=self._exit_code))

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            if self._run is not None:
                self.sync_command = sync_command(
                    self._run
                )  # wandb-core writes to disk before it sends
            self._say(
                f"W&B: stopped ({' '.join(reason.split())[:200]}); training goes on, metrics.jsonl has everything"
            )

    def _init(
        self, config: Config, derived: dict[str, Any], run_dir: Path, started: threading.Event
    ) -> None:
        try:
            self._start(config, derived, run_dir)
        finally:
            started.set()

    def _start(self, config: Config, derived: dict[str, Any], run_dir: Path) -> None:
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # else even an offline run opens a connection
        import wandb

        id_file = run_dir / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        mode: Any = config.mode.name
        if config.mode is Mode.online and (reason := why_not_online(own_settings())):
            self._say(f"W&B: {reason}; this run is logged offline")
            mode = "offline"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,
        )
        arguments: dict[str, Any] = dict(
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
            self._say(
                f"W&B: the server refused the run ({' '.join(str(error).split())[:200]}); it is logged offline"
            )
            mode = "offline"
            self._run = wandb.init(mode=mode, **arguments)
        self.id = self._run.id
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(f"{self.id}\n")
        self._run.define_metric("*", step_metric="trainer/step")
        if mode == "offline":
            self.sync_command = sync_command(self._run)
        else:
            self.url = self._run.url
            self._say(f"W&B: {self.url}")

    def _log_samples(self, step: int, rows: list[tuple[int, str]]) -> None:
        import wandb

        if not self._tables_arrive:
            return
        table = wandb.Table(columns=["step", "text"], data=rows)
        try:
            self._run.log({"samples": table, "trainer/step": step})
        except (
            wandb.Error
        ):  # a table alone asks the server, and waits long for one that is gone: not a second time
            self._tables_arrive = False


def sync_command(run: Any) -> str:
    return f"wandb sync {'' if run.offline else '--include-online '}{shlex.quote(str(Path(run.dir).parent))}"


def abandon_service() -> None:
    """End wandb-core at once, so that neither the interpreter's exit nor the next run in this process waits for it."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.service import service_token

    singleton: Any = wandb_setup._singleton
    wandb_setup._singleton = None
    connection = singleton and singleton._connection
    if connection and connection._proc:
        connection._finalizer._queue.put(None)  # its thread would complain of the lost connection
        connection._cleanup()  # its atexit hook, which waits without a bound
        service_token.clear_service_in_env()
        connection._proc._process.kill()
        connection._proc._process.wait()


def own_settings() -> Any:
    """What wandb finds in the environment and in its files."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True)).settings


def why_not_online(settings: Any) -> str | None:
    """The reason an online run cannot start, or None. Asked first: a failed online start can spoil an offline one."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        key = (
            os.environ.get("WANDB_API_KEY")
            or settings.api_key
            or wbauth.read_netrc_auth(host=settings.base_url)
        )
    except wandb.Error as error:
        return " ".join(str(error).split())
    if not key:
        return "no API key (write `wandb login`, or set WANDB_API_KEY)"
    try:
        urllib.request.urlopen(settings.base_url, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any answer at all is a server
    except (OSError, ValueError) as error:
        return f"{settings.base_url} is out of reach ({getattr(error, 'reason', error)})"
    return None
