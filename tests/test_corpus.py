"""Texts from files and from a server, the tokenizer, the split, baselines, and what batches and windows are cut out."""

import contextlib
import functools
import hashlib
import http.server
import math
import os
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import time_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt import corpus as module
from chargpt.config import ConfigError, DatasetConfig, DatasetName, Sampling
from chargpt.corpus import CharTokenizer, Corpus, download, epoch_batch, load_corpus, make_windows, sample_batch, shuffled

TEXT = "To be, or not to be: that is the question.\n" * 4


def from_file(path: Path | str, seq_len: int = 4, val_fraction: float = 0.25) -> Corpus:
    return load_corpus(DatasetConfig(DatasetName.file, str(path), seq_len, Sampling.random, val_fraction))


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path | str, **options: float) -> str:
    with time_limit(10), pytest.raises(ConfigError) as error:
        from_file(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the tokenizer


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(text):
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens.dtype == np.int32 and tokens.shape == (len(text),)
    assert len(tokenizer) == len(set(text)) and list(tokenizer.vocabulary) == sorted(set(text))


@pytest.mark.parametrize(
    "text", ["", "a\r\nb\rc\n", "\0\1\x7f\x85", "\N{GRINNING FACE}\U0001d538e\u0301é", "\ufeff\u2028\U0010ffff\ud7ff"]
)
def test_characters_are_code_points_and_none_is_special(text):
    tokenizer = CharTokenizer.from_text(text)
    assert len(tokenizer) == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(jnp.asarray(tokenizer.encode(text))) == text


def test_tokens_are_places_in_the_sorted_vocabulary():
    tokenizer = CharTokenizer.from_text("cab b")
    assert tokenizer.vocabulary == " abc"
    np.testing.assert_array_equal(tokenizer.encode("abc "), [1, 2, 3, 0])


@given(st.text(), st.text(min_size=1))
def test_unknown_characters_are_named_each_once(known, text):
    tokenizer = CharTokenizer.from_text(known)
    missing = sorted(set(text) - set(known))
    if not missing:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return
    with pytest.raises(ValueError) as error:
        tokenizer.encode(text)
    assert str(error.value) == f"not in the vocabulary: {' '.join(map(repr, missing))}"


def test_a_byte_that_no_terminal_could_decode_is_an_unknown_character():
    with pytest.raises(ValueError, match=r"not in the vocabulary: '\\udcff'"):
        CharTokenizer.from_text("abc").encode("a\udcff")


# --- texts from files


def test_a_missing_file_and_a_folder_and_an_empty_file_are_refused(tmp_path):
    assert refusal(tmp_path / "none.txt") == f"dataset.filepath={tmp_path / 'none.txt'}: there is no such file"
    assert refusal(tmp_path) == f"dataset.filepath={tmp_path}: is not a regular file"
    assert refusal(write(tmp_path, b"")) == f"dataset.filepath={tmp_path / 'text.txt'}: is empty"
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert refusal(tmp_path / "link").startswith(f"dataset.filepath={tmp_path / 'link'}: ")


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/text.txt", "a\0b", "", "/dev/null", "/dev/zero"])
def test_paths_that_cannot_be_are_refused(path):
    assert refusal(path).startswith("dataset.filepath=")


def test_a_home_folder_is_spelled_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, TEXT)
    assert len(from_file("~/text.txt").train) == len(TEXT) * 3 // 4


@pytest.mark.parametrize(
    ("content", "byte"),
    [(b"abc\xff" + b"d" * 50, 3), (TEXT.encode("utf-16"), 0), (b"caf\xe9 " * 9, 3), (b"ab" * 9 + b"\xe2\x82", 18)],
)
def test_what_is_not_utf_8_is_refused_with_the_place(tmp_path, content, byte):
    path = write(tmp_path, content)
    assert refusal(path).startswith(f"dataset.filepath={path}: is not UTF-8 text (byte {byte}); ")


def test_a_byte_order_mark_is_left_out_at_the_beginning_alone(tmp_path):
    corpus = from_file(write(tmp_path, "\ufeff" + TEXT + "\ufeff" + TEXT))
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == TEXT + "\ufeff" + TEXT


@pytest.mark.parametrize("content", ["a" * 100, "\ufeff", "\n"])
def test_a_text_of_one_character_is_refused_by_its_name(tmp_path, content):
    path = write(tmp_path, content)
    text = refusal(path)
    assert "fewer than two different characters" in text and str(path) in text


def test_a_text_too_short_for_either_split_is_refused(tmp_path):
    path = write(tmp_path, "ab" * 10)
    assert "dataset.seq_len=5: the validation split has only 5 characters" in refusal(path, seq_len=5, val_fraction=0.25)
    assert "dataset.seq_len=5: the training split has only 5 characters" in refusal(path, seq_len=5, val_fraction=0.75)
    assert "dataset.seq_len=4: the validation split has only 0 characters" in refusal(path, seq_len=4, val_fraction=1e-6)
    for seq_len, val_fraction in ((4, 0.25), (4, 0.75), (9, 0.5)):
        corpus = from_file(path, seq_len, val_fraction)
        assert min(len(corpus.train), len(corpus.val)) == seq_len + 1


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"dataset.filepath={tmp_path / 'pipe'}: is not a regular file"


def test_a_huge_file_is_refused_without_being_read(tmp_path, monkeypatch):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    assert "has 1,099,511,627,776 bytes; texts of up to 1,073,741,824 fit" in refusal(tmp_path / "huge")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def deny(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    path = write(tmp_path, TEXT)
    assert refusal(path) == f"dataset.filepath={path}: cannot be read (Permission denied)"


# --- the split and its fingerprint


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_the_split_is_one_cut_and_validation_is_the_end(text, val_fraction):
    content = ("ab" + text).encode()
    text = content.decode("utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_source", lambda _: content)
        try:
            corpus = from_file("any", 1, val_fraction)
        except ConfigError as error:
            assert "dataset.seq_len=1: " in str(error)
            return
    train, val = corpus.tokenizer.decode(corpus.train), corpus.tokenizer.decode(corpus.val)
    assert train + val == text
    assert len(val) == int(len(text) * val_fraction)
    assert corpus.tokenizer == CharTokenizer.from_text(text)


def test_the_fingerprint_is_the_digest_of_the_text(tmp_path):
    for content in (TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), ("é" * 9 + TEXT).encode()):
        assert from_file(write(tmp_path, content)).sha256 == hashlib.sha256(content).hexdigest()


# --- baselines


def test_baselines_are_those_counted_by_hand():
    corpus = Corpus("file", CharTokenizer("ab"), np.array([0, 1, 0], np.int32), np.array([1, 1, 0], np.int32), "")
    assert corpus.baselines == pytest.approx(
        {
            "uniform": math.log(2),
            "unigram": -(math.log(2 / 5) + math.log(3 / 5)) / 2,  # a 2 + 1, b 1 + 1 of 3 + 2; the targets are b, a
            "bigram": -(math.log(1 / 3) + math.log(2 / 3)) / 2,  # after b: a 1 + 1, b 0 + 1 of 1 + 2; the pairs are bb, ba
        },
        rel=1e-12,
    )


def test_baselines_are_smoothed_counts_on_any_text():
    random = np.random.default_rng(0)
    train, val = (
        random.integers(0, 9, 200).astype(np.int32),
        random.integers(0, 10, 50).astype(np.int32),
    )  # 9 is never trained on
    pairs = {(a, b): 1 for a in range(10) for b in range(10)}
    for a, b in zip(train[:-1].tolist(), train[1:].tolist(), strict=True):
        pairs[a, b] += 1
    after = [sum(pairs[a, b] for b in range(10)) for a in range(10)]
    bigram = [math.log(after[a] / pairs[a, b]) for a, b in zip(val[:-1].tolist(), val[1:].tolist(), strict=True)]
    unigram = [math.log((200 + 10) / (1 + (train == b).sum())) for b in val[1:]]
    baselines = Corpus("file", CharTokenizer("abcdefghij"), train, val, "").baselines
    assert baselines == pytest.approx({"uniform": math.log(10), "unigram": np.mean(unigram), "bigram": np.mean(bigram)})


def test_baselines_of_a_large_alphabet_take_memory_for_the_text_not_for_all_pairs():
    size = 3000
    text = np.random.default_rng(0).permutation(size).astype(np.int32)
    corpus = Corpus("file", CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + size)))), text, text[: size // 2], "")
    tracemalloc.start()
    try:
        assert set(corpus.baselines) == {"uniform", "unigram", "bigram"}
        assert tracemalloc.get_traced_memory()[1] < 10e6  # all pairs would be 72 MB
    finally:
        tracemalloc.stop()


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


def send_text(handler: http.server.BaseHTTPRequestHandler, text: bytes = TEXT.encode(), promised: int | None = None) -> None:
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
    "broken off": lambda handler: send_text(handler, TEXT.encode()[:50], len(TEXT)),
    "broken off in a chunk": send_half_a_chunk,
    "no answer": lambda handler: None,
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n\r\n"),
    "odd length": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nTo be"),
    "endless redirection": lambda handler: handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /input.txt\r\n\r\n"),
}


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[Answer], Server]]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> Server:
            server = stack.enter_context(Server(answer))
            stack.callback(server.shutdown)
            threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
            return server

        yield start


def send_without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + TEXT.encode())


DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.parametrize("answer", [send_text, send_without_length])
def test_a_text_is_fetched_once_and_read_from_the_cache_after_that(serve, tmp_path, answer):
    server, path = serve(answer), tmp_path / "cache" / "chargpt" / "input.txt"
    for _ in range(2):
        assert download(server.url, DIGEST, path) == TEXT.encode()
    assert server.requests == 1
    assert [file.name for file in path.parent.iterdir()] == ["input.txt"] and path.read_bytes() == TEXT.encode()


def test_a_download_appears_whole_or_not_at_all(serve, tmp_path, monkeypatch):
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
    assert "\n" not in str(error.value) and str(error.value).startswith("dataset.name=tinyshakespeare: ")
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_the_other_two_choices_are_named(tmp_path, monkeypatch):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(ConfigError) as error:
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt", DIGEST, tmp_path / "cache" / "input.txt")
    text = str(error.value)
    assert "refused" in text and "dataset.name=shakespeare" in text and "dataset.name=file dataset.filepath=PATH" in text
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("tmp*"))


def test_a_damaged_cache_stays_where_the_download_fails(serve, tmp_path):
    path = write(tmp_path, b"half")
    with pytest.raises(ConfigError):
        download(serve(FAULTS["other text"]).url, DIGEST, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"half"


def test_a_text_that_never_ends_is_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with time_limit(10), pytest.raises(ConfigError, match="more than 1,000 bytes"):
        download(serve(functools.partial(send_text, text=b"x" * 200_000)).url, DIGEST, tmp_path / "input.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_one_line(serve, tmp_path):
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
    monkeypatch.setattr(module, "TINYSHAKESPEARE_URL", server.url)
    monkeypatch.setattr(module, "TINYSHAKESPEARE_SHA256", DIGEST)
    config = DatasetConfig(DatasetName.tinyshakespeare, None, 4, Sampling.random, 0.25)
    for folder, variable in ((tmp_path / "xdg", "XDG_CACHE_HOME"), (tmp_path / "home", "HOME")):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, str(folder))
        corpus = load_corpus(config)
        assert (corpus.name, corpus.sha256) == ("tinyshakespeare", DIGEST)
    assert server.requests == 2
    expected = {"xdg/chargpt/tinyshakespeare.txt", "home/.cache/chargpt/tinyshakespeare.txt"}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == expected


def test_the_address_of_tinyshakespeare_is_encrypted():
    assert module.TINYSHAKESPEARE_URL.startswith("https://") and len(module.TINYSHAKESPEARE_SHA256) == 64


# --- batches


@pytest.mark.parametrize("seq_len", [1, 2, 7])
@pytest.mark.parametrize("num_starts", [1, 2, 5])
def test_batches_are_windows_of_the_text_and_every_start_is_reachable(seq_len, num_starts):
    tokens = jnp.arange(seq_len + num_starts)
    inputs, targets = sample_batch(tokens, jax.random.key(0), 200, seq_len)
    assert inputs.shape == targets.shape == (200, seq_len)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + jnp.arange(seq_len))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == set(range(num_starts))
    assert targets.max() == tokens[-1]


def test_a_key_is_a_batch():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, 10_000))
    draw = functools.partial(sample_batch, tokens, batch_size=8, seq_len=16)
    first, again, other = draw(jax.random.key(3)), draw(jax.random.key(3)), draw(jax.random.key(4))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


# --- batches of an epoch


@functools.partial(jax.jit, static_argnums=(3, 4))
def epoch_batches(tokens, key, steps, batch_size, seq_len):
    return jax.vmap(lambda step: epoch_batch(tokens, key, step, batch_size, seq_len))(steps)


def epoch_starts(length: int, seq_len: int, batch_size: int, num_batches: int, seed: int = 0) -> np.ndarray:
    """Where the windows of the first batches begin, one after another; the text is the numbers from 0 on."""
    batches = epoch_batches(jnp.arange(length), jax.random.key(seed), jnp.arange(num_batches), batch_size, seq_len)
    inputs, targets = (np.asarray(part).reshape(-1, seq_len) for part in batches)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(seq_len))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.min() >= 0 and targets.max() < length
    return inputs[:, 0]


@pytest.mark.parametrize(
    ("length", "seq_len", "batch_size"),
    [
        (6, 5, 1),
        (7, 5, 3),
        (10, 5, 4),
        (11, 5, 2),
        (16, 5, 4),
        (2, 1, 3),
        (30, 1, 7),
        (400, 7, 16),
        (121, 3, 1),
        (1000, 4, 300),
    ],
)
def test_an_epoch_reads_every_window_once_and_the_next_one_cuts_and_orders_them_anew(length, seq_len, batch_size):
    room = min(seq_len, length - seq_len)
    windows = (length - room) // seq_len
    size, epochs = windows - windows % math.isqrt(windows), 4
    assert size >= 1 and size > windows * (1 - 1 / math.isqrt(windows))
    num_batches = -(-epochs * size // batch_size)  # batches need not end where an epoch does
    starts = epoch_starts(length, seq_len, batch_size, num_batches)[: epochs * size].reshape(epochs, size)
    cuts = starts.min(axis=1)
    np.testing.assert_array_equal(np.sort(starts, axis=1), cuts[:, None] + seq_len * np.arange(size))
    if room > 3:
        assert len(set(cuts.tolist())) > 1
    if size > 20:
        orders = (starts - cuts[:, None]) // seq_len
        assert len({tuple(order) for order in orders}) == epochs
        assert (np.diff(orders) == 1).mean() < 0.2
        other = epoch_starts(length, seq_len, batch_size, num_batches, seed=1)[:size]
        assert (other - other.min() != starts[0] - cuts[0]).any()


@pytest.mark.parametrize("length", [6, 7, 10, 11, 12, 60])
def test_over_many_epochs_every_window_of_the_text_is_reachable_to_its_last_character(length):
    assert set(epoch_starts(length, 5, 4, 250).tolist()) == set(range(length - 5))


def test_shuffled_is_a_bijection_and_puts_anything_anywhere():
    index = jnp.arange(2500)  # one shape for all sizes: what lies beyond a size is left out
    for windows in (1, 2, 3, 4, 5, 11, 48, 63, 64, 130, 255, 1000, 2500):
        size, key = windows - windows % math.isqrt(windows), jax.random.key(windows)
        places = np.asarray(jax.vmap(lambda i, size=size, key=key: shuffled(i, size, key))(index))[:size]
        assert sorted(places.tolist()) == list(range(size)), size
    keys = jax.random.split(jax.random.key(0), 600)
    orders = np.asarray(jax.vmap(lambda key: jax.vmap(lambda i: shuffled(i, 12, key))(jnp.arange(12)))(keys))
    counts = np.stack([np.bincount(places, minlength=12) for places in orders.T])
    assert (np.abs(counts - 50) < 5 * math.sqrt(50)).all(), counts


# --- windows


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 40))
def test_windows_predict_every_character_but_the_first_exactly_once(length, seq_len):
    tokens = np.arange(length, dtype=np.int32) + 100
    windows = make_windows(tokens, seq_len)
    assert windows.inputs.shape == windows.targets.shape == windows.weights.shape
    real = windows.weights == 1
    np.testing.assert_array_equal(windows.targets[real], tokens[1:])
    np.testing.assert_array_equal(windows.inputs[real], tokens[:-1])
    assert (windows.weights[~real] == 0).all() and (~real).sum() < seq_len and not real[-1, int(real[-1].sum()) :].any()
    assert windows.num_targets == length - 1


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(1, 20), st.integers(1, 500))
def test_a_cap_keeps_evenly_spaced_whole_windows(length, seq_len, max_tokens):
    tokens = np.arange(length, dtype=np.int32)
    everything, capped = make_windows(tokens, seq_len), make_windows(tokens, seq_len, max_tokens)
    if max_tokens >= length - 1:
        np.testing.assert_array_equal(capped.inputs, everything.inputs)
        return
    assert len(capped.inputs) == max(1, max_tokens // seq_len)
    places = capped.inputs[:, 0] // seq_len
    for name in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(getattr(capped, name), getattr(everything, name)[places])
    gaps = np.diff(places)
    assert places[0] == 0 and (gaps > 0).all()
    if len(gaps):
        assert places[-1] == len(everything.inputs) - 1 and gaps.max() - gaps.min() <= 1
    assert 1 <= capped.num_targets <= max(max_tokens, seq_len)
