"""Weights & Biases, in addition to metrics.jsonl: the only module that imports wandb.

W&B never stops, delays or alters training. It runs behind a queue on its own thread, every wait for
it is bounded, and if it fails, the run reports that once and continues; metrics.jsonl is complete
either way.
"""

import functools
import os
import queue
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from chargpt.config import Config, Mode, to_plain
from chargpt.errors import one_line

# Upper bounds in seconds.
INIT_TIMEOUT = 20.0
PROBE_TIMEOUT = 5.0
FINISH_TIMEOUT = 20.0
TABLE_TIMEOUT = 20.0  # wandb's own, 17.5, and a little more
MAX_REASON = 200  # characters of wandb's errors


class WandbRun:
    """One Weights & Biases run, online or offline, behind a queue.

    `say` prints a line to the person. `id` is the W&B run id (None: W&B is off), kept in
    wandb/run_id, so that a resumed run is the same W&B run. The members of a population have one
    each, at the same time.
    """

    live: ClassVar[set["WandbRun"]] = set()  # of this process
    broken: ClassVar[bool] = False  # one of them failed, since there were none

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
        self._failed = False
        self._tables_arrive = True
        started = threading.Event()
        run = (started, config, derived, run_dir)
        self._thread = threading.Thread(target=self._work, args=run, name="wandb", daemon=True)
        if config.mode is not Mode.disabled:
            self._thread.start()
            self.live.add(self)
            if not started.wait(2 * INIT_TIMEOUT + PROBE_TIMEOUT):
                self._fail("it did not start in time")

    def log(self, metrics: dict[str, int | float]) -> None:
        if self._thread.is_alive():
            self._tasks.put(lambda: self._run.log(metrics))

    def log_sample(self, step: int, text: str) -> None:
        self._samples.append((step, text))
        rows = list(self._samples)
        if self._thread.is_alive():
            self._tasks.put(lambda: self._log_samples(step, rows))

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Hand over the summary and wait, a bounded time, until W&B has it."""
        if not self._thread.is_alive():
            return
        self._exit_code = exit_code
        self._tasks.put(lambda: self._run.summary.update(summary))
        self._tasks.put(None)
        self._thread.join(FINISH_TIMEOUT + TABLE_TIMEOUT)
        if self._thread.is_alive():
            self._fail("it did not finish in time")
        self.live.discard(self)
        WandbRun.broken |= self._failed
        if self.broken and not self.live:
            WandbRun.broken = False
            abandon_service()

    def _work(self, started: threading.Event, *run: Any) -> None:
        self._attempt(lambda: self._start(*run))
        started.set()
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
        if self._failed:
            return
        self._failed = True
        if self._run is not None:
            self.sync_command = sync_command(self._run)  # wandb-core writes to disk first
        problem = f"W&B: stopped ({one_line(reason)[:MAX_REASON]})"
        self._say(f"{problem}; training continues, metrics.jsonl has everything")

    def _start(self, config: Config, derived: dict[str, Any], run_dir: Path) -> None:
        # Otherwise even an offline run opens a connection.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        online = config.mode is Mode.online
        if online and (reason := why_not_online(own_settings())):
            self._say(f"W&B: {reason}; this run is logged offline")
            online = False
        id_file = run_dir / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,
        )
        start = functools.partial(
            wandb.init,
            **vars(config.wandb),
            config=to_plain(config) | derived,
            dir=run_dir,
            id=run_id,
            resume="allow" if run_id else None,
            reinit="create_new",
            settings=settings,
        )
        try:
            self._run = start(mode="online" if online else "offline")
        except Exception as error:
            if not online:
                raise
            problem = f"W&B: the server refused the run ({one_line(error)[:MAX_REASON]})"
            self._say(f"{problem}; it is logged offline")
            online = False
            self._run = start(mode="offline")
        self.id = self._run.id
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(f"{self.id}\n")
        self._run.define_metric("*", step_metric="trainer/step")
        if online:
            self.url = self._run.url
            self._say(f"W&B: {self.url}")
        else:
            self.sync_command = sync_command(self._run)

    def _log_samples(self, step: int, rows: list[tuple[int, str]]) -> None:
        import wandb

        if not self._tables_arrive:
            return
        table = wandb.Table(columns=["step", "text"], data=rows)
        try:
            self._run.log({"samples": table, "trainer/step": step})
        except wandb.Error:
            # Only a table asks the server, and waits long for one that is gone: do not try again.
            self._tables_arrive = False


def sync_command(run: Any) -> str:
    include = "" if run.offline else "--include-online "
    return f"wandb sync {include}{shlex.quote(str(Path(run.dir).parent))}"


def abandon_service() -> None:
    """End wandb-core at once: neither the interpreter's exit nor the next run may wait for it."""
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
    """Why an online run cannot start, or None. Its failed start could spoil an offline one."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        key = os.environ.get("WANDB_API_KEY") or settings.api_key
        key = key or wbauth.read_netrc_auth(host=settings.base_url)
    except wandb.Error as error:
        return one_line(error)
    if not key:
        return "no API key (write `wandb login`, or set WANDB_API_KEY)"
    try:
        urllib.request.urlopen(settings.base_url, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any answer at all is a server
    except (OSError, ValueError) as error:
        return f"{settings.base_url} is out of reach ({getattr(error, 'reason', error)})"
    return None
