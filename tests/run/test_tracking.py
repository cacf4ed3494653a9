"""W&B itself, against a stand-in for its server on loopback; and what happens when it breaks.

wandb keeps a service process and hooks for the interpreter's exit, so whatever starts it runs in a
child process of its own: a `child_*` function here, whose report the tests examine.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_config
from wandb_server import API_KEY, FakeServer

from chargpt.run import tracking
from chargpt.run.directory import log_metrics, read_metrics
from chargpt.run.tracking import WandbRun

NOWHERE = "http://127.0.0.1:9"
WANDB = Path(sys.executable).parent / "wandb"
DERIVED = {"num_params": 1234, "versions": {"python": "3.11"}}
LINES = [{"trainer/step": 10 * n, "train/loss": 4.0 / n, "val/loss": 4.5 / n} for n in range(1, 6)]
SUMMARY = {"best/val_loss": 0.9, "best/step": 50}


# ---- children


def environment(home: Path, base_url: str, api_key: str | None) -> dict[str, str]:
    """This process's variables without W&B's and proxies.

    Every place that wandb reads or writes lies in `home`.
    """

    def wanted(name: str) -> bool:
        return not name.startswith("WANDB_") and "proxy" not in name.lower()

    kept = {name: value for name, value in os.environ.items() if wanted(name)}
    names = ["HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR"]
    names += [f"WANDB_{name}" for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR")]
    places = dict.fromkeys(names, str(home / "private"))
    (home / "private").mkdir(exist_ok=True)
    chosen = {
        "NETRC": str(home / "private/netrc"),
        "WANDB_BASE_URL": base_url,
        "WANDB_ERROR_REPORTING": "false",
    }
    return kept | places | chosen | ({} if api_key is None else {"WANDB_API_KEY": api_key})


class Child:
    """A `child_*` function in a process of its own, in the folder `home`, during a `with` block."""

    def __init__(
        self,
        function: Callable[..., None],
        home: Path,
        *arguments: str,
        url: str = NOWHERE,
        key: str | None = None,
    ):
        self.home = home
        path = f"import sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT / 'tests' / 'run')]}"
        code = f"{path}; import test_tracking as t; t.{function.__name__}"
        self._stderr = open(home / "stderr", "w+")  # noqa: SIM115 (closed at the end of the block)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{code}(*{arguments!r})"],
            cwd=home,
            env=environment(home, url, key),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> "Child":
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        self._process.wait()
        self._ended = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._watcher.join()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            assert file
            file.close()
        if (self.home / "service").exists():  # stopped by SIGSTOP, it outlives its parent
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((self.home / "service").read_text()), signal.SIGKILL)

    def wait_until_half_way(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == "half way\n", self.stderr()

    def proceed(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self, timeout: float = 25.0) -> dict[str, Any]:
        """What the child reported, "exit_seconds" (from its report to its end) and "stderr"."""
        self._watcher.join(timeout)
        assert not self._watcher.is_alive(), f"still running after {timeout} s\n{self.stderr()}"
        assert self._process.returncode == 0, self.stderr()
        result = json.loads((self.home / "report.json").read_text())
        return result | {"exit_seconds": self._ended - result["monotonic"], "stderr": self.stderr()}

    def stderr(self) -> str:
        return (self.home / "stderr").read_text()


def run_child(
    function: Callable[..., None], home: Path, *arguments: str, **where: Any
) -> dict[str, Any]:
    with Child(function, home, *arguments, **where) as child:
        return child.result()


def half_way() -> None:
    """Wait until the parent has done something."""
    print("half way", flush=True)
    sys.stdin.readline()


def begin(mode: str, directory: str = "run") -> tuple[WandbRun, list[str]]:
    said: list[str] = []
    Path(directory).mkdir(exist_ok=True)
    return WandbRun(small_config(f"mode={mode}"), DERIVED, Path(directory), said.append), said


def log_all(run: WandbRun, lines: list[dict[str, Any]] = LINES) -> None:
    for line in lines:
        run.log(line)
        run.log_sample(line["trainer/step"], f"text of step {line['trainer/step']}")


def report(run: WandbRun, said: list[str], **more: Any) -> None:
    about = {"id": run.id, "url": run.url, "sync_command": run.sync_command, "said": said}
    write_report(about | more)


def write_report(content: dict[str, Any]) -> None:
    Path("report.json").write_text(json.dumps(content | {"monotonic": time.monotonic()}))


def service_pids() -> list[int]:
    """The wandb-core processes that this process started."""
    command = ["ps", "-eo", "pid,ppid,comm"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    mine = [(pid, name) for pid, parent, name in rows if int(parent) == os.getpid()]
    return [int(pid) for pid, name in mine if "wandb-core" in name]


def child_whole_run(mode: str) -> None:
    run, said = begin(mode)
    log_all(run)
    run.finish(SUMMARY, 0)
    report(run, said)


def child_three_runs() -> None:
    """Two runs at the same time, and the first resumed: it repeats its last two lines."""
    first, said = begin("online", "first")
    second, said_by_second = begin("online", "second")
    log_all(first)
    first.finish(SUMMARY, 0)
    second.log(LINES[0])
    second.finish({}, 1)
    resumed, said_by_resumed = begin("online", "first")
    for line in LINES[-2:]:
        resumed.log(line)
    resumed.finish({"best/val_loss": 0.5}, 0)
    report(first, said + said_by_second + said_by_resumed, second=second.id, resumed=resumed.id)


def child_outlives_server() -> None:
    tracking.FINISH_TIMEOUT = 2.0
    run, said = begin("online")
    log_metrics(Path("run"), LINES[0])
    run.log(LINES[0])
    half_way()
    slowest = 0.0
    for line in LINES[1:]:
        began = time.monotonic()
        log_metrics(Path("run"), line)
        run.log(line)
        run.log_sample(line["trainer/step"], "text")
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.1)
    began = time.monotonic()
    run.finish(SUMMARY, 0)
    report(run, said, slowest=slowest, finish_seconds=time.monotonic() - began)


def child_outlives_service(what: str) -> None:
    """wandb-core gets a signal in mid-run; then a second run begins in the same process."""
    tracking.FINISH_TIMEOUT = tracking.INIT_TIMEOUT = 2.0
    run, said = begin("offline")
    (service,) = service_pids()
    Path("service").write_text(str(service))
    run.log(LINES[0])
    os.kill(service, getattr(signal, what))
    time.sleep(0.2)
    began = time.monotonic()
    for line in LINES[1:]:
        run.log(line)
    logging_seconds = time.monotonic() - began
    began = time.monotonic()
    run.finish(SUMMARY, 0)
    finish_seconds = time.monotonic() - began
    second, said_by_second = begin("offline", "second")
    second.log(LINES[0])
    second.finish({}, 0)
    seconds = {"logging_seconds": logging_seconds, "finish_seconds": finish_seconds}
    report(run, said, second=[second.id, said_by_second], **seconds)


def child_never_finishes() -> None:
    run, said = begin("online")
    log_all(run)
    report(run, said)


def child_disabled() -> None:
    run, said = begin("disabled")
    log_all(run)
    run.finish(SUMMARY, 0)
    left = [path.name for path in Path("run").iterdir()]
    report(run, said, imported="wandb" in sys.modules, left=left)


def child_log_raises() -> None:
    run, said = begin("offline")
    run.log(LINES[0])
    import wandb

    calls = []

    def broken_log(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise RuntimeError("no space\nleft")

    wandb.Run.log = broken_log
    log_all(run)
    run.finish(SUMMARY, 0)
    report(run, said, calls=len(calls))


def child_why_not_online(base_url: str, closed_url: str) -> None:
    def ask(url: str, key: str | None = None) -> str | None:
        return tracking.why_not_online(types.SimpleNamespace(base_url=url, api_key=key))

    reasons = {
        "no key": ask(base_url),
        "key": ask(base_url, API_KEY),
        "missing page": ask(base_url + "/404", API_KEY),
    }
    reasons |= {"closed": ask(closed_url, API_KEY), "no address": ask("nonsense", API_KEY)}
    netrc = Path(os.environ["NETRC"])
    for name, key in {"netrc": API_KEY, "short netrc": "short"}.items():
        netrc.write_text(f"machine {base_url.removeprefix('http://')} login user password {key}\n")
        netrc.chmod(0o600)
        reasons[name] = ask(base_url)
    write_report(reasons)


# ---- helpers


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def closed_url() -> str:
    """An address on which nothing listens."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History lines without what wandb adds, and without the lines of the samples table."""
    return [
        {name: value for name, value in line.items() if not name.startswith("_")}
        for line in history
        if not any(name.startswith("samples") for name in line)
    ]


def read_offline(run_dir: Path) -> list[dict[str, Any]]:
    """The records of the one offline run under `run_dir`, as W&B's own command reads them."""
    (log,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [str(WANDB), "leet", "inspect", "--json", str(log)]
    environ = environment(run_dir.parent, NOWHERE, None)
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout
    return [json.loads(line) for line in output.splitlines()]


def upload(result: dict[str, Any], home: Path, server: FakeServer) -> None:
    """What a person does with the run's sync command."""
    assert result["sync_command"] is not None
    program, *arguments = shlex.split(result["sync_command"])
    environ = environment(home, server.url, API_KEY)
    command = [WANDB.with_name(program), *arguments]
    subprocess.run(command, cwd=home, env=environ, check=True, capture_output=True)


# ---- children that outlive something: started first, examined last


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    """Children that lost their server or their wandb-core process in mid-run.

    They mostly wait, so they all run at once and start before the other slow tests.
    """
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(FakeServer()) for name in ("closes", "stalls")}
        children = {}
        for name, fake in servers.items():
            home = tmp_path_factory.mktemp(name)
            child = Child(child_outlives_server, home, url=fake.url, key=API_KEY)
            children[name] = stack.enter_context(child)
        for name in ("SIGKILL", "SIGSTOP"):
            child = Child(child_outlives_service, tmp_path_factory.mktemp(name), name)
            children[name] = stack.enter_context(child)
        for name in servers:
            children[name].wait_until_half_way()
        servers["closes"].close()
        servers["stalls"].stalled.set()
        for name in servers:
            children[name].proceed()
        yield children


# ---- online


@pytest.fixture(scope="module")
def online(
    survivors: dict[str, Child], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FakeServer, dict[str, Any]]]:
    """What arrived from `child_three_runs`, and what it reported."""
    with FakeServer() as fake:
        home = tmp_path_factory.mktemp("online")
        yield fake, run_child(child_three_runs, home, url=fake.url, key=API_KEY)


def test_an_online_run_reports_where_it_is_shown(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    urls = [f"{fake.url}/tester/chargpt/runs/{result[run]}" for run in ("id", "second", "resumed")]
    assert result["said"] == [f"W&B: {url}" for url in urls]
    assert result["url"] == urls[0] and result["sync_command"] is None


def test_an_online_run_leaves_the_terminal_alone(online: tuple[FakeServer, dict[str, Any]]) -> None:
    _, result = online
    assert result["stderr"] == ""


def test_config_arrives(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    config = fake.config(result["id"])
    assert config["num_params"] == 1234 and config["versions"] == {"python": "3.11"}
    assert config["model"]["mha_type"] == "standard" and config["model"]["mla"]["kv_lora_rank"] == 8
    assert config["dataset"]["seq_len"] == 16 and config["optimizer"]["learning_rate"] == 3e-3


def test_a_run_is_named_after_its_attention_type(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    assert fake.runs[result["id"]]["displayName"] == "standard"


def test_every_line_arrives_with_its_step_inside(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    # What a resumed run computes again is not dropped: W&B's own step continues to count
    replayed = LINES + LINES[-2:]
    history = fake.history(result["id"])
    assert numbers(history) == replayed
    assert [line["_step"] for line in history] == list(range(len(history)))


def test_the_axis_of_every_metric_is_the_step(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    metrics = json.loads(fake.runs[result["second"]]["config"])["_wandb"]["value"]["m"]
    # 2: glob, 5: step metric, from 1, 1: name
    (everything,) = [metric for metric in metrics if metric.get("2") == "*"]
    assert metrics[everything["5"] - 1]["1"] == "trainer/step"


def test_the_summary_arrives(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    summary = fake.summary(result["id"])
    assert summary["best/val_loss"] == 0.5  # of the resumed run
    assert summary["best/step"] == 50  # of the run before it
    assert summary["val/loss"] == LINES[-1]["val/loss"]
    assert "best/val_loss" not in fake.summary(result["second"])


def test_the_samples_table_arrives(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    tables = [line for line in fake.history(result["id"]) if "samples" in line]
    assert [line["trainer/step"] for line in tables] == [10, 20, 30, 40, 50]
    table = json.loads(fake.files[f"{result['id']}/{tables[-1]['samples']['path']}"])
    assert table == {
        "columns": ["step", "text"],
        "data": [[n, f"text of step {n}"] for n in (10, 20, 30, 40, 50)],
    }


def test_runs_of_one_process_are_separate_runs(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    assert result["id"] != result["second"]
    assert numbers(fake.history(result["second"])) == LINES[:1]
    assert fake.exit_codes[result["second"]] == 1


def test_a_resumed_run_keeps_its_id(online: tuple[FakeServer, dict[str, Any]]) -> None:
    fake, result = online
    assert result["resumed"] == result["id"]
    assert set(fake.runs) == {result["id"], result["second"]}
    assert fake.exit_codes[result["id"]] == 0


# ---- online does not work


def test_without_an_api_key_the_run_continues_offline(tmp_path: Path, server: FakeServer) -> None:
    result = run_child(child_whole_run, tmp_path, "online", url=server.url)
    assert server.operations == []
    assert_went_offline(result, tmp_path, "no API key")


def test_if_the_server_is_out_of_reach_the_run_continues_offline(
    tmp_path: Path, closed_url: str
) -> None:
    result = run_child(child_whole_run, tmp_path, "online", url=closed_url, key=API_KEY)
    assert_went_offline(result, tmp_path, "out of reach")


def test_if_the_server_refuses_the_run_it_continues_offline(
    tmp_path: Path, server: FakeServer
) -> None:
    server.refusing.set()
    result = run_child(child_whole_run, tmp_path, "online", url=server.url, key=API_KEY)
    assert_went_offline(result, tmp_path, "permission denied")


def assert_went_offline(result: dict[str, Any], home: Path, reason: str) -> None:
    """One line that says why; then a complete offline run, and the command that uploads it."""
    (line,) = result["said"]
    assert reason in line and "offline" in line and "\n" not in line and result["url"] is None
    program, command, directory = shlex.split(result["sync_command"])
    assert (program, command) == ("wandb", "sync") and list((home / directory).glob("*.wandb"))
    history = [record for record in read_offline(home / "run") if record["type"] == "history"]
    assert len(history) == 2 * len(LINES)


def test_why_not_online(tmp_path: Path, server: FakeServer, closed_url: str) -> None:
    reasons = run_child(child_why_not_online, tmp_path, server.url, closed_url)
    assert reasons["no key"] == "no API key (write `wandb login`, or set WANDB_API_KEY)"
    assert reasons["key"] is None and reasons["netrc"] is None and reasons["missing page"] is None
    assert reasons["short netrc"] and "API key" in reasons["short netrc"]
    assert reasons["closed"].startswith(f"{closed_url} is out of reach (")
    assert reasons["no address"].startswith("nonsense is out of reach (")


# ---- wandb breaks


def test_a_run_that_was_not_finished_does_not_hang_at_exit(
    tmp_path: Path, server: FakeServer
) -> None:
    """As when training raises."""
    result = run_child(child_never_finishes, tmp_path, url=server.url, key=API_KEY)
    assert result["exit_seconds"] < 10


def test_an_exception_in_wandb_is_reported_once_and_ends_wandb(tmp_path: Path) -> None:
    result = run_child(child_log_raises, tmp_path)
    (line,) = result["said"]
    assert "RuntimeError: no space left" in line and "metrics.jsonl" in line and "\n" not in line
    assert result["calls"] == 1


# ---- offline and disabled


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("offline")
    return home, run_child(child_whole_run, home, "offline")


def test_an_offline_run_is_silent_and_can_be_read_back(
    offline: tuple[Path, dict[str, Any]],
) -> None:
    home, result = offline
    assert result["said"] == [] and result["stderr"] == ""
    records = read_offline(home / "run")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert numbers(history) == LINES
    (started,) = [record["run"] for record in records if record["type"] == "run"]
    assert started["run_id"] == result["id"] and started["config"]["update"]["num_params"] == 1234
    summary: dict[str, Any] = {}
    for record in records:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    assert summary["best/val_loss"] == 0.9 and summary["val/loss"] == LINES[-1]["val/loss"]
    assert records[-1]["exit"]["exit_code"] == 0


def test_an_offline_run_can_be_uploaded_later(
    offline: tuple[Path, dict[str, Any]], server: FakeServer
) -> None:
    home, result = offline
    upload(result, home, server)
    assert numbers(server.history(result["id"])) == LINES
    assert server.summary(result["id"])["best/val_loss"] == 0.9


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    result = run_child(child_disabled, tmp_path)
    assert result["imported"] is False
    assert result["said"] == result["left"] == []
    assert result["id"] is None and result["sync_command"] is None


# ---- the server or the service dies in mid-run


@pytest.mark.parametrize("server_that", ["closes", "stalls"])
def test_the_death_of_the_server_delays_nothing(
    survivors: dict[str, Child], server_that: str
) -> None:
    """Whether it refuses connections, or accepts them and never answers."""
    child = survivors[server_that]
    result = child.result(timeout=60)
    assert read_metrics(child.home / "run/metrics.jsonl") == LINES
    assert result["slowest"] < 0.5
    assert result["finish_seconds"] < 25 and result["exit_seconds"] < 10
    where, *stopped = result["said"]
    assert where == f"W&B: {result['url']}"
    assert len(stopped) == 1, "an upload that did not end is reported once"
    assert "Traceback" not in result["stderr"]
    with FakeServer() as another:
        upload(result, child.home, another)
        assert numbers(another.history(result["id"])) == LINES
        assert another.summary(result["id"])["best/val_loss"] == 0.9


@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_the_death_of_the_service_process_delays_nothing(
    survivors: dict[str, Child], what: str
) -> None:
    result = survivors[what].result(timeout=60)
    assert len(result["said"]) == 1 and result["said"][0].startswith("W&B: stopped (")
    assert result["logging_seconds"] < 0.5 and result["finish_seconds"] < 25
    second, said_by_second = result["second"]
    own = "the next run starts its own service"
    assert second not in (None, result["id"]) and said_by_second == [], own
    assert result["exit_seconds"] < 10 and "Traceback" not in result["stderr"]
