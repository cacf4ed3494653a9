"""The server of `chargpt play`: what it answers, whom it refuses, what it survives."""

import contextlib
import json
import random
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import programs
import pytest
from fake_runs import make_checkpoint
from players import ALPHABET, CONTEXT, PROMPT
from serving import ASKED, JSON, NAMES, OTHER, SECONDS, Site, events, sample, wait_until

from chargpt import cli
from chargpt.play import command, requests, server
from chargpt.play.engine import Batch, Event


def written(told: list[Event], model: int) -> str:
    own = [event for event in told if event["model"] == model]
    assert own[-1]["event"] == "end" and own[-1]["reason"] == "length", own[-1]
    return "".join(event["text"] for event in own if event["event"] == "text")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def test_the_page_and_its_models(site: Site) -> None:
    assert set(server.FILES.values()) == {file.name for file in server.PAGE.iterdir()}
    kinds = {".html": "text/html", ".css": "text/css", ".js": "javascript"}
    for path, name in server.FILES.items():
        kind = kinds[Path(name).suffix]
        with site.ask("GET", path, headers={}) as response:
            assert response.status == 200 and kind in response.headers["Content-Type"]
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert len(response.read()) > 1000
    status, overview, headers = site.answer("GET", "/models")
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
    models = overview["models"]
    assert [model["name"] for model in models] == [*NAMES, NAMES[0]]
    assert [model["chosen"] for model in models] == [True] * 6 + [False]
    assert all(model["context"] == CONTEXT for model in models)
    assert overview["defaults"] | {"prompt": "ROMEO:"} == overview["defaults"]
    assert overview["limits"]["length"] == requests.MAX_LENGTH


def test_all_types_stream_at_once_what_chargpt_sample_writes(site: Site) -> None:
    numbers = list(range(len(NAMES)))
    told = site.proceed(models=numbers, seed=3, length=30)
    texts = [written(told, number) for number in numbers]
    assert texts == [sample(name, prompt=PROMPT, num_chars=30, seed=3) for name in NAMES]
    assert len(set(texts)) > 1


def test_a_character_that_one_model_does_not_know_is_its_own_error(site: Site) -> None:
    told = site.proceed(models=[0, OTHER], prompt="abG")
    assert written(told, 0) == sample(NAMES[0], prompt="abG", num_chars=20)
    (error,) = [event for event in told if event["model"] == OTHER]
    assert error["event"] == "error" and "not in the vocabulary: 'G'" in error["error"]
    status, answer = site.post("/continue", **ASKED | {"models": [OTHER], "prompt": "G"})
    assert status == 400 and "not in the vocabulary: 'G'" in answer["error"]
    status, answer = site.post("/surprise", models=[0, OTHER], text="abG")
    assert status == 200 and len(answer["models"][0]["nats"]) == 3
    assert "not in the vocabulary: 'G'" in answer["models"][1]["error"]
    assert site.streams.running.total() == 0


def test_a_look_inside_is_answered_while_texts_are_written(site: Site) -> None:
    with site.reading(length=2000) as response:
        next(events(response))
        status, answer = site.post("/attention", model=0, text="GABE")
    layers, heads = len(answer["weights"]), len(answer["weights"][0])
    assert status == 200 and (layers, heads, len(answer["weights"][0][0])) == (1, 4, 4)


# --- who goes away, and who asks for too much


def test_a_reader_who_goes_away_frees_its_slot() -> None:
    with Site(slots=1) as site:
        with site.reading(length=2000) as first:
            assert next(events(first))["event"] == "prompt"
            with site.reading(length=2000) as second:
                assert next(events(second))["event"] == "waiting"
            wait_until(lambda: site.streams.running.total() == 1)
        wait_until(lambda: site.streams.running.total() == 0)
        assert written(site.proceed(length=3), 0) == sample(NAMES[0], prompt=PROMPT, num_chars=3)


def test_streams_are_bounded_in_all_and_for_each_client() -> None:
    with Site(most=3, most_per_client=2) as site:
        status, answer = site.post("/continue", **ASKED | {"models": [0, 1, 2]})
        assert status == 429 and "2 streams of one client are allowed" in answer["error"]
        with site.reading(length=2000, models=[0, 1]) as first:
            next(events(first))
            status, answer = site.post("/continue", **ASKED)
            assert status == 429 and "2 are running; stop one" in answer["error"]
        site.streams.running["another"] = 2
        wait_until(lambda: site.streams.running.total() == 2)
        status, answer = site.post("/continue", **ASKED | {"models": [0, 1]})
        assert status == 429 and "3 streams in all are allowed" in answer["error"]
        assert site.proceed(length=1)[-1]["event"] == "end"


def test_fifty_readers_at_once_get_their_own_text_each_and_leave_nothing_behind() -> None:
    asked = [{"models": [i % len(NAMES)], "seed": i, "length": 40} for i in range(50)]
    with Site() as site, ThreadPoolExecutor(len(asked)) as pool:
        wait_until(lambda: not any(batch.cold for batch in site.engine.batches.values()))

        def follow(fields: dict[str, Any]) -> str:
            return written(site.proceed(**fields), fields["models"][0])

        texts = list(pool.map(follow, asked))
        wait_until(lambda: site.streams.running.total() == 0)
        kept = len(jax.live_arrays())
        assert list(pool.map(follow, asked)) == texts
        assert len(jax.live_arrays()) <= kept
    for fields, text in zip(asked, texts, strict=True):
        name = NAMES[fields["models"][0]]
        assert text == sample(name, prompt=PROMPT, num_chars=40, seed=fields["seed"])


def test_a_server_that_stops_ends_texts_also_while_the_engine_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may compile for longer than streams have to end."""
    draw, at_work, go_on = Batch.draw, threading.Event(), threading.Event()

    def slowly(batch: Batch, slots: list[Any], cache: Any) -> Any:
        if any(slots):
            at_work.set()
            assert go_on.wait(SECONDS)
        return draw(batch, slots, cache)

    monkeypatch.setattr(Batch, "draw", slowly)
    with Site() as site, site.reading(models=[0, 1]) as response:
        assert at_work.wait(SECONDS)
        site.server.should_exit = True
        told = list(events(response))
        go_on.set()
    assert [(event["model"], event["reason"]) for event in told] == [
        (0, "stopping"), (1, "stopping")
    ]  # fmt: skip


# --- bad requests


BAD = [
    ({"models": []}, "models: List should have at least 1 item"),
    ({"models": [0] * 7}, "models: List should have at most 6 items"),
    ({"models": [99]}, "there is no model 99"),
    ({"models": [-1]}, "there is no model -1"),
    ({"models": [True]}, "models.0: Input should be a valid integer"),
    ({"models": "0"}, "models: Input should be a valid array"),
    ({"prompt": ""}, "prompt: String should have at least 1 character"),
    ({"prompt": "a" * 10_001}, "prompt: String should have at most 10000 characters"),
    ({"prompt": 3}, "prompt: Input should be a valid string"),
    ({"prompt": "?"}, "not in the vocabulary: '?'"),
    ({"prompt": "\ud800"}, "the request: Invalid JSON"),
    ({"length": 0}, "length: Input should be greater than or equal to 1"),
    ({"length": 2001}, "length: Input should be less than or equal to 2000"),
    ({"length": 1.5}, "length: Input should be a valid integer"),
    ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    ({"temperature": 1e999}, "temperature: Input should be"),
    ({"temperature": "1"}, "temperature: Input should be a valid number"),
    ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
    ({"top_p": 0}, "top_p: Input should be greater than 0"),
    ({"seed": 2**31}, "seed: Input should be less than"),
    ({"file": "/etc/passwd"}, "file: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_field_is_answered_with_one_line(site: Site, fields, message: str) -> None:
    status, answer = site.post("/continue", **ASKED | fields)
    assert 400 <= status < 500 and message in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("GET", "/page/index.html", None, {}, 404),
        ("GET", "/continue", None, {}, 405),
        ("DELETE", "/models", None, {}, 405),
        ("POST", "/continue", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/continue", b"{", JSON, 400),
        ("POST", "/continue", b"", JSON, 400),
        ("POST", "/continue", b"[" * 100_000, JSON, 400),
        ("POST", "/continue", b"\xff\xfe", JSON, 400),
        ("POST", "/continue", b" " * (server.MAX_BODY + 1), JSON, 413),
        ("POST", "/attention", b'{"model": 0, "text": "' + b"a" * 17 + b'"}', JSON, 400),
        ("POST", "/surprise", b'{"models": [0], "text": "a"}', JSON, 400),
    ],
)
def test_a_bad_request_is_answered_with_one_line(
    site: Site, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    found, answer, received = site.answer(method, path, body, headers)
    assert found == status and answer["error"] and "\n" not in answer["error"]
    assert "default-src 'none'" in received["content-security-policy"]


def test_two_hundred_malformed_requests_harm_nothing(site: Site) -> None:
    """Bytes of good requests changed at random; whatever is answered, the next one is served."""
    dice = random.Random(0)
    body = json.dumps(ASKED).encode()
    head = f"POST /continue HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    statuses = set()
    for number in range(200):
        request = bytearray(head + body)
        for _ in range(dice.randint(1, 6)):
            place = dice.randrange(len(request) if number % 2 else len(head))
            match dice.randrange(3):
                case 0:
                    request[place] = dice.randrange(256)
                case 1:
                    del request[place : place + dice.randint(1, 20)]
                case 2:
                    request[place:place] = dice.randbytes(dice.randint(1, 20))
            request = request or bytearray(b"x")
        with socket.create_connection(("127.0.0.1", site.port), SECONDS) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                received = connection.makefile("rb").readline().split()
                statuses.add(int(received[1]) if received else 0)
    assert not any(status >= 500 for status in statuses) and 400 in statuses
    wait_until(lambda: site.streams.running.total() == 0)
    assert written(site.proceed(), 0) == sample(NAMES[0], prompt=PROMPT, num_chars=20)


# --- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),  # the port is part of it
        ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 200),
    ],
)
def test_pages_of_others_are_refused(site: Site, headers: dict[str, str], status: int) -> None:
    headers = {name: text.replace("{port}", str(site.port)) for name, text in headers.items()}
    assert site.answer("GET", "/models", None, headers)[0] == status


def test_on_a_network_a_token_opens_the_page_and_a_cookie_keeps_it() -> None:
    with Site(token="secret") as site:
        elsewhere = {"Host": "machine.example:8000"}
        for path, cookie in (
            ("/", ""),
            ("/models", ""),
            ("/models?token=secret", ""),
            ("/?token=wrong", ""),
            ("/models", f"chargpt-{site.port}=wrong"),
            ("/models", "=;=\xff"),
        ):
            status, answer, _ = site.answer("GET", path, None, elsewhere | {"Cookie": cookie})
            assert status == 401 and "the address that chargpt play printed" in answer["error"]
        with site.ask("GET", "/?token=secret", headers=elsewhere) as response:
            assert (response.status, response.headers["Location"]) == (303, "/")
            cookie = response.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        kept = elsewhere | {"Cookie": cookie.partition(";")[0]}
        assert site.answer("GET", "/models", None, kept)[0] == 200
        other = kept | {"Origin": "http://evil.example"}
        assert site.answer("GET", "/models", None, other)[0] == 403


# --- the program


def test_the_program_serves_runs_until_sigterm_which_ends_streams(tmp_path: Path) -> None:
    for name in ("standard", "mqa"):
        kind = f"model.mha_type={name}"
        make_checkpoint(tmp_path / name, kind, alphabet=ALPHABET, scale=0.5)
    process = programs.start("play", tmp_path, "port=0", module=True)
    address = process.stdout.readline().strip()
    site = Site.__new__(Site)
    site.port = int(address.removeprefix("http://127.0.0.1:").rstrip("/"))
    with site.reading(length=2000, models=[0, 1]) as response:
        told = events(response)
        assert next(told)["event"] == "prompt"
        process.send_signal(signal.SIGTERM)
        *_, last = told
    assert (last["event"], last["reason"]) == ("end", "stopping")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGTERM and "Traceback" not in err
    assert "mqa: " in err and "standard: " in err


def test_what_cannot_be_served_is_refused_with_one_line(tmp_path: Path, capsys) -> None:
    with command.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([f"{tmp_path}", "port=0"], "holds no run"),
            ([f"port={port}"], "cannot be listened to (Address already in use)"),
            (["port=70000"], "port=70000: must be a finite number in [0, 65535]"),
            (["streams=0"], "streams=0: must be at least 1"),
            (["host=no.such.host.invalid", "port=0"], "cannot be listened to"),
        ):
            assert cli.run_tool(["play", *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and message in line
