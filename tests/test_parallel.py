"""Layouts compute what one device computes, hold what they should, and move no more than that."""

import collections
import functools
import re

import cuda
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from test_checkpoint import make_header

from chargpt import checkpoint
from chargpt.attention import abstract
from chargpt.config import AttentionType, Config, OptimizerName
from chargpt.corpus import make_windows
from chargpt.errors import ConfigError
from chargpt.model import Block
from chargpt.parallel import Devices, choose_devices
from chargpt.run.evaluate import eval_batch_size, evaluate
from chargpt.train import TrainState, init_state, make_inputs, train_steps

VOCAB, STEPS = 11, 50
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)
# Dropout too; eps keeps a gradient near zero from taking its sign from rounding
SIZES = ["trainer.num_devices=null", "trainer.batch_size=8", "model.dropout=0.1"]
SIZES += ["model.d_model=32", "model.num_layers=1", "optimizer.eps=1e-4", "trainer.num_steps=50"]
DATA = ["parallel.data=8"]
FSDP = [*DATA, "parallel.fsdp=true"]
TENSOR = ["parallel.data=1", "parallel.tensor=2"]
BOTH = ["parallel.data=4", "parallel.tensor=2", "parallel.fsdp=true"]


def layout_config(*overrides: str) -> Config:
    return small_config(*SIZES, *overrides)


@functools.cache
def trained(*overrides: str) -> tuple[np.ndarray, TrainState, Devices, str, int]:
    """(losses of STEPS steps, state, devices, compiled text, bytes of arguments on a device)."""
    config = layout_config(*overrides)
    devices = choose_devices(config)
    inputs = devices.replicate(make_inputs(TOKENS, config))
    start = eqx.filter_jit(lambda seed: devices.place(init_state(config, VOCAB, seed)))
    steps = eqx.filter_jit(lambda state: train_steps(state, inputs, config, STEPS, devices))
    state = start(inputs.seed)
    compiled = steps.lower(state).compile()
    memory = compiled.compiled.memory_analysis()
    state, metrics = compiled(state)
    text = compiled.compiled.as_text()
    return np.asarray(metrics.loss), state, devices, text, memory.argument_size_in_bytes


def collectives(text: str) -> collections.Counter[str]:
    return collections.Counter(kind for kind, _ in cuda.collectives(text))


def arrays_of(tree) -> list[jax.Array]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def divides_heads(mha_type: AttentionType, tensor: int) -> bool:
    layer = abstract(Block, layout_config(f"model.mha_type={mha_type.name}").model).attention
    return all(number % tensor == 0 for number in layer.head_counts.values())


def assert_same_losses(*overrides: str, layout: list[str]) -> None:
    alone = trained("parallel.data=1", *overrides)[0]
    np.testing.assert_allclose(trained(*layout, *overrides)[0], alone, rtol=1e-5)
    assert alone[-1] < alone[0]


def test_every_type_learns_the_same_shared_out_in_every_way_at_once(mha_type):
    layout = BOTH if divides_heads(mha_type, 2) else FSDP
    assert_same_losses(f"model.mha_type={mha_type.name}", layout=layout)


@pytest.mark.parametrize("layout", [DATA, FSDP, TENSOR])
def test_every_layout_learns_the_same(layout):
    modifiers = ["model.output_gate=element", "model.sink=learned", "model.window=4"]
    assert_same_losses("model.mha_type=standard", *modifiers, layout=layout)


def test_muon_whose_matrices_are_shared_out_learns_the_same():
    options = ["optimizer.name=muon", "model.num_layers=2", "optimizer.ema_decay=0.9"]
    options += ["trainer.grad_accum_steps=2"]
    assert_same_losses("model.mha_type=selective", *options, layout=BOTH)


def test_data_parallelism_sums_gradients_once_and_moves_nothing_else():
    *_, text, _ = trained(*DATA, "model.mha_type=standard")
    assert collectives(text) == {"all-reduce": 1}


def test_fully_sharded_each_share_is_gathered_once_and_summed_once():
    """XLA for a CPU has no reduce-scatter: it sums a gradient everywhere, and cuts it."""
    _, state, devices, text, arguments = trained(*FSDP, "model.mha_type=standard")
    shared = [leaf for leaf in arrays_of(state.model) if not leaf.sharding.is_fully_replicated]
    # The embedding, the head and norms are smaller than `WHOLE` here
    assert len(shared) == 6
    counts = collectives(text)
    assert counts.pop("all-gather") == len(shared)
    assert counts.pop("all-reduce") <= len(shared) + 1 and not counts
    whole = sum(leaf.nbytes for leaf in arrays_of(state) if leaf.sharding.is_fully_replicated)
    rest = sum(leaf.nbytes for leaf in arrays_of(state)) - whole
    assert arguments <= (rest / len(devices) + whole) * 1.05
    largest = max(leaf.nbytes for leaf in shared)
    gathered = [size for kind, size in cuda.collectives(text) if kind == "all-gather"]
    assert max(gathered) <= largest


@pytest.mark.parametrize("optimizer", OptimizerName)
def test_tensor_parallelism_cuts_heads_and_the_feed_forward_layer(optimizer):
    _, state, _, text, _ = trained(
        *TENSOR, "model.mha_type=mla", f"optimizer.name={optimizer.name}"
    )
    block = state.model.stacked
    cut = {"attention.kv_b_proj": 1, "attention.o_proj": 2}
    cut |= {"feed_forward.up_proj": 1, "feed_forward.down_proj": 2, "attention.kv_a_proj": None}
    for path, axis in cut.items():
        weight = functools.reduce(getattr, path.split("."), block).weight
        parts = {shard.data.shape for shard in weight.addressable_shards}
        halved = [side // 2 if i == axis else side for i, side in enumerate(weight.shape)]
        assert parts == {tuple(halved)}
    if optimizer is OptimizerName.adamw:
        assert set(collectives(text)) == {"all-reduce"}


def test_a_state_stays_where_its_layout_keeps_it():
    """Parameters, moments and averages alike; the step that made it does not change that."""
    overrides = [*BOTH, "model.mha_type=selective", "optimizer.name=muon", "model.num_layers=2"]
    overrides += ["optimizer.ema_decay=0.9", "trainer.grad_accum_steps=2"]
    _, state, devices, *_ = trained(*overrides)
    paths = jax.tree_util.tree_leaves_with_path(eqx.filter(state, eqx.is_array))
    cut = 0
    for path, leaf in paths:
        spec = devices.spec(jax.tree_util.keystr(path), leaf.shape, fsdp=True)
        placed = jax.sharding.NamedSharding(devices.mesh, spec)
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim), path
        cut += not leaf.sharding.is_fully_replicated
    # Weights and their average; momentum of keys and values is in two parts each
    assert cut == 6 + 6 + 8
    copies = arrays_of(devices.first(state.model))
    assert all(len(leaf.devices()) == 1 for leaf in copies)
    for one, placed in zip(copies, arrays_of(state.model), strict=True):
        np.testing.assert_array_equal(one, placed)


def test_weights_at_the_start_are_the_same_bits_in_every_layout():
    def start(*overrides: str) -> list[jax.Array]:
        config = layout_config(*overrides)
        devices = choose_devices(config)
        make = eqx.filter_jit(lambda seed: devices.place(init_state(config, VOCAB, seed)))
        return arrays_of(make(devices.replicate(jnp.uint32(3))))

    for one, other in zip(start("parallel.data=1"), start(*BOTH), strict=True):
        np.testing.assert_array_equal(one, other)


LAYOUTS = [["parallel.data=1"], DATA, FSDP, TENSOR, BOTH]


@pytest.mark.parametrize("after", LAYOUTS)
def test_a_checkpoint_is_the_same_file_from_any_layout_and_fits_into_any(after, tmp_path):
    """Saved from the widest layout, with every kind of leaf; and saved again from another one."""
    overrides = ["model.mha_type=selective", "optimizer.name=muon", "model.num_layers=2"]
    overrides += ["optimizer.ema_decay=0.9", "trainer.grad_accum_steps=2"]
    _, state, *_ = trained(*BOTH, *overrides)
    path, config = tmp_path / "last.eqx", layout_config(*overrides)
    header = make_header(config, vocabulary="abcdefghijk", step=STEPS)
    checkpoint.save(path, state, header)
    read = checkpoint.load(path, on_host=True)[0]
    placed = choose_devices(layout_config(*after)).place(read)
    for was, now in zip(arrays_of(state), arrays_of(placed), strict=True):
        np.testing.assert_array_equal(np.asarray(was), np.asarray(now))
    checkpoint.save(tmp_path / "again.eqx", placed, header)
    assert (tmp_path / "again.eqx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layout", [DATA, BOTH])
def test_an_evaluation_shared_out_equals_that_of_one(layout):
    config = layout_config(*layout)
    devices = choose_devices(config)
    model = eqx.filter_jit(lambda: init_state(config, VOCAB, config.seed))().model
    windows, precision = make_windows(TOKENS, config.dataset.seq_len), config.trainer.precision
    for batch_size in (eval_batch_size(windows), 3):
        alone = evaluate(model, windows, batch_size, precision)
        shared = evaluate(devices.place(model), windows, batch_size, precision, devices)
        assert shared == pytest.approx(alone, rel=1e-6)


def devices_of(*overrides: str) -> Devices:
    return choose_devices(small_config("trainer.num_devices=null", *overrides))


def test_by_default_as_many_devices_as_share_the_batch_evenly():
    assert len(devices_of("trainer.batch_size=6")) == 6
    assert len(devices_of("trainer.batch_size=11")) == 1
    assert len(devices_of("trainer.batch_size=12", "trainer.grad_accum_steps=4")) == 3
    assert len(devices_of("trainer.num_devices=1")) == 1
    assert len(devices_of("trainer.batch_size=6", "parallel.tensor=2")) == 6
    assert str(devices_of()) == "4 x cpu"
    assert str(devices_of("parallel.tensor=2", "parallel.fsdp=true")) == (
        "8 x cpu (data 4 x tensor 2) fsdp"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.num_devices=16", "trainer.batch_size=16"],
            "trainer.num_devices=16: there are 8 (cpu); write that or fewer, or null",
        ),
        (
            ["parallel.data=8", "parallel.tensor=2", "trainer.batch_size=8"],
            "parallel.data x parallel.tensor=16: there are 8 (cpu); write that or fewer, or null",
        ),
        (["parallel.data=3"], "parallel.data=3: does not divide trainer.batch_size"),
        (
            ["parallel.data=2", "trainer.num_devices=4"],
            "trainer.num_devices=4: parallel.data=2 x parallel.tensor=1 needs another number",
        ),
        (
            ["parallel.tensor=2", "model.mha_type=mqa"],
            "parallel.tensor=2: does not divide mqa attention's key/value heads=1; write one of 1",
        ),
        (
            ["parallel.tensor=3", "model.d_model=24", "model.num_heads=3", "model.d_ff=32"],
            "parallel.tensor=3: does not divide the feed-forward layer's width=32",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        devices_of(*overrides)
