"""Many texts continued at once: those of one model share a batch, models take turns."""

import collections
import dataclasses
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt.costs import kv_cache_bytes
from chargpt.errors import one_line
from chargpt.generate import advance, first_context, of_samples, unstack
from chargpt.run.sample import SampleOptions
from chargpt.run.trained import TrainedRun
from chargpt.train import Stream, cast, compute_dtype, random_key

PIECE = 8  # tokens that a model draws before another has its turn
GROWTH = 4  # a batch has 1, 4, 16, … slots: few sizes, since each is compiled
ALTERNATIVES = 5
DIGITS = 5  # of their probabilities
UNKNOWN = -1  # in place of a token that is to be drawn

Event = dict[str, Any]  # as a reader gets it; "event" is its name
STOPPING: Event = {"event": "end", "reason": "stopping"}


class Player:
    """A trained model, ready to write."""

    def __init__(self, name: str, run: TrainedRun):
        config = run.header.config
        dtype = compute_dtype(config.trainer.precision)
        self.name, self.run = name, run
        self.model = unstack(cast(run.model, dtype))
        self.context = config.dataset.seq_len
        self.alphabet = run.header.vocabulary
        self.cache_bytes = functools.cache(functools.partial(kv_cache_bytes, run.model, dtype))

    def judge(self, logits: np.ndarray, tokens: np.ndarray) -> list[Event]:
        """The probability of each of the tokens [n] by logits [n, vocab], and the likeliest ones.

        For all texts of a batch at once: a call for each number would cost as much as the model.
        """
        weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        best = np.argsort(-weights, axis=-1, kind="stable")[:, :ALTERNATIVES]
        own = np.take_along_axis(weights, tokens[:, None], axis=-1)[:, 0].tolist()
        others = np.take_along_axis(weights, best, axis=-1).round(DIGITS).tolist()
        names = [[self.alphabet[i] for i in row] for row in best.tolist()]
        return [
            {"p": p, "top": [[name, q] for name, q in zip(row, values, strict=True)]}
            for p, row, values in zip(own, names, others, strict=True)
        ]


@dataclasses.dataclass(eq=False)
class Text:
    """A prompt that a model continues, and how far it has come.

    The cache holds `position` tokens, the first of them tokens[start]. As in `generate`, when it is
    full its last half is read again; so are prompts, token by token, beside texts that go on.
    """

    player: Player
    options: SampleOptions
    emit: Callable[[Event], None]
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens: list[int] = self.player.run.encode(self.options.prompt).tolist()
        self.prompt_length = len(self.tokens)
        self.start = len(self.tokens) - first_context(len(self.tokens), self.player.context)
        self.position = 0
        self.room = max(1, self.player.context - 1)  # for tokens, until half is read again
        self.prompt_judged: list[Event | None] = [None]
        self.waited = False
        self.began = 0.0
        # That of `chargpt sample`'s first sample
        key = jax.random.split(random_key(self.options.seed, Stream.sample), 1)[0]
        self.key = np.asarray(jax.random.key_data(key))

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def done(self) -> bool:
        return self.cancelled or self.made >= self.options.num_chars

    @property
    def next(self) -> int:
        """The number of the token that the next step predicts."""
        return self.start + self.position + 1

    def known(self) -> list[int]:
        """The token that is read next, and those after it."""
        known = self.tokens[self.next - 1 :][: PIECE + 1]
        return known + [UNKNOWN] * (PIECE + 1 - len(known))

    def wait(self) -> None:
        """Tell the reader, once, that all slots are taken."""
        if not self.waited:
            self.waited = True
            self.emit({"event": "waiting"})

    def take(self, tokens: list[int], judged: list[Event]) -> None:
        """Go on by a piece: what was drawn and what is said of it; tell the reader."""
        start, steps = self.start, min(PIECE, self.room - self.position)
        old = min(steps, len(self.tokens) - self.next)  # they were known
        new = min(steps - old, self.options.num_chars - self.made)
        if self.made == 0:
            self.prompt_judged += judged[:old]
        self.tokens += tokens[old : old + new]
        self.position += old + new
        held = self.position
        if self.position == self.room:
            keep = first_context(self.player.context, self.player.context)
            self.start, self.position = len(self.tokens) - keep, 0
        if new:
            self._tell(judged[old : old + new], start, held)

    def _tell(self, new: list[Event], start: int, held: int) -> None:
        if self.made == len(new):
            self.emit({"event": "prompt", "start": start, "read": self.prompt_judged})
        seconds = time.monotonic() - self.began
        self.emit(
            {
                "event": "text",
                "text": "".join(self.player.alphabet[i] for i in self.tokens[-len(new) :]),
                "start": start,
                "read": new,
                "made": self.made,
                "seconds": seconds,
                "rate": self.made / max(seconds, 1e-6),
                "cache_bytes": self.player.cache_bytes(held),
            }
        )
        if self.made == self.options.num_chars:
            self.emit({"event": "end", "reason": "length"})


class Batch:
    """Texts of one model, each in a slot of its cache, and those that wait for a slot."""

    def __init__(self, player: Player, max_slots: int):
        self.player = player
        self.sizes = [size for i in range(9) if (size := GROWTH**i) < max_slots] + [max_slots]
        self.cold = list(self.sizes)  # not compiled yet
        self.waiting: collections.deque[Text] = collections.deque()
        self.clear()

    def clear(self) -> None:
        """Empty all slots."""
        self.slots: list[Text | None] = [None]
        self.cache = self.empty_cache(1)

    def end(self, event: Event) -> None:
        """End all texts, with this event."""
        for text in self.texts + list(self.waiting):
            if not text.done:
                text.emit(event)
        self.waiting.clear()
        self.clear()

    @property
    def texts(self) -> list[Text]:
        return [text for text in self.slots if text is not None]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.texts)

    def step(self) -> None:
        """Take in texts that wait, as far as there are slots; continue all by a piece."""
        self._place()
        if not self.texts:
            return
        drawn, logits, self.cache = self.draw(self.slots, self.cache)
        taken = [slot for slot, text in enumerate(self.slots) if text is not None]
        tokens = drawn[taken]
        judged = self.player.judge(logits[taken].reshape(tokens.size, -1), tokens.reshape(-1))
        for number, text in enumerate(self.texts):
            text.take(tokens[number].tolist(), judged[number * PIECE :][:PIECE])

    def draw(self, slots: list[Text | None], cache: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        """A piece of every text: tokens [slots, PIECE], logits [slots, PIECE, vocab], the cache."""
        size, nothing = len(slots), [0] + [UNKNOWN] * PIECE
        known = np.array([nothing if text is None else text.known() for text in slots], np.int32)
        keys, position, index = np.zeros((size, 2), np.uint32), *np.zeros((2, size), np.int32)
        temperature, top_k, top_p = np.ones((3, size), np.float32)
        for slot, text in enumerate(slots):
            if text is None:
                continue
            options = text.options
            keys[slot], position[slot] = text.key, text.position
            index[slot] = text.next - text.prompt_length
            temperature[slot] = options.temperature
            top_k[slot] = options.top_k or len(self.player.alphabet)
            top_p[slot] = options.top_p or 1.0
        where = jax.random.wrap_key_data(jnp.asarray(keys)), position, index
        how = temperature, top_k, top_p
        kept = (self.player.model, known[:, 0], *where, PIECE, how, known[:, 1:])
        drawn, logits, cache = advance(kept, cache)
        return np.asarray(drawn), np.asarray(logits.astype(jnp.float32)), cache

    def warm(self) -> None:
        """Compile the next of the sizes that are still to be compiled."""
        size = self.cold.pop(0)
        self.draw([None] * size, self.empty_cache(size))

    def empty_cache(self, size: int) -> Any:
        one = self.player.model.init_cache(self.player.context)
        return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), one)

    def _place(self) -> None:
        """Free the slots of texts that are done, and fill free ones, in order of arrival."""
        self.slots = [None if text is None or text.done else text for text in self.slots]
        new: list[Text] = []
        while self.waiting and len(self.texts) + len(new) < self.sizes[-1]:
            text = self.waiting.popleft()
            if not text.done:
                new.append(text)
        needed = len(self.texts) + len(new)
        size = next(size for size in self.sizes if size >= needed)
        if size != len(self.slots):
            taken = [slot for slot, text in enumerate(self.slots) if text is not None]
            free = size - len(taken)
            self.cache = of_samples(self.cache, jnp.asarray(taken + [0] * free))
            self.slots = [self.slots[slot] for slot in taken] + [None] * free
        for text in new:
            text.began = time.monotonic()
            self.slots[self.slots.index(None)] = text
        for text in self.waiting:
            text.wait()


class Engine:
    """The thread in which all models write; within the block, it runs."""

    def __init__(self, players: Iterable[Player], max_slots: int):
        self.batches = {player: Batch(player, max_slots) for player in players}
        self._arrivals: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._thread.join()

    def submit(self, text: Text) -> None:
        """Continue `text`, until it is done or cancelled, or the engine is closed."""
        if self._closing:
            text.emit(STOPPING)
        self._arrivals.put(text)

    def close(self) -> None:
        """End all texts, each with a last event."""
        self._closing = True
        self._arrivals.put(None)

    def _run(self) -> None:
        while not self._closing:
            self._receive()
            for batch in self.batches.values():
                self._attempt(batch, batch.step)
        while not self._arrivals.empty():
            if (text := self._arrivals.get()) is not None:
                self.batches[text.player].waiting.append(text)
        for batch in self.batches.values():
            batch.end(STOPPING)

    def _receive(self) -> None:
        """Hand what has arrived to the batches; with nothing to do, compile a size, or wait."""
        while True:
            busy = any(batch.has_work for batch in self.batches.values())
            coldest = max(self.batches.values(), key=lambda batch: len(batch.cold))
            if coldest.cold and not busy and self._arrivals.empty():
                self._attempt(coldest, coldest.warm)
                continue
            try:
                text = self._arrivals.get(block=not busy)
            except queue.Empty:
                return
            if text is None:
                return
            self.batches[text.player].waiting.append(text)

    def _attempt(self, batch: Batch, act: Callable[[], None]) -> None:
        """A model that fails ends its own texts, and no others."""
        try:
            act()
        except Exception as error:
            traceback.print_exc()
            batch.end({"event": "error", "error": f"the model failed: {one_line(error)}"[:400]})
