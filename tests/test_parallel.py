"""Devices that share a batch compute what one device computes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from chargpt.config import Config
from chargpt.corpus import make_windows
from chargpt.errors import ConfigError
from chargpt.parallel import Devices, choose_devices
from chargpt.run.evaluate import eval_batch_size, evaluate
from chargpt.train import TrainState, init_state, make_inputs, train_step, train_steps

VOCAB = 11
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, 400), jnp.int32)


def shared_config(*overrides: str) -> Config:
    return small_config("trainer.num_devices=null", *overrides)


def devices_of(*overrides: str) -> Devices:
    return choose_devices(shared_config(*overrides))


def initial(config: Config) -> TrainState:
    return eqx.filter_jit(lambda: init_state(config, VOCAB, config.seed))()


def weights_of(state: TrainState) -> list[jax.Array]:
    return jax.tree.leaves(eqx.filter(state.model, eqx.is_inexact_array))


def test_there_are_two_devices_to_test_with():
    assert len(jax.devices()) == 2


def test_a_step_shared_by_two_equals_the_step_of_one(mha_type):
    check_step(f"model.mha_type={mha_type.name}", "model.num_layers=1")


def test_a_step_of_muon_which_shares_out_layers_equals_the_step_of_one():
    check_step("model.mha_type=selective", "optimizer.name=muon")


def check_step(*overrides: str) -> None:
    config = shared_config("model.dropout=0.1", *overrides)
    devices = choose_devices(config)
    assert len(devices) == 2
    state = initial(config)
    alone, shared = (
        eqx.filter_jit(lambda inputs, d=d: train_step(state, inputs, config, d))(inputs)
        for d, inputs in (
            (None, make_inputs(TOKENS, config)),
            (devices, devices.replicate(make_inputs(TOKENS, config))),
        )
    )
    np.testing.assert_allclose(shared[1].loss, alone[1].loss, rtol=1e-5)
    np.testing.assert_allclose(shared[1].grad_norm, alone[1].grad_norm, rtol=1e-4)
    # Adam's first update is learning_rate * sign(gradient): near zero, rounding decides it
    tolerance = 2.1 * float(alone[1].learning_rate)
    for one, two in zip(weights_of(alone[0]), weights_of(shared[0]), strict=True):
        np.testing.assert_allclose(two, one, atol=tolerance)
        assert np.mean(np.abs(two - one) > 1e-5) < 0.02


@pytest.mark.parametrize("parts", [1, 2])
def test_every_device_ends_with_the_complete_state_whatever_its_share_was(parts):
    batch = ["trainer.batch_size=8", f"trainer.grad_accum_steps={parts}"]
    config = shared_config("optimizer.name=muon", *batch)
    devices = choose_devices(config)
    state = devices.replicate(initial(config))
    steps = eqx.filter_jit(lambda state, inputs: train_steps(state, inputs, config, 3, devices))
    state, metrics = steps(state, devices.replicate(make_inputs(TOKENS, config)))
    assert metrics.loss.shape == (3,)
    arrays = eqx.filter(state, eqx.is_array)
    for leaf in jax.tree.leaves(arrays):
        assert leaf.sharding.is_fully_replicated and len(leaf.addressable_shards) == 2
        first, second = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(first, second)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(devices.first(arrays)))


def test_an_evaluation_shared_by_two_equals_that_of_one():
    config = shared_config()
    devices = choose_devices(config)
    model, windows = initial(config).model, make_windows(np.asarray(TOKENS), config.dataset.seq_len)
    for batch_size in (eval_batch_size(windows), 3):
        alone = evaluate(model, windows, batch_size, config.trainer.precision)
        copies, precision = devices.replicate(model), config.trainer.precision
        shared = evaluate(copies, windows, batch_size, precision, devices)
        assert shared == pytest.approx(alone, rel=1e-6)


def test_by_default_as_many_devices_as_share_the_batch_evenly():
    assert len(devices_of("trainer.batch_size=6")) == 2
    assert len(devices_of("trainer.batch_size=5")) == 1
    assert len(devices_of("trainer.batch_size=6", "trainer.grad_accum_steps=2")) == 1
    assert len(devices_of("trainer.num_devices=1")) == 1
    assert str(devices_of()) == "2 x cpu"


def test_more_devices_than_there_are_are_refused_in_one_line():
    message = r"^trainer.num_devices=4: there are 2 \(cpu\); write that or fewer, or null$"
    with pytest.raises(ConfigError, match=message):
        devices_of("trainer.num_devices=4")
