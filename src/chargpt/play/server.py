"""What the page asks: models, continuations as server-sent events, a look inside, surprise."""

import asyncio
import collections
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chargpt.costs import count_parameters
from chargpt.errors import ConfigError, require
from chargpt.play import look, requests
from chargpt.play.engine import STOPPING, Engine, Event, Player, Text
from chargpt.play.guard import Guard, refusal
from chargpt.run.sample import SampleOptions

PAGE = Path(__file__).with_name("page")
SCRIPTS = "cards characters chart frame heat inspector models play stream surprise tools"
FILES = {"/": "index.html", "/play.css": "play.css"}
FILES |= {f"/{name}.js": f"{name}.js" for name in SCRIPTS.split()}
MAX_BODY = 1 << 17  # bytes of a request
BODY_SECONDS = 10.0  # in which all of it must come
MAX_LOOKS = 32  # questions that wait for a look into a model
MAX_CONNECTIONS = 512
LAST = ("end", "error")  # events after which a text has no more
GRACE = 5  # seconds that streams have to end when the server stops


class Busy(Exception):
    """Too much at once; one line that says of what."""


class Streams:
    """How many streams there are, in total and of each client."""

    def __init__(self, most: int, most_per_client: int):
        self.most, self.most_per_client = most, most_per_client
        self.running: collections.Counter[str] = collections.Counter()

    def take(self, client: str, number: int) -> None:
        """Busy if these would be too many."""
        for present, most, whose in (
            (self.running[client], self.most_per_client, "of one client"),
            (self.running.total(), self.most, "in all"),
        ):
            if present + number > most:
                raise Busy(f"{most} streams {whose} are allowed, {present} are running; stop one")
        self.running[client] += number

    def give_back(self, client: str) -> None:
        self.running[client] -= 1
        self.running = +self.running  # forgets clients that have none


class Conversation(StreamingResponse):
    """A prompt continued by some models: their events in one stream, until the last has ended.

    If the reader goes away, the texts are cancelled.
    """

    def __init__(
        self, players: dict[int, Player], options: SampleOptions, running: set["Conversation"]
    ):
        super().__init__(self._events(), media_type="text/event-stream")
        self._running = running  # all conversations that are
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.texts: dict[int, Text] = {}  # that have not ended
        self.on_end: Callable[[], None] = lambda: None  # of each text
        self._refused: list[Event] = []
        for number, player in players.items():
            try:
                self.texts[number] = Text(player, options, self._emitter(number))
            except ConfigError as error:  # a character that it does not know
                self._refused.append({"event": "error", "model": number, "error": str(error)})
        if not self.texts:
            raise ConfigError(self._refused[0]["error"])
        self._number = len(self.texts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._running.add(self)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.discard(self)
            for number, text in list(self.texts.items()):
                text.cancelled = True
                self._end(number)

    def stop(self) -> None:
        """End all texts with a last event, whatever the engine is doing."""
        for number, text in list(self.texts.items()):
            text.cancelled = True
            self._take(number, STOPPING)

    async def _events(self) -> AsyncIterator[bytes]:
        for event in self._refused:
            yield as_sent(event)
        ended = 0
        while ended < self._number:
            event = await self._queue.get()
            ended += event["event"] in LAST
            yield as_sent(event)

    def _emitter(self, number: int) -> Callable[[Event], None]:
        """For the engine's thread."""

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._take, number, event)

        return emit

    def _take(self, number: int, event: Event) -> None:
        """An event for the reader; the last of a text counts, however slowly it is read."""
        if event["event"] in LAST:
            self._end(number)
        self._queue.put_nowait({**event, "model": number})

    def _end(self, number: int) -> None:
        if self.texts.pop(number, None) is not None:
            self.on_end()


def as_sent(event: Event) -> bytes:
    """A server-sent event."""
    data = {name: value for name, value in event.items() if name != "event"}
    return f"event: {event['event']}\ndata: {json.dumps(data)}\n\n".encode()


class Answers:
    """What the page is answered."""

    def __init__(self, players: list[Player], engine: Engine, streams: Streams, prompt: str):
        self.players, self.engine, self.streams = players, engine, streams
        defaults = {"prompt": prompt} | {
            name: field.default
            for name, field in requests.Continue.model_fields.items()
            if not field.is_required()
        }
        self.overview = {
            "models": [describe(number, player) for number, player in enumerate(players)],
            "limits": requests.LIMITS,
            "defaults": defaults,
        }
        self.running: set[Conversation] = set()
        self.looking = asyncio.Semaphore(1)  # one at a time: streams go on beside it
        self.looks = 0

    def routes(self) -> list[Route]:
        asked = {"/continue": self.proceed, "/attention": self.attend, "/surprise": self.surprise}
        posts = [Route(path, answer, methods=["POST"]) for path, answer in asked.items()]
        files = [Route(path, deliver(name)) for path, name in FILES.items()]
        return [*files, Route("/models", self.models), *posts]

    async def models(self, _: Request) -> Response:
        return JSONResponse(self.overview)

    async def proceed(self, request: Request) -> Response:
        asked = requests.read(requests.Continue, await body_of(request))
        drawn = asked.model_dump(exclude={"models", "length"})
        options = SampleOptions(num_chars=asked.length, **drawn)
        conversation = Conversation(self.choose(asked.models), options, self.running)
        client = request.client.host if request.client else ""
        self.streams.take(client, len(conversation.texts))
        conversation.on_end = lambda: self.streams.give_back(client)
        for text in conversation.texts.values():
            self.engine.submit(text)
        return conversation

    async def attend(self, request: Request) -> Response:
        asked = requests.read(requests.Attention, await body_of(request))
        (player,) = self.choose([asked.model]).values()
        async with self.look():
            return JSONResponse(await run_in_threadpool(look.attention, player, asked.text))

    async def surprise(self, request: Request) -> Response:
        asked = requests.read(requests.Surprise, await body_of(request))
        answers = []
        for number, player in self.choose(asked.models).items():
            async with self.look():
                try:
                    answer = await run_in_threadpool(look.surprise, player, asked.text)
                except ConfigError as error:  # a character that it does not know
                    answer = {"error": str(error)}
            answers.append({"model": number, **answer})
        require(any("nats" in answer for answer in answers), str(answers[0].get("error")))
        return JSONResponse({"models": answers})

    def choose(self, numbers: list[int]) -> dict[int, Player]:
        for number in numbers:
            known = 0 <= number < len(self.players)
            require(known, f"models: there is no model {number}; GET /models lists them")
        return {number: self.players[number] for number in numbers}

    @contextlib.asynccontextmanager
    async def look(self) -> AsyncIterator[None]:
        if self.looks >= MAX_LOOKS:
            raise Busy(f"{MAX_LOOKS} questions are waiting for an answer; ask again later")
        self.looks += 1
        try:
            async with self.looking:
                yield
        finally:
            self.looks -= 1


def describe(number: int, player: Player) -> dict[str, Any]:
    """What the page says of a model before it has written anything."""
    record, model = player.run.record, player.run.model
    config = record.config
    weights, bias = look.offers(player)
    return {
        "id": number,
        "name": player.name,
        "run": str(record.path),
        "type": config.model.mha_type.name,
        "loss": record.number("best/val_loss"),
        "parameters": sum(count_parameters(model).values()),
        "context": player.context,
        "cache_bytes_per_token": player.cache_bytes(1),
        "layers": config.model.num_layers,
        "heads": config.model.num_heads,
        "has_weights": weights,
        "has_bias": bias,
        "chosen": number < requests.MAX_MODELS,
    }


def deliver(name: str) -> Callable[[Request], Awaitable[Response]]:
    """A file of the page: none that a browser names is ever opened."""

    async def answer(_: Request) -> Response:
        return FileResponse(PAGE / name)

    return answer


async def body_of(request: Request) -> bytes:
    """The body of a request, refused if it is large, or takes long."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"the request has more than {MAX_BODY:,} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the request took more than {BODY_SECONDS:g} s") from None
    return body


def make_app(answers: Answers, hosts: frozenset[str], token: str | None) -> Starlette:
    """The program that answers; `hosts` and `token` as `Guard` has them."""

    def refuse(status: int) -> Callable[[Request, Exception], Response]:
        return lambda _, error: refusal(status, str(error))

    def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(error.status_code, error.detail)

    return Starlette(
        routes=answers.routes(),
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={ConfigError: refuse(400), Busy: refuse(429), HTTPException: http_error},
    )


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, which end all streams with a last event."""

    def __init__(self, app: Starlette, answers: Answers):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self.answers = answers

    async def shutdown(self, sockets: Any = None) -> None:
        for conversation in list(self.answers.running):
            conversation.stop()
        await super().shutdown(sockets)
