"""The tokenizer, the split, baselines, and how batches and windows are cut."""

import functools
import hashlib
import math
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import time_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.config import DatasetConfig, DatasetName, Sampling
from chargpt.corpus import (
    CharTokenizer,
    Corpus,
    epoch_batch,
    load_corpus,
    make_windows,
    sample_batch,
    shuffled,
    sliding_windows,
)
from chargpt.errors import ConfigError

TEXT = "To be, or not to be: that is the question.\n" * 4


def from_file(path: Path | str, seq_len: int = 4, val_fraction: float = 0.25) -> Corpus:
    config = DatasetConfig(DatasetName.file, str(path), seq_len, Sampling.random, val_fraction)
    return load_corpus(config)


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
    "text",
    [
        "",
        "a\r\nb\rc\n",
        "\0\1\x7f\x85",
        "\N{GRINNING FACE}\U0001d538e\u0301é",
        "\ufeff\u2028\U0010ffff\ud7ff",
    ],
)
def test_characters_are_code_points_and_none_is_special(text):
    tokenizer = CharTokenizer.from_text(text)
    assert len(tokenizer) == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(jnp.asarray(tokenizer.encode(text))) == text


def test_tokens_are_indices_into_the_sorted_vocabulary():
    tokenizer = CharTokenizer.from_text("cab b")
    assert tokenizer.vocabulary == " abc"
    np.testing.assert_array_equal(tokenizer.encode("abc "), [1, 2, 3, 0])


@given(st.text(), st.text(min_size=1))
def test_unknown_characters_are_each_named_once(known, text):
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


# --- the split and its fingerprint


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_the_split_is_one_cut_and_validation_is_the_end(text, val_fraction):
    content = ("ab" + text).encode()
    text = content.decode("utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt.texts.read_source", lambda _: content)
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
    for text in (TEXT, TEXT.replace("\n", "\r\n"), "é" * 9 + TEXT):
        corpus = from_file(write(tmp_path, text.encode()))
        assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert corpus.name == "file"


@pytest.mark.parametrize("content", ["a" * 100, "\ufeff", "\n"])
def test_a_text_of_one_character_is_refused_by_its_name(tmp_path, content):
    path = write(tmp_path, content)
    text = refusal(path)
    assert "fewer than two different characters" in text and str(path) in text


def test_a_text_too_short_for_either_split_is_refused(tmp_path):
    path = write(tmp_path, "ab" * 10)
    for split, length, seq_len, val_fraction in (
        ("validation", 5, 5, 0.25),
        ("training", 5, 5, 0.75),
        ("validation", 0, 4, 1e-6),
    ):
        message = refusal(path, seq_len=seq_len, val_fraction=val_fraction)
        expected = f"dataset.seq_len={seq_len}: the {split} split has only {length} characters"
        assert expected in message
    for seq_len, val_fraction in ((4, 0.25), (4, 0.75), (9, 0.5)):
        corpus = from_file(path, seq_len, val_fraction)
        assert min(len(corpus.train), len(corpus.val)) == seq_len + 1


# --- baselines


def test_baselines_are_those_counted_by_hand():
    train, val = np.array([0, 1, 0], np.int32), np.array([1, 1, 0], np.int32)
    # Frequencies: a 2 + 1, b 1 + 1 of 3 + 2; the targets are b, a
    unigram = -(math.log(2 / 5) + math.log(3 / 5)) / 2
    # After b: a 1 + 1, b 0 + 1 of 1 + 2; the pairs are bb, ba
    bigram = -(math.log(1 / 3) + math.log(2 / 3)) / 2
    expected = {"uniform": math.log(2), "unigram": unigram, "bigram": bigram}
    baselines = Corpus("file", CharTokenizer("ab"), train, val, "").baselines
    assert baselines == pytest.approx(expected, rel=1e-12)


def test_baselines_are_smoothed_counts_on_any_text():
    random = np.random.default_rng(0)
    train = random.integers(0, 9, 200).astype(np.int32)
    val = random.integers(0, 10, 50).astype(np.int32)  # 9 is never trained on
    pairs = {(a, b): 1 for a in range(10) for b in range(10)}
    for a, b in zip(train[:-1].tolist(), train[1:].tolist(), strict=True):
        pairs[a, b] += 1
    after = [sum(pairs[a, b] for b in range(10)) for a in range(10)]
    wanted = zip(val[:-1].tolist(), val[1:].tolist(), strict=True)
    bigram = np.mean([math.log(after[a] / pairs[a, b]) for a, b in wanted])
    unigram = np.mean([math.log((200 + 10) / (1 + (train == b).sum())) for b in val[1:]])
    expected = {"uniform": math.log(10), "unigram": unigram, "bigram": bigram}
    baselines = Corpus("file", CharTokenizer("abcdefghij"), train, val, "").baselines
    assert baselines == pytest.approx(expected)


def test_baselines_of_a_large_alphabet_take_memory_for_the_text_not_for_all_pairs():
    size = 3000
    text = np.random.default_rng(0).permutation(size).astype(np.int32)
    tokenizer = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + size))))
    corpus = Corpus("file", tokenizer, text, text[: size // 2], "")
    tracemalloc.start()
    try:
        assert set(corpus.baselines) == {"uniform", "unigram", "bigram"}
        assert tracemalloc.get_traced_memory()[1] < 10e6  # all pairs would be 72 MB
    finally:
        tracemalloc.stop()


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


def test_a_batch_follows_from_its_key():
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


def epoch_starts(
    length: int, seq_len: int, batch_size: int, num_batches: int, seed: int = 0
) -> np.ndarray:
    """Where the windows of the first batches begin, in order, in the text 0, 1, 2, …"""
    batches = epoch_batches(
        jnp.arange(length), jax.random.key(seed), jnp.arange(num_batches), batch_size, seq_len
    )
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
def test_every_epoch_reads_each_window_once_cut_elsewhere_and_in_another_order(
    length, seq_len, batch_size
):
    room = min(seq_len, length - seq_len)
    windows = (length - room) // seq_len
    size, epochs = windows - windows % math.isqrt(windows), 4
    assert size >= 1 and size > windows * (1 - 1 / math.isqrt(windows))
    num_batches = -(-epochs * size // batch_size)  # batches need not end where an epoch does
    starts = epoch_starts(length, seq_len, batch_size, num_batches)
    starts = starts[: epochs * size].reshape(epochs, size)
    cuts = starts.min(axis=1)
    expected = cuts[:, None] + seq_len * np.arange(size)
    np.testing.assert_array_equal(np.sort(starts, axis=1), expected)
    if room > 3:
        assert len(set(cuts.tolist())) > 1
    if size > 20:
        orders = (starts - cuts[:, None]) // seq_len
        assert len({tuple(order) for order in orders}) == epochs
        assert (np.diff(orders) == 1).mean() < 0.2
        other = epoch_starts(length, seq_len, batch_size, num_batches, seed=1)[:size]
        assert (other - other.min() != starts[0] - cuts[0]).any()


@pytest.mark.parametrize("length", [6, 7, 10, 11, 12, 60])
def test_over_many_epochs_every_window_of_the_text_is_read_up_to_its_last_character(length):
    assert set(epoch_starts(length, 5, 4, 250).tolist()) == set(range(length - 5))


def test_shuffled_is_a_bijection_and_puts_anything_anywhere():
    index = jnp.arange(2500)  # one shape for all sizes: indices beyond a size are ignored
    for windows in (1, 2, 3, 4, 5, 11, 48, 63, 64, 130, 255, 1000, 2500):
        size, key = windows - windows % math.isqrt(windows), jax.random.key(windows)
        places = np.asarray(jax.vmap(lambda i, size=size, key=key: shuffled(i, size, key))(index))
        assert sorted(places[:size].tolist()) == list(range(size)), size
    order = jax.vmap(lambda i, key: shuffled(i, 12, key), in_axes=(0, None))
    keys = jax.random.split(jax.random.key(0), 600)
    orders = np.asarray(jax.vmap(order, in_axes=(None, 0))(jnp.arange(12), keys))
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
    assert (windows.weights[~real] == 0).all() and (~real).sum() < seq_len
    assert not real[-1, int(real[-1].sum()) :].any()
    assert windows.num_targets == length - 1


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(1, 20), st.integers(1, 500))
def test_a_cap_keeps_evenly_spaced_windows(length, seq_len, max_tokens):
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


@pytest.mark.parametrize("length", [2, 5, 9, 10, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_predict_every_character_once_from_a_long_context(
    length: int, stride: int
) -> None:
    tokens, seq_len = np.arange(100, 100 + length), 8
    windows = sliding_windows(tokens, seq_len, stride)
    predicted = windows.targets[windows.weights == 1]
    np.testing.assert_array_equal(np.sort(predicted), tokens[1:])
    assert windows.num_targets == length - 1 and set(np.unique(windows.weights)) <= {0, 1}
    for row, column in np.argwhere(windows.weights == 1):
        context = windows.inputs[row, : column + 1]
        assert windows.targets[row, column] == context[-1] + 1  # the next one
        assert (np.diff(context) == 1).all()
        seen = windows.targets[row, column] - tokens[0]  # characters before it in the text
        assert len(context) >= min(seen, seq_len - stride + 1)


def test_sliding_by_whole_windows_is_the_plain_split() -> None:
    plain, slid = make_windows(np.arange(50), 8), sliding_windows(np.arange(50), 8, 8)
    for left, right in zip(vars(plain).values(), vars(slid).values(), strict=True):
        kept = plain.weights == 1
        np.testing.assert_array_equal(left[kept], right[kept])
        assert left.shape == right.shape
