"""Populations: runs whose compiled step is the same train as members of one program.

Each run keeps its directory, its records and its end; only the step is shared. Small models leave a
GPU idle, so that several of them cost hardly more than one (docs/sweeps.md).
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from chargpt.checkpoint import file_of, read_header
from chargpt.config import Config, options, settings_of
from chargpt.corpus import Corpus
from chargpt.errors import ConfigError, note, require
from chargpt.optimizer import hyperparameters
from chargpt.origin import load_text
from chargpt.parallel import choose_devices, offer_cpu_devices
from chargpt.run import cache
from chargpt.run.console import MemberConsole, PopulationConsole
from chargpt.run.directory import cut_records
from chargpt.run.loop import Loop, NotFinite, Report, Run, next_boundary
from chargpt.run.machine import memory_limit
from chargpt.run.process import StopSignal, lock
from chargpt.run.program import Program
from chargpt.run.recorder import Recorder
from chargpt.run.resume import check_corpus, is_complete, restore
from chargpt.run.start import BY_SIGNAL, GAVE_UP, Watch, gives_up, not_finite, result

Outcome = float | Exception  # the best validation loss, or why there is none


@dataclasses.dataclass(eq=False)
class Job:
    """A run to train in `run_dir`, or to continue there."""

    config: Config
    run_dir: Path
    loss: float | None = None  # if it is done
    held: contextlib.ExitStack | None = None  # the lock on `run_dir`, if it is taken already
    watch: Watch | None = None
    first_command: str = ""  # that trains this job alone, if it has not begun

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def num_steps(self) -> int:
        return self.config.trainer.num_steps


@dataclasses.dataclass
class Member:
    """A job at work: its run, its records, the lock on its directory."""

    job: Job
    run: Run
    recorder: Recorder
    held: contextlib.ExitStack


def shared_step(config: Config, corpus_sha256: str) -> str:
    """What the compiled step of a run depends on: runs with the same can be one program."""
    every = settings_of(config)
    fixed = {
        name: every[name]
        for name, (_, facts) in options().items()
        if not (facts.traced or facts.incidental)
    }
    structure = jax.tree.structure(hyperparameters(config))  # an option may be left out
    return json.dumps([fixed, str(structure), corpus_sha256], sort_keys=True)


def number_of_lanes(config: Config, jobs: int, most: int | None) -> int:
    """How many of `jobs` train at once: all, or equal parts of them, at most `most`.

    If there are more lanes than devices, their number is rounded up to a multiple: the extra lanes
    cost no time, since the devices wait for the fullest one.
    """
    rounds = 1 if most is None else -(-jobs // most)
    lanes = -(-jobs // rounds)
    apart = choose_devices(config, jax.device_count()).apart
    full = -(-lanes // apart) * apart
    return full if lanes > apart and (most is None or full <= most) else lanes


def fitting(config: Config, corpus: Corpus, jobs: int, most: int | None) -> Program:
    """The program for as many members as `most` allows, or, if that is None, as fit in memory."""
    chosen, first = most, next_boundary(config, 0)
    while True:
        lanes = number_of_lanes(config, jobs, chosen)
        program = Program(config, corpus, None if lanes == 1 else lanes)
        program.compile([first], program.inputs([config] * lanes))
        text = 4 * len(corpus.train)  # bytes, which all members share
        needed, limit = (program.memory_bytes or 0) - text, memory_limit() - text
        if most is not None or lanes == 1 or needed <= limit:
            return program
        chosen = max(1, min(lanes - 1, lanes * limit // needed))


class Corpora:
    """Texts, read once each."""

    def __init__(self) -> None:
        self._known: dict[str, Corpus] = {}

    def of(self, config: Config, run_dir: Path) -> Corpus:
        """The corpus of the run in `run_dir`; ConfigError if there is none."""
        text = f"{config.dataset} {config.init_from}"
        if text not in self._known:
            last = file_of(run_dir, "last")
            begun = config.init_from is not None and last.exists()
            self._known[text] = load_text(
                config, read_header(last)[0].vocabulary if begun else None
            )
        return self._known[text]


class Population:
    """Jobs of one `shared_step`, which train until there is no next one, or a signal comes."""

    def __init__(
        self, program: Program, next_job: Callable[[], Job | None], stop: StopSignal, names: int
    ):
        """`names`: the width of the longest name among the jobs."""
        self.program, self.next_job, self.stop = program, next_job, stop
        self.step = shared_step(program.config, program.corpus.sha256)
        self.loop = Loop(program)
        self.console = PopulationConsole(names)
        self.members: dict[Run, Member] = {}

    def train(self, num_steps: int) -> Iterator[tuple[Job, Outcome]]:
        """Every job and how it ended; `num_steps` of all jobs together are what the bar shows.

        If a signal stops it, all save; then SystemExit with the usual code (128 + signal).
        """
        try:
            yield from self._fill()
            self.loop.compile()
            self._say_compiled()
            with self.console.progress(num_steps, 0):
                for run, report in self.loop.reports(self.stop.requested):
                    yield from self._take(self.members[run], report)
                    yield from self._fill()
            if self.stop.number is not None:
                for member in list(self.members.values()):
                    self._stop(member, 128 + self.stop.number)
                raise SystemExit(128 + self.stop.number)
        except BaseException as error:
            for member in list(self.members.values()):
                self._end(member, error)
            raise

    def _take(self, member: Member, report: Report | NotFinite) -> Iterator[tuple[Job, Outcome]]:
        """Record a report on a member; its outcome, if that was the last."""
        try:
            loss = self._record(member, report)
        except Exception as error:  # whatever it was, the other members train
            yield self._end(member, error), error
        else:
            if loss is not None:
                yield self._end(member), loss

    def _record(self, member: Member, report: Report | NotFinite) -> float | None:
        """The loss of a member that trains no more."""
        run, recorder = member.run, member.recorder
        if isinstance(report, NotFinite):
            raise not_finite(recorder, member.job.run_dir, report)
        recorder.take(report)
        stops = gives_up(member.job.watch, run, report)
        if not (stops or report.is_last):
            return None
        recorder.finish(0, GAVE_UP.format(run.step) if stops else None)
        return result(recorder)

    def _stop(self, member: Member, exit_code: int) -> None:
        """Complete the records of a run that will continue another time."""
        recorder, problem = member.recorder, None
        try:
            recorder.finish(exit_code, BY_SIGNAL.format(member.run.step))
        except Exception as error:
            problem = error
        if problem or recorder.unsaved:
            self.console.say(f"{member.job.name}: not saved ({problem or recorder.unsaved})")
        self._end(member, problem)

    def _fill(self) -> Iterator[tuple[Job, Outcome]]:
        """Let jobs enter the lanes that are free; those that need no training end at once."""
        while None in self.loop.lanes and self.stop.number is None:
            if (job := self.next_job()) is None:
                return
            try:
                loss = self._enter(job)
            except Exception as error:  # whatever it was, the other jobs train
                yield job, error
            else:
                if loss is not None:
                    yield job, loss

    def _enter(self, job: Job) -> float | None:
        """Let a job train; its loss if there is nothing left to train."""
        console = MemberConsole(self.console, job.name)
        config, state, header = job.config, None, None
        with job.held or contextlib.ExitStack() as held:
            if job.held is None:
                held.enter_context(lock(job.run_dir))
            if (job.run_dir / "config.yaml").exists():
                config, restored = restore(job.run_dir, [], console.say, self.program.devices)
                same = shared_step(config, self.program.corpus.sha256) == self.step
                require(same, f"{job.run_dir}: holds a run of another configuration")
                if restored is not None:
                    state, header = restored
                    check_corpus(header, self.program.corpus)
                    if is_complete(job.run_dir, config, header):
                        return header.best_val_loss
                cut_records(job.run_dir, header.record_sizes if header else {})
            run = Run(self.program, config, header)
            recorder = Recorder(run, job.run_dir, console)
            try:
                self.loop.enter(run, state)
                if run.ended:  # all but its summary
                    recorder.finish(0, None)
                    return result(recorder)
            except Exception as error:
                recorder.fail(error)
                raise
            console.begin(run.step)
            self.members[run] = Member(job, run, recorder, held.pop_all())
        return None

    def _end(self, member: Member, error: BaseException | None = None) -> Job:
        """Let go of a run that trains no more."""
        if error is not None:
            with contextlib.suppress(Exception):  # it was perhaps the disk that failed
                member.recorder.fail(error)
        self.console.forget(member.job.name)
        if member.run in self.loop.runs:
            self.loop.leave(member.run)
        self.members.pop(member.run, None)
        member.held.close()
        return member.job

    def _say_compiled(self) -> None:
        program = self.program
        if not self.members:
            return
        how = "read" if program.compile_cached else "compiled"
        used, most = (program.memory_bytes or 0) / 1e6, memory_limit() / 1e6
        self.console.say(
            f"{how} one program for {len(self.members)} runs in {program.compile_seconds:.1f} s; "
            f"{used:,.0f} of {most:,.0f} MB a device; attention by {program.kernel}\n"
        )


def train_jobs(jobs: Sequence[Job], most: int | None) -> Iterator[tuple[Job, Outcome]]:
    """Train every job that is not done, those of one `shared_step` at once, group after group.

    How many lanes a program has follows from all jobs, those that are done among them: so the same
    jobs give the same numbers, however often they are interrupted.
    """
    offer_cpu_devices()
    corpora, groups = Corpora(), dict[str, list[Job]]()
    with StopSignal() as stop, cache.kept_executables(note):
        for job in jobs:
            try:
                key = shared_step(job.config, corpora.of(job.config, job.run_dir).sha256)
            except ConfigError as error:
                yield job, error
            else:
                groups.setdefault(key, []).append(job)
        for group in groups.values():
            waiting = [job for job in group if job.loss is None]
            if not waiting:
                continue
            config, num_steps = group[0].config, sum(job.num_steps for job in waiting)
            next_job = functools.partial(next, iter(waiting), None)
            width, left = max(len(job.name) for job in group), dict.fromkeys(waiting)
            try:
                program = fitting(config, corpora.of(config, group[0].run_dir), len(group), most)
                for job, outcome in Population(program, next_job, stop, width).train(num_steps):
                    left.pop(job)
                    yield job, outcome
            except Exception as error:  # of the program, not of a job: other groups train
                for job in left:
                    yield job, error
