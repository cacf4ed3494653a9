"""Many texts at once: each is what it would be alone."""

import queue

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layer_of
from players import CONTEXT, PROMPT, alone, make_player

from chargpt.config import AttentionType
from chargpt.play.engine import PIECE, Batch, Engine, Event, Player, Text
from chargpt.run.sample import SampleOptions

SECONDS = 60


class Reader:
    """A text and what its reader has been told."""

    def __init__(self, player: Player, **options):
        self.options = SampleOptions(**{"prompt": PROMPT, "num_chars": 40, **options})
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.text = Text(player, self.options, self.events.put)

    def read(self) -> list[Event]:
        """All events, the last of which ends the text."""
        events = [self.events.get(timeout=SECONDS)]
        while events[-1]["event"] not in ("end", "error"):
            events.append(self.events.get(timeout=SECONDS))
        return events


def written(events: list[Event]) -> str:
    return "".join(event["text"] for event in events if event["event"] == "text")


def test_texts_in_one_batch_are_those_of_chargpt_sample(mha_type: AttentionType) -> None:
    """Beyond the context, in slots that others have left, in order of arrival.

    With a layer that keeps a window and one that keeps all, if the type has windows.
    """
    windows = ["model.num_layers=2", "model.window=5", "model.window_pattern=LG", "model.ngram=3"]
    refused = "window" in layer_of(mha_type).refuses
    player = make_player(mha_type.name, *([] if refused else windows))
    long = "a bad cafe, and more of it than the model can read at once."
    wanted = [{}, {"seed": 1}, {"prompt": long, "num_chars": 30}, {"seed": 2, "num_chars": 5}]
    readers = [Reader(player, **options) for options in wanted]
    with Engine([player], max_slots=3) as engine:
        for reader in readers:
            engine.submit(reader.text)
        texts = [written(reader.read()) for reader in readers]
    assert texts == [alone(player, reader.options) for reader in readers]
    assert len(texts[0]) == 40 and texts[0] != texts[1]


def test_each_text_is_drawn_in_its_own_way() -> None:
    player = make_player("standard")
    ways = [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 9, "top_p": 0.7}, {"top_k": 10**6}]
    readers = [Reader(player, num_chars=12, **way) for way in ways]
    with Engine([player], max_slots=4) as engine:
        for reader in readers:
            engine.submit(reader.text)
        texts = [written(reader.read()) for reader in readers]
    assert texts == [alone(player, reader.options) for reader in readers]
    assert len(set(texts)) == len(ways)


def test_what_is_told_of_a_character_is_what_the_model_says_of_it(mha_type: AttentionType) -> None:
    player = make_player(mha_type.name)
    reader = Reader(player, prompt="GABE", num_chars=8)
    with Engine([player], max_slots=1) as engine:
        engine.submit(reader.text)
        events = reader.read()
    prompt, *pieces, end = events
    assert (prompt["event"], prompt["start"], prompt["read"][0]) == ("prompt", 0, None)
    assert (end["event"], end["reason"]) == ("end", "length")
    told = prompt["read"][1:] + [one for piece in pieces for one in piece["read"]]
    tokens = player.run.encode(reader.options.prompt + written(events))
    assert len(told) == len(tokens) - 1 == 11
    logits = np.asarray(player.run.model(jnp.asarray(tokens)), np.float64)
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))[:-1]
    np.testing.assert_allclose(
        [one["p"] for one in told], expected[np.arange(11), tokens[1:]], rtol=2e-3
    )
    for one, row in zip(told, expected, strict=True):
        best = [[player.alphabet[i], row[i]] for i in np.argsort(-row)[:5]]
        assert [name for name, _ in one["top"]] == [name for name, _ in best]
        np.testing.assert_allclose([p for _, p in one["top"]], [p for _, p in best], rtol=2e-3)
    assert [piece["made"] for piece in pieces][-1] == 8
    assert pieces[-1]["cache_bytes"] == player.cache_bytes(len(tokens) - 1)


def test_start_says_what_a_model_could_see() -> None:
    """Each character follows from the text from `start` on, as if nothing had been before it."""
    player = make_player("standard")
    reader = Reader(player, num_chars=60, temperature=0.0)
    with Engine([player], max_slots=1) as engine:
        engine.submit(reader.text)
        events = reader.read()
    likeliest = eqx.filter_jit(lambda tokens: jnp.argmax(player.run.model(tokens), axis=-1))
    text, place = reader.options.prompt + written(events), len(reader.options.prompt)
    starts = []
    for event in events[1:-1]:
        for character in event["text"]:
            seen = text[event["start"] : place]
            assert 1 <= len(seen) <= CONTEXT
            tokens = np.pad(player.run.encode(seen), (0, CONTEXT - len(seen)))
            assert player.alphabet[int(likeliest(tokens)[len(seen) - 1])] == character
            place += 1
        starts.append(event["start"])
    assert place == 68 and starts == sorted(starts) and len(set(starts)) > 3


def test_a_cancelled_text_leaves_its_slot_to_the_next() -> None:
    player = make_player("standard")
    endless, next_one = Reader(player, num_chars=10**9), Reader(player, num_chars=3)
    with Engine([player], max_slots=1) as engine:
        engine.submit(endless.text)
        engine.submit(next_one.text)
        assert next_one.events.get(timeout=SECONDS) == {"event": "waiting"}
        assert endless.events.get(timeout=SECONDS)["event"] == "prompt"
        assert next_one.events.empty()
        endless.text.cancelled = True
        assert written(next_one.read()) == alone(player, next_one.options)
    assert endless.text.made < 10**6


def test_closing_ends_every_text_with_a_last_event() -> None:
    player = make_player("standard")
    readers = [Reader(player, num_chars=10**9) for _ in range(3)]
    with Engine([player], max_slots=2) as engine:
        for reader in readers:
            engine.submit(reader.text)
        assert readers[0].events.get(timeout=SECONDS)["event"] == "prompt"
        engine.close()
        readers.append(Reader(player))
        engine.submit(readers[-1].text)  # too late
        for reader in readers:
            assert reader.read()[-1] == {"event": "end", "reason": "stopping"}


def test_a_model_that_fails_ends_its_own_texts_and_can_be_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, sound = make_player("mqa"), make_player("standard")
    draw = Batch.draw

    def fail(batch: Batch, slots, cache):
        if batch.player is failing and any(slots):
            raise MemoryError("no memory\nis left")
        return draw(batch, slots, cache)

    with Engine([failing, sound], max_slots=2) as engine:
        monkeypatch.setattr(Batch, "draw", fail)
        readers = [Reader(failing), Reader(failing), Reader(sound)]
        for reader in readers:
            engine.submit(reader.text)
        told = {"event": "error", "error": "the model failed: no memory is left"}
        assert readers[0].read() == readers[1].read() == [told]
        assert written(readers[2].read()) == alone(sound, readers[2].options)
        assert "MemoryError" in capsys.readouterr().err
        monkeypatch.setattr(Batch, "draw", draw)
        again = Reader(failing)
        engine.submit(again.text)
        assert written(again.read()) == alone(failing, again.options)


def test_sizes_are_few_and_end_with_the_number_of_slots() -> None:
    player = make_player("standard")
    assert [Batch(player, slots).sizes for slots in (1, 4, 64, 100)] == [
        [1], [1, 4], [1, 4, 16, 64], [1, 4, 16, 64, 100]
    ]  # fmt: skip
    assert PIECE < CONTEXT
