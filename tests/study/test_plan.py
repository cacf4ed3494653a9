"""The formulas of `chargpt plan` against what XLA compiles, and its printed page."""

import re

import pytest
from cuda import collectives
from test_parallel import BOTH, DATA, FSDP, TENSOR, VOCAB, divides_heads, layout_config, trained

from chargpt import cli
from chargpt.errors import ConfigError
from chargpt.study.plan import ACTIVATIONS, PlanOptions, plan, scaling

STATE = ("parameters", "moments", "averages")
MUON = ["optimizer.name=muon", "model.num_layers=2", "optimizer.ema_decay=0.9"]
MUON += ["model.mha_type=selective", "trainer.grad_accum_steps=2"]


def moved(text: str, wanted: str) -> int:
    """Bytes of the complete arrays that a step's collectives of that kind make."""
    return sum(size for kind, size in collectives(text) if kind == wanted)


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [(DATA, ["model.mha_type=standard"]), (FSDP, ["model.mha_type=standard"]), (BOTH, MUON)],
)
def test_a_device_holds_the_state_that_was_planned(layout, overrides):
    *_, devices, _, arguments = trained(*layout, *overrides)
    found = plan(layout_config(*layout, *overrides), len(devices), VOCAB)
    held = sum(found.held.get(part, 0) for part in STATE)
    assert arguments == pytest.approx(held, rel=0.01)  # beside it, the counters of steps


def test_what_moves_was_planned():
    overrides = ["model.mha_type=standard", "trainer.precision=float32"]
    sent = plan(layout_config(*DATA, *overrides), 8, VOCAB).sent
    *_, text, _ = trained(*DATA, "model.mha_type=standard")
    assert moved(text, "all-reduce") == pytest.approx(
        sent["sums of gradients"] * 8 / 7 / 2, rel=0.01
    )
    sent = plan(layout_config(*FSDP, *overrides), 8, VOCAB).sent
    *_, text, _ = trained(*FSDP, "model.mha_type=standard")
    # The formula leaves out that small arrays are not cut: the vocabulary has eleven symbols
    assert moved(text, "all-gather") == pytest.approx(sent["weights"] * 8 / 7, rel=0.1)
    sent = plan(layout_config(*TENSOR, *overrides), 2, VOCAB).sent
    *_, text, _ = trained(*TENSOR, "model.mha_type=standard")
    # XLA for a CPU sums the gradients of all four projections that read the stream by themselves
    assert moved(text, "all-reduce") == pytest.approx(sent[ACTIVATIONS] * 6 / 4, rel=0.05)


def test_every_type_is_planned_and_more_devices_hold_less(mha_type):
    options = ["trainer.batch_size=64", f"model.mha_type={mha_type.name}", "parallel.fsdp=true"]
    options += ["parallel.tensor=2"] if divides_heads(mha_type, 2) else []
    totals = [
        sum(plan(layout_config(*options), number, VOCAB).held.values()) for number in (2, 8, 32)
    ]
    assert totals == sorted(totals, reverse=True) and totals[2] < 0.7 * totals[0]


def test_a_batch_ends_where_it_has_no_more_sequences():
    config = layout_config("trainer.batch_size=64", "parallel.fsdp=true")
    rows = scaling(config, PlanOptions((), devices=8), VOCAB)
    assert list(rows) == [8, 64, 512]
    assert rows[512] == "more parts than sequences"
    assert rows[8][1] == pytest.approx(8 * rows[64][1])  # an eighth of the computing
    with pytest.raises(ConfigError, match=r"^devices=3: parallel.tensor=2 does not divide it$"):
        plan(layout_config("parallel.tensor=2"), 3, VOCAB)


def test_the_page_says_whether_it_fits_and_what_to_do(capsys):
    model = ["model.d_model=1024", "model.num_layers=12", "dataset.seq_len=1024", "devices=64"]
    command = ["plan", *model, "trainer.batch_size=512", "parallel.fsdp=true", "vocabulary=50257"]
    assert cli.run_tool([*command, "memory=1"]) == 0
    page = capsys.readouterr().out
    assert "64 devices: data 64 x tensor 1, fully sharded; 8 sequences at a time each" in page
    assert "does not fit in 1 GB; trainer.grad_accum_steps=N" in page
    held, sent = page.split("a device sends")
    numbers = [
        float(line.split()[-1]) for line in held.splitlines() if re.search(r"\d\.\d{3}$", line)
    ]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.003)
    assert "weights" in sent and "more parts than sequences" in sent
    assert cli.run_tool(["plan", "model.d_modl=3"]) == 2
    assert "did you mean model.d_model?" in capsys.readouterr().err
