"""`chargpt play`: which models, at which address."""

import contextlib
import dataclasses
import ipaddress
import secrets
import socket

from chargpt.checkpoint import Which, file_of, find_run
from chargpt.config import require_at_least, require_between
from chargpt.errors import ConfigError, note, require
from chargpt.run import trained
from chargpt.run.cache import kept_executables
from chargpt.run.directory import Record, find_runs, read_run
from chargpt.study.arms import name_arms, one_of_each

MAX_RUNS = 12  # on one page


@dataclasses.dataclass
class PlayOptions:
    """A page on which trained models write side by side, and can be looked into."""

    paths: tuple[str, ...] = ()  # run directories, folders of them, globs; by default the newest
    checkpoint: Which = Which.best  # best | last
    prompt: str = "ROMEO:\n"  # what the page begins with
    host: str = "127.0.0.1"  # another one, such as 0.0.0.0, is served with a token
    port: int = 8000  # 0 = any that is free
    streams: int = 64  # at once, each by one model
    streams_per_client: int = 24  # of them for one address
    slots: int = 64  # of each model's cache; other texts wait

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["streams", "streams_per_client", "slots"])
        require_between("", self, 0, 65535, ["port"], closed="low high")
        require(self.prompt != "", "prompt=: is empty; write a text for the models to continue")


@kept_executables(note)
def play(options: PlayOptions) -> None:
    """Serve the page until a signal ends it."""
    try:
        from chargpt.play import server
        from chargpt.play.engine import Engine, Player
    except ModuleNotFoundError as error:
        problem = f"play: needs {error.name}, which is not installed"
        raise ConfigError(f"{problem}; write pip install 'chargpt[play]'") from None
    bound = listen(options.host, options.port)
    with contextlib.closing(bound):
        records = choose(options)
        players = []
        for name, record in zip(name_arms(records), records, strict=True):
            players.append(Player(name, trained.load(record.path, options.checkpoint.name)))
            note(f"{name}: {record.path}, best validation loss {record.best_loss:.4f}")
        streams = server.Streams(options.streams, options.streams_per_client)
        port, token = bound.getsockname()[1], None
        if not is_loopback(options.host):
            token = secrets.token_urlsafe(16)
        hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))
        with Engine(players, options.slots) as engine:
            answers = server.Answers(players, engine, streams, options.prompt)
            app = server.make_app(answers, hosts, token)
            print(address(options.host, port, token), flush=True)
            note("Ctrl-C ends it")
            server.Server(app, answers).run([bound])


def choose(options: PlayOptions) -> list[Record]:
    """Of runs that differ only in their seed, the best; by default those of the newest sweep."""
    places = options.paths
    if not places:
        newest = find_run(None, options.checkpoint)
        sweep = newest.parent
        places = (str(sweep if (sweep / "multirun.yaml").is_file() else newest),)
    found = [path for path in find_runs(places) if file_of(path, options.checkpoint).is_file()]
    records = list(map(read_run, found))
    require(bool(records), f"{' '.join(places)}: no run there has a checkpoint; train one first")
    chosen = one_of_each(records, lambda record: record.best_loss)
    if len(chosen) > MAX_RUNS:
        note(f"{len(chosen)} models: only the first {MAX_RUNS} are on the page")
    return chosen[:MAX_RUNS]


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address; ConfigError if it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        cause = str(error.strerror).partition(" (")[0]  # what follows is the address
        reason = f"cannot be listened to ({cause})"
        another = "write port=0 for any that is free, or another host"
        raise ConfigError(f"host={host} port={port}: {reason}; {another}") from None


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
