"""A server for models with random weights on the loopback interface, and what to expect of it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from players import PROMPT, alone, make_player

from chargpt.config import AttentionType
from chargpt.play import command, server
from chargpt.play.engine import Engine, Event, Player
from chargpt.run.sample import SampleOptions

ASKED = {"models": [0], "prompt": PROMPT, "length": 20, "temperature": 0.8, "top_k": None}
ASKED |= {"top_p": None, "seed": 0}
JSON = {"Content-Type": "application/json"}
SECONDS = 60
NAMES = [kind.name for kind in AttentionType]
OTHER = len(NAMES)  # a model that knows few characters


def usual_players() -> list[Player]:
    """A model of every type, and OTHER."""
    return [*map(make_player, NAMES), make_player(NAMES[0], alphabet="abc")]


class Site:
    """A server with some models, and a browser's part of the conversation."""

    def __init__(self, players: Sequence[Player] = (), token: str | None = None, **limits: int):
        players = list(players) or usual_players()
        self.engine = Engine(players, max_slots=limits.pop("slots", 64))
        self.streams = server.Streams(**{"most": 64, "most_per_client": 64} | limits)
        self.socket = command.listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        hosts = frozenset({f"127.0.0.1:{self.port}"})
        answers = server.Answers(players, self.engine, self.streams, "ROMEO:")
        self.server = server.Server(server.make_app(answers, hosts, token), answers)

    def __enter__(self) -> "Site":
        self.engine.__enter__()
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        self.engine.__exit__()
        assert not self.thread.is_alive()

    @contextlib.contextmanager
    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] = JSON
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def answer(self, *asked: Any, **options: Any) -> tuple[int, Any, Any]:
        """(status, JSON, headers)."""
        with self.ask(*asked, **options) as response:
            return response.status, json.loads(response.read()), response.headers

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        return self.answer("POST", path, json.dumps(fields).encode())[:2]

    @contextlib.contextmanager
    def reading(self, **fields: Any) -> Iterator[http.client.HTTPResponse]:
        """A continuation whose reader goes away at the end of the block."""
        with self.ask("POST", "/continue", json.dumps(ASKED | fields).encode()) as response:
            yield response

    def proceed(self, **fields: Any) -> list[Event]:
        """All events of a continuation."""
        with self.reading(**fields) as response:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return list(events(response))


def events(response: Iterable[bytes]) -> Iterator[Event]:
    """Server-sent events, as the specification's parser has them."""
    fields: dict[str, str] = {}
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        else:
            yield {"event": fields["event"], **json.loads(fields["data"])}
            fields = {}


def sample(player: Player | str, **options: Any) -> str:
    """What `chargpt sample` writes."""
    player = make_player(player) if isinstance(player, str) else player
    return alone(player, SampleOptions(**options))


def wait_until(condition: Any, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
