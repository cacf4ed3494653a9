"""Populations: each member is the run that it would be by itself."""

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from conftest import small_config
from programs import metrics

from chargpt import checkpoint, config
from chargpt.config import AttentionType, Config
from chargpt.corpus import Corpus, load_corpus
from chargpt.errors import ConfigError, RunFailed
from chargpt.run import population
from chargpt.run.population import Job, number_of_lanes, shared_step, train_jobs
from chargpt.run.program import Program
from chargpt.run.start import resume, train
from chargpt.train import TrainState

OPTIMIZERS = {
    "adamw": ["optimizer.ema_decay=0.9", "dataset.sampling=epochs"],
    "muon": ["optimizer.name=muon", "model.dropout=0.1"],
}
# Members of different seeds, numbers and lengths, in steps of 2
MEMBERS = (
    ["seed=0", "trainer.num_steps=6"],
    ["seed=1", "trainer.num_steps=4", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=2"],
    ["seed=2", "trainer.num_steps=6", "optimizer.weight_decay=0.5"],
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(small_config().dataset)


def trained(program: Program, configs: Sequence[Config]) -> list[TrainState]:
    """The state of each configuration's run at its end."""
    states = None
    for lane, own in enumerate(configs):
        states = program.put(states, lane, program.initial_state(own.seed))
    inputs, ends = program.inputs(configs), [own.trainer.num_steps for own in configs]
    program.compile([2], inputs)
    for _ in range(max(ends) // 2 if program.members else ends[0] // 2):
        assert states is not None
        states, _ = program.train(2, states, inputs, ends)
    assert states is not None
    return [program.take(states, lane) for lane in range(len(configs))]


def arrays(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))]


def assert_close(one: TrainState, other: TrainState) -> None:
    for left, right in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-6)


def test_a_member_is_the_run_that_it_would_be_by_itself(
    mha_type: AttentionType, corpus: Corpus
) -> None:
    """With Muon, which trains a part of the model with Adam."""
    assert_members_are_runs(corpus, f"model.mha_type={mha_type.name}", *OPTIMIZERS["muon"])


def test_so_it_is_with_adamw_and_what_crosses_the_types(corpus: Corpus) -> None:
    modifiers = ["model.output_gate=head", "model.sink=learned", "model.window=4"]
    assert_members_are_runs(corpus, "model.mha_type=selective", *OPTIMIZERS["adamw"], *modifiers)


def assert_members_are_runs(corpus: Corpus, *common: str) -> None:
    configs = [small_config("model.num_layers=1", *common, *own) for own in MEMBERS]
    together = Program(configs[0], corpus, len(configs))
    alone = Program(configs[0], corpus)
    for member, own in zip(trained(together, configs), configs, strict=True):
        assert int(member.step) == own.trainer.num_steps
        assert_close(member, trained(alone, [own])[0])


def test_a_lane_and_what_is_in_the_others_change_no_bit(corpus: Corpus) -> None:
    configs = [small_config(*own) for own in MEMBERS]
    wild = small_config(*MEMBERS[1], "optimizer.learning_rate=1e30")
    program = Program(configs[0], corpus, 3)
    first = trained(program, configs)
    second = trained(program, [configs[2], wild, configs[0]])
    for one, other in ((first[0], second[2]), (first[2], second[0])):
        for left, right in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "layout", [[], ["parallel.tensor=2"], ["parallel.fsdp=true", "parallel.data=2"]]
)
def test_members_keep_the_layout_that_one_run_would_have(layout: list[str], corpus: Corpus) -> None:
    common = ["trainer.num_devices=null", "model.num_layers=1", *layout]
    configs = [small_config(*common, *own) for own in (MEMBERS[0], MEMBERS[2])]
    together = Program(configs[0], corpus, 2)
    assert together.devices.apart == 2 and len(together.devices) in (4, 8)  # batches are shared
    for member, own in zip(trained(together, configs), configs, strict=True):
        assert_close(member, trained(Program(own, corpus), [own])[0])


# ---- which jobs are one program, and how many at once


def test_jobs_share_a_program_if_they_differ_only_in_its_inputs(corpus: Corpus) -> None:
    def key(*overrides: str) -> str:
        return shared_step(small_config(*overrides), corpus.sha256)

    for name, (field, facts) in config.options().items():
        if facts.traced and field.type in (int, float):
            assert key(f"{name}=0.25" if field.type is float else f"{name}=77") == key()
    assert key("optimizer.warmup_steps=7") == key("wandb.name=other") == key()
    for own in ("model.d_model=32", "trainer.batch_size=8", "optimizer.beta1=0.5"):
        assert key(own) != key()
    muon = "optimizer.name=muon"
    assert key(muon) != key(muon, "optimizer.adam_learning_rate=0.1")  # one number more
    assert shared_step(small_config(), "another text") != key()


@pytest.mark.parametrize(
    ("jobs", "most", "lanes"),
    [(1, None, 1), (3, None, 3), (8, None, 8), (12, None, 16), (12, 8, 6), (12, 5, 4), (18, 10, 9)],
)
def test_lanes_are_as_many_as_jobs_or_equal_parts_of_them_and_fill_the_devices(
    jobs: int, most: int | None, lanes: int
) -> None:
    assert number_of_lanes(small_config("trainer.num_devices=null"), jobs, most) == lanes


def test_as_many_members_as_fit_in_memory(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    own = small_config("model.num_layers=1", "trainer.log_every=2")
    program = population.fitting(own, corpus, 6, None)
    assert program.members == 6
    text, needed = 4 * len(corpus.train), program.memory_bytes
    assert needed is not None
    monkeypatch.setattr(population, "memory_limit", lambda: text + (needed - text) * 2 // 3)
    assert population.fitting(own, corpus, 6, None).members == 3  # twice as many are too many
    assert population.fitting(own, corpus, 6, 6).members == 6  # as was asked for


# ---- from jobs to run directories

TRAINER = {
    "num_steps": 8,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 4,
    "eval_tokens": 64,
    "sample_chars": 5,
}
SMALL = ["model.num_layers=1", "optimizer.warmup_steps=2", "mode=disabled"]
SMALL += [f"trainer.{name}={value}" for name, value in TRAINER.items()]


def job(run_dir: Path, *overrides: str) -> Job:
    run_dir.mkdir(parents=True, exist_ok=True)
    return Job(small_config(*SMALL, *overrides), run_dir)


def test_every_job_leaves_what_it_would_leave_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More jobs than lanes, of several lengths; four fail, each in its own way and alone."""

    def broken(step: int, loss: float) -> bool:
        raise ValueError("unexpected")

    diverging = ["optimizer.learning_rate=1e30", "optimizer.grad_clip=null"]
    jobs = [
        job(tmp_path / "a", "seed=0", "optimizer.grad_clip=null", "mode=offline"),
        job(tmp_path / "b", *diverging, "trainer.max_skipped_steps=2"),
        job(tmp_path / "c", "seed=1", "optimizer.grad_clip=null", "trainer.num_steps=6"),
        job(tmp_path / "d", "seed=2", "optimizer.grad_clip=null", "mode=offline"),
        job(tmp_path / "e", "dataset.name=file", f"dataset.filepath={tmp_path / 'none'}"),
        dataclasses.replace(job(tmp_path / "f", "optimizer.grad_clip=null"), watch=broken),
        job(tmp_path / "g", "trainer.num_devices=16", "trainer.batch_size=16"),
    ]
    outcomes = {done.name: outcome for done, outcome in train_jobs(jobs, most=2)}
    assert list(outcomes)[:2] == ["e", "b"] and {*outcomes} == {*"abcdefg"}
    assert isinstance(outcomes["e"], ConfigError) and isinstance(outcomes["b"], RunFailed)
    assert repr(outcomes["f"]) == "ValueError('unexpected')"
    assert str(outcomes["b"]).startswith("stopped at step ")
    assert str(outcomes["g"]).startswith("trainer.num_devices=16: there are 8 (cpu)")
    out = capsys.readouterr().out
    assert "room for 2 members" in out and out.count("attention  standard") == 1
    rows = [line.split()[:2] for line in out.splitlines() if line.endswith("  best")]
    assert ["a", "4"] in rows and ["c", "6"] in rows and ["d", "8"] in rows
    for one in (jobs[0], jobs[2], jobs[3]):
        alone = tmp_path / "alone" / one.name
        alone.mkdir(parents=True)
        loss = train(dataclasses.replace(one.config, mode=config.Mode.disabled), alone)
        assert loss == pytest.approx(outcomes[one.name], rel=1e-5)
        together, apart = metrics(one.run_dir), metrics(alone)
        assert [line.keys() for line in together] == [line.keys() for line in apart]
        for left, right in zip(together, apart, strict=True):
            assert left["trainer/step"] == right["trainer/step"]
            assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-5)
        names = {path.name for path in one.run_dir.iterdir()}
        assert {path.name for path in alone.iterdir()} == names - {"wandb"}
        summary = json.loads((one.run_dir / "summary.json").read_text())
        assert summary["population"] == 2
        assert summary["final/step"] == one.config.trainer.num_steps
        assert summary["decode_tokens_per_second"] > 0
    ids = {(tmp_path / name / "wandb" / "run_id").read_text() for name in ("a", "d")}
    assert len(ids) == 2
    capsys.readouterr()
    resume(tmp_path / "c", ["trainer.num_steps=8"])
    assert "not bit-exact: devices" in capsys.readouterr().out
    assert [line["trainer/step"] for line in metrics(tmp_path / "c")] == [2, 4, 6, 8]


def test_a_signal_lets_a_member_save_that_is_not_due_to(tmp_path: Path) -> None:
    """It has entered late: nothing is due of it where another one is evaluated and stopped."""

    def stop(step: int, loss: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    late, short = job(tmp_path / "late"), job(tmp_path / "short", "trainer.num_steps=2")
    first = dataclasses.replace(job(tmp_path / "first"), watch=stop)
    with pytest.raises(SystemExit):
        list(train_jobs([first, short, late], most=2))
    assert checkpoint.read_header(late.run_dir / "checkpoints" / "last.eqx")[0].step == 2
    assert json.loads((late.run_dir / "summary.json").read_text())["final/step"] == 2


def test_a_signal_lets_all_members_save_and_each_continues_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(step: int, loss: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    jobs = [job(tmp_path / name, f"seed={name}") for name in "01"]
    with pytest.raises(SystemExit) as ended:
        list(train_jobs([dataclasses.replace(jobs[0], watch=stop), jobs[1]], most=2))
    assert ended.value.code == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    for one in jobs:
        assert f"{one.name}: stopped by a signal at step 4" in out
        assert json.loads((one.run_dir / "summary.json").read_text())["final/step"] == 4
        resume(one.run_dir, [])
        assert [line["trainer/step"] for line in metrics(one.run_dir)] == [2, 4, 6, 8]
        assert json.loads((one.run_dir / "summary.json").read_text())["population"] == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[a-z]*.*")}
    other = Job(small_config(*SMALL, "seed=0", "trainer.batch_size=8"), jobs[0].run_dir)
    outcomes = {done: outcome for done, outcome in train_jobs([*jobs, other], most=2)}
    assert (
        outcomes[jobs[1]] == json.loads((tmp_path / "1/summary.json").read_text())["best/val_loss"]
    )
    assert "holds a run of another configuration" in str(outcomes[other])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[a-z]*.*")} == before
