"""Texts from files and from a server: what is read, what is refused, what is kept in the cache."""

import contextlib
import functools
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import time_limit

from chargpt import texts
from chargpt.config import DatasetConfig, DatasetName, Sampling
from chargpt.errors import ConfigError
from chargpt.texts import download, read_text

TEXT = "To be, or not to be: that is the question.\n" * 4


def from_file(path: Path | str) -> str:
    return read_text(DatasetConfig(DatasetName.file, str(path), 4, Sampling.random, 0.25))


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path | str) -> str:
    with time_limit(10), pytest.raises(ConfigError) as error:
        from_file(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- texts from files


def test_a_missing_file_and_a_folder_and_an_empty_file_are_refused(tmp_path):
    assert (
        refusal(tmp_path / "none.txt")
        == f"dataset.filepath={tmp_path / 'none.txt'}: there is no such file"
    )
    assert refusal(tmp_path) == f"dataset.filepath={tmp_path}: is not a regular file"
    assert refusal(write(tmp_path, b"")) == f"dataset.filepath={tmp_path / 'text.txt'}: is empty"
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert refusal(tmp_path / "link").startswith(f"dataset.filepath={tmp_path / 'link'}: ")


@pytest.mark.parametrize(
    "path", ["x" * 5000, "~nobody-of-this-name/text.txt", "a\0b", "", "/dev/null", "/dev/zero"]
)
def test_impossible_paths_are_refused(path):
    assert refusal(path).startswith("dataset.filepath=")


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, TEXT)
    assert from_file("~/text.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"abc\xff" + b"d" * 50, 3),
        (TEXT.encode("utf-16"), 0),
        (b"caf\xe9 " * 9, 3),
        (b"ab" * 9 + b"\xe2\x82", 18),
    ],
)
def test_text_that_is_not_utf_8_is_refused_with_the_position(tmp_path, content, byte):
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"dataset.filepath={path}: is not UTF-8 text (byte {byte}); ")


def test_only_a_byte_order_mark_at_the_beginning_is_left_out(tmp_path):
    path = write(tmp_path, "\ufeff" + TEXT + "\ufeff" + TEXT)
    assert from_file(path) == TEXT + "\ufeff" + TEXT


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert (
        refusal(tmp_path / "pipe") == f"dataset.filepath={tmp_path / 'pipe'}: is not a regular file"
    )


def test_a_huge_file_is_refused_without_being_read(tmp_path, monkeypatch):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    message = "has 1,099,511,627,776 bytes; texts may have at most 1,073,741,824"
    assert refusal(tmp_path / "huge").endswith(message)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def deny(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    path = write(tmp_path, TEXT)
    assert refusal(path) == f"dataset.filepath={path}: cannot be read (Permission denied)"


# --- the download

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with `answer`, and counts them."""

    def __init__(self, answer: Answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests = answer, 0
        self.url = f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        pass


def send_text(
    handler: http.server.BaseHTTPRequestHandler,
    text: bytes = TEXT.encode(),
    promised: int | None = None,
) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(text) if promised is None else promised))
    handler.end_headers()
    handler.wfile.write(text)


def send_half_a_chunk(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\nTo be")


FAULTS: dict[str, Answer] = {
    "not found": lambda handler: handler.send_error(404),
    "other text": lambda handler: send_text(handler, b"<html>Please log in</html>"),
    "nothing": lambda handler: send_text(handler, b""),
    "cut off": lambda handler: send_text(handler, TEXT.encode()[:50], len(TEXT)),
    "cut off in a chunk": send_half_a_chunk,
    "no answer": lambda handler: None,
    "not HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n\r\n"),
    "odd length": lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nTo be"
    ),
    "endless redirection": lambda handler: handler.wfile.write(
        b"HTTP/1.1 302 Found\r\nLocation: /input.txt\r\n\r\n"
    ),
}


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[Answer], Server]]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> Server:
            server = stack.enter_context(Server(answer))
            stack.callback(server.shutdown)
            answering = functools.partial(server.serve_forever, poll_interval=0.01)
            threading.Thread(target=answering, daemon=True).start()
            return server

        yield start


def send_without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + TEXT.encode())


DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.parametrize("answer", [send_text, send_without_length])
def test_a_text_is_fetched_once_and_then_read_from_the_cache(serve, tmp_path, answer):
    server, path = serve(answer), tmp_path / "cache" / "chargpt" / "input.txt"
    for _ in range(2):
        assert download(server.url, DIGEST, path) == TEXT.encode()
    assert server.requests == 1
    assert [file.name for file in path.parent.iterdir()] == ["input.txt"]
    assert path.read_bytes() == TEXT.encode()


def test_a_download_appears_complete_or_not_at_all(serve, tmp_path, monkeypatch):
    path, moves = tmp_path / "input.txt", []

    def move(source: str, target: Path) -> None:
        assert not path.exists() and Path(target) == path
        assert Path(source).parent == tmp_path and Path(source).read_bytes() == TEXT.encode()
        moves.append(source)
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", move)
    download(serve(send_text).url, DIGEST, path)
    assert len(moves) == 1 and path.read_bytes() == TEXT.encode()


@pytest.mark.parametrize("damage", [b"", TEXT.encode()[:-1], TEXT.encode() + b"x"])
def test_a_damaged_cache_is_fetched_again(serve, tmp_path, damage, capsys):
    server, path = serve(send_text), write(tmp_path, damage)
    assert download(server.url, DIGEST, path) == TEXT.encode()
    assert server.requests == 1 and path.read_bytes() == TEXT.encode()
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_is_one_line_and_leaves_nothing(serve, tmp_path, fault):
    with time_limit(10), pytest.raises(ConfigError) as error:
        download(serve(FAULTS[fault]).url, DIGEST, tmp_path / "input.txt")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("dataset.name=tinyshakespeare: ")
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_the_other_two_choices_are_named(tmp_path, monkeypatch):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        with pytest.raises(ConfigError) as error:
            download(url, DIGEST, tmp_path / "cache" / "input.txt")
    text = str(error.value)
    assert "refused" in text and "dataset.name=shakespeare" in text
    assert "dataset.name=file dataset.filepath=PATH" in text
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("tmp*"))


def test_a_damaged_cache_stays_if_the_download_fails(serve, tmp_path):
    path = write(tmp_path, b"half")
    with pytest.raises(ConfigError):
        download(serve(FAULTS["other text"]).url, DIGEST, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"half"


def test_an_endless_download_is_abandoned(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_BYTES", 1000)
    endless = serve(functools.partial(send_text, text=b"x" * 200_000))
    with time_limit(10), pytest.raises(ConfigError, match="more than 1,000 bytes"):
        download(endless.url, DIGEST, tmp_path / "input.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_created_is_one_line(serve, tmp_path):
    blocked = write(tmp_path, b"a file, not a folder")
    with pytest.raises(ConfigError) as error:
        download(serve(send_text).url, DIGEST, blocked / "chargpt" / "input.txt")
    assert "\n" not in str(error.value) and str(blocked) in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(serve, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        download(serve(send_text).url, DIGEST, tmp_path / "input.txt")
    assert list(tmp_path.iterdir()) == []


def test_tinyshakespeare_is_downloaded_into_the_cache_folder(serve, tmp_path, monkeypatch):
    server = serve(send_text)
    monkeypatch.setattr(texts, "TINYSHAKESPEARE_URL", server.url)
    monkeypatch.setattr(texts, "TINYSHAKESPEARE_SHA256", DIGEST)
    config = DatasetConfig(DatasetName.tinyshakespeare, None, 4, Sampling.random, 0.25)
    for folder, variable in ((tmp_path / "xdg", "XDG_CACHE_HOME"), (tmp_path / "home", "HOME")):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, str(folder))
        assert read_text(config) == TEXT
    assert server.requests == 2
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"xdg/chargpt/tinyshakespeare.txt", "home/.cache/chargpt/tinyshakespeare.txt"}
    assert found == expected


def test_tinyshakespeare_is_fetched_by_https_and_verified():
    assert texts.TINYSHAKESPEARE_URL.startswith("https://")
    assert len(texts.TINYSHAKESPEARE_SHA256) == 64
