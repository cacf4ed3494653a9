"""Training as computation: runs side by side, and what is known of each. Writes and shows nothing.

A run alone is the usual case: one lane. Of a population, each run has a lane of its own.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from chargpt.checkpoint import Header
from chargpt.config import Config
from chargpt.errors import RunFailed
from chargpt.run import peers
from chargpt.run.program import Program
from chargpt.train import StepMetrics, TrainState

Line = dict[str, int | float]


class NotFinite(RunFailed):
    """Loss or gradient was not finite too many times in a row."""


@dataclasses.dataclass
class Report:
    """What is known of a run at a step."""

    line: Line  # of metrics.jsonl
    sample: str = ""
    is_best: bool = False
    saves: tuple[str, ...] = ()  # checkpoints due now: the run's state is that of this step
    is_last: bool = False

    @property
    def evaluated(self) -> bool:
        return "val/loss" in self.line


def next_boundary(config: Config, step: int) -> int:
    """The next step at which something is due: multiples, wherever a run has started."""
    trainer = config.trainer
    intervals = (trainer.log_every, trainer.eval_every, trainer.checkpoint_every)
    return min(trainer.num_steps, *((step // every + 1) * every for every in intervals))


class Run:
    """How far a run of `config` has come in `program`, from the first step or a checkpoint."""

    def __init__(self, program: Program, config: Config, header: Header | None = None):
        self.program, self.config, self.corpus = program, config, program.corpus
        self.step = header.step if header else 0
        self.best_val_loss = header.best_val_loss if header else None
        self.best_step = header.best_step if header else None
        self.final_val_loss: float | None = None
        self.sample = ""
        self.decode_speed: float | None = None  # tokens per second, at the end
        self.trained_tokens, self.trained_seconds = 0, 0.0
        self.seconds_before = header.seconds if header else 0.0
        self.began = time.perf_counter()
        self.state: TrainState | None = None  # of `step`, while checkpoints are due

    @property
    def ended(self) -> bool:
        return self.config.ends_at(self.step, self.best_step)

    def ends_with(self, val_loss: float) -> bool:
        """Whether it ends at this step if this is its loss here."""
        best_step = self.step if self._is_best(val_loss) else self.best_step
        return self.config.ends_at(self.step, best_step)

    def _is_best(self, val_loss: float) -> bool:
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        return val_loss < best  # NaN never is

    def boundaries(self) -> Iterator[int]:
        """The steps, from here to the end, at which something is due."""
        step = self.step
        while step < self.config.trainer.num_steps:
            step = next_boundary(self.config, step)
            yield step

    def evaluates(self, step: int) -> bool:
        trainer = self.config.trainer
        return step == trainer.num_steps or step % trainer.eval_every == 0

    def saves(self, step: int) -> bool:
        return self.evaluates(step) or step % self.config.trainer.checkpoint_every == 0

    def line(self, step: int, metrics: StepMetrics, seconds: float) -> Line:
        """The line for metrics.jsonl of steps up to `step`; NotFinite if too many were skipped."""
        trainer, program = self.config.trainer, self.program
        per_step = trainer.batch_size * self.config.dataset.seq_len
        tokens = len(metrics.loss) * per_step
        self.trained_tokens += tokens
        self.trained_seconds += seconds
        most = trainer.max_skipped_steps
        if metrics.skipped_in_a_row.max() >= most:
            reason = f"loss or gradient was not finite in {most} steps in a row"
            raise NotFinite(f"stopped at step {step}: {reason}")
        return {
            "trainer/step": step,
            "trainer/tokens": step * per_step,
            "trainer/seconds": self.seconds(),
            "trainer/skipped_steps": int(metrics.skipped[-1]),
            "train/loss": float(metrics.loss.mean(dtype=np.float64)),
            "train/grad_norm": float(metrics.grad_norm[-1]),
            **{f"grad_norm/{name}": float(norm[-1]) for name, norm in metrics.part_norms.items()},
            **{f"experts/{name}": float(each[-1]) for name, each in metrics.experts.items()},
            "optim/learning_rate": float(metrics.learning_rate[-1]),
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/mfu": tokens / seconds * program.flops_per_token / program.peak_flops,
        }

    def judge(self, line: Line, known: Line, sample: str) -> Report:
        """`line` with what is known of the model by validation, and whether it is the best yet."""
        line |= known
        self.final_val_loss = line["val/loss"]
        is_best = self._is_best(line["val/loss"])
        if is_best:
            self.best_val_loss, self.best_step = line["val/loss"], self.step
        if self.best_val_loss is not None:
            line["best/val_loss"] = self.best_val_loss
        self.sample = sample
        return Report(line, sample, is_best, ("last", "best") if is_best else ("last",))

    def seconds(self) -> float:
        """Wall time of training so far, including that before a resume."""
        return self.seconds_before + time.perf_counter() - self.began


Ends = dict[int, tuple[Run, int, int]]  # by lane: (run, its last step, how many steps)


@dataclasses.dataclass
class Chunk:
    """Steps that the device has been given."""

    ends: Ends
    metrics: StepMetrics
    dispatched: float


class Loop:
    """Trains the runs in the lanes of `program`, and reports on each of them."""

    def __init__(self, program: Program):
        self.program = program
        self.lanes: list[Run | None] = [None] * (program.members or 1)
        self.states: TrainState | None = None
        self.last_fetch = 0.0
        self.stalls = peers.Stalls(program.config.parallel.stall_factor)

    @property
    def runs(self) -> list[Run]:
        """Those that train."""
        return [run for run in self.lanes if run is not None]

    def enter(self, run: Run, state: TrainState | None = None) -> None:
        """Give the run a free lane, from a state on the host or from its first step.

        A run that has ended needs none.
        """
        if run.ended:
            return
        if state is None:
            state = self.program.initial_state(run.config.seed)
        else:
            state = self.program.devices.place(state)
        lane = self.lanes.index(None)
        self.states = self.program.put(self.states, lane, state)
        self.lanes[lane] = run
        # What an empty lane computes is not looked at
        configs = [(other or run).config for other in self.lanes]
        self.inputs = self.program.inputs(configs)

    def leave(self, run: Run) -> None:
        """Its lane is free."""
        self.lanes[self.lanes.index(run)] = None

    def compile(self) -> None:
        """Compile a chunk of every length that these runs need."""
        for run in self.runs:
            run.began = time.perf_counter() - self.program.compile_seconds
        if self.runs:
            self.program.compile(self._lengths(), self.inputs)

    def _lengths(self) -> Iterator[int]:
        """Of the chunks ahead: each run trains to its next boundary, and waits for the others."""
        paths = [itertools.pairwise([run.step, *run.boundaries()]) for run in self.runs]
        for pairs in itertools.zip_longest(*paths, fillvalue=(0, 0)):
            yield max(end - begin for begin, end in pairs)

    def reports(
        self, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Run, Report | NotFinite]]:
        """Train to the end of all runs, or until `stop()`, reporting one chunk while the next runs.

        Nothing is computed meanwhile if an evaluation or a checkpoint is due. A run has its state
        until the next report is asked for. Between reports runs may enter and leave.
        """
        pending: Chunk | None = None
        while self.runs:
            with self.stalls.watch("agreement"):
                stopped = stop()
            if stopped:
                break
            ends = self._ends()
            length = max(count for _, _, count in ends.values())
            if length not in self.program.compiled:  # runs have entered
                if pending is not None:  # its time does not count compilation
                    yield from self._settle(pending, saves=("last",))
                    pending = None
                    continue
                self.program.compile([length], self.inputs)
            chunk = self._start(ends, length)
            if pending is not None:
                yield from self._settle(pending)
            pending = chunk
            if any(run.saves(end) for run, end, _ in chunk.ends.values()):
                # Runs of which nothing is due save too: a signal may come next
                yield from self._settle(pending, saves=("last",))
                pending = None
        if pending is not None:
            yield from self._settle(pending, saves=("last",))

    def _ends(self) -> Ends:
        """Every run's steps to its next boundary."""
        ends = {}
        for lane, run in enumerate(self.lanes):
            if run is not None:
                end = next_boundary(run.config, run.step)
                ends[lane] = run, end, end - run.step
        return ends

    def _start(self, ends: Ends, length: int) -> Chunk:
        """Give the device these steps, `length` at most for each run."""
        until = [ends[lane][1] if lane in ends else 0 for lane in range(len(self.lanes))]
        assert self.states is not None
        with self.stalls.watch("start of steps"):
            self.states, metrics = self.program.train(length, self.states, self.inputs, until)
        for run, end, _ in ends.values():
            run.step = end
        return Chunk(ends, metrics, time.perf_counter())

    def _settle(
        self, chunk: Chunk, saves: tuple[str, ...] = ()
    ) -> Iterator[tuple[Run, Report | NotFinite]]:
        """Wait for a chunk; a report on each run in it, evaluated where that is due.

        `saves` are due of all, if the states are still those of the chunk's end.
        """
        with self.stalls.watch("end of steps"):
            metrics = jax.tree.map(np.asarray, chunk.metrics)
        now = time.perf_counter()
        seconds = now - max(chunk.dispatched, self.last_fetch)
        self.last_fetch = now
        self.stalls.least = min(seconds, self.stalls.least or seconds)
        lines: dict[int, Line | NotFinite] = {}
        # Without those that have left meanwhile
        present = {lane: one for lane, one in chunk.ends.items() if self.lanes[lane] is one[0]}
        for lane, (run, end, count) in present.items():
            try:
                lines[lane] = run.line(end, self._of(metrics, lane, count), seconds)
            except NotFinite as error:
                lines[lane] = error
        due = {
            lane: run
            for lane, (run, end, _) in present.items()
            if run.evaluates(end) and not isinstance(lines[lane], NotFinite)
        }
        known = {}
        if due:
            with self.stalls.watch("evaluation"):
                known = self._evaluate(due)
        for lane, (run, _, _) in present.items():
            line = lines[lane]
            if isinstance(line, NotFinite):
                self.leave(run)
                yield run, line
                continue
            report = run.judge(line, *known[lane]) if lane in due else Report(line, saves=saves)
            report.is_last = lane in due and run.ended
            if report.saves:
                assert self.states is not None
                run.state = self.program.take(self.states, lane)
            if report.is_last:
                self.leave(run)
            yield run, report
            run.state = None

    def _of(self, metrics: StepMetrics, lane: int, count: int) -> StepMetrics:
        """The metrics of one lane's steps."""
        if self.program.members is None:
            return metrics
        return jax.tree.map(lambda leaf: leaf[lane, :count], metrics)

    def _evaluate(self, due: dict[int, Run]) -> dict[int, tuple[Line, str]]:
        """By lane: what validation says of the model, and a sample of its text."""
        program, states = self.program, self.states
        assert states is not None
        scores = program.scores(states.averaged)
        if states.ema is not None:
            for known, raw in zip(scores, program.scores(states.model), strict=True):
                known["val/raw_loss"] = raw["val/loss"]  # not averaged
        for known, entropies in zip(scores, program.entropies(states.averaged), strict=True):
            for layer, entropy in enumerate(entropies):
                known[f"attention_entropy/layer_{layer}"] = entropy
        samples = [""] * len(self.lanes)
        if num_chars := max(run.config.trainer.sample_chars for run in due.values()):
            some = next(iter(due.values()))
            keys = [((run or some).config.seed, (run or some).step) for run in self.lanes]
            samples = program.samples(states.averaged, keys, num_chars)
            if ended := [r for lane, r in due.items() if r.ends_with(scores[lane]["val/loss"])]:
                begin = time.perf_counter()  # again: now it is compiled
                program.samples(states.averaged, keys, num_chars)
                speed = num_chars / (time.perf_counter() - begin)
                for run in ended:
                    run.decode_speed = speed
        return {
            lane: (dict(scores[lane]), samples[lane][: run.config.trainer.sample_chars])
            for lane, run in due.items()
        }


def alone(
    program: Program, config: Config, restored: tuple[TrainState, Header] | None = None
) -> tuple[Loop, Run]:
    """The loop of a single run."""
    state, header = restored or (None, None)
    loop, run = Loop(program), Run(program, config, header)
    loop.enter(run, state)
    return loop, run
