"""The training step, and what a run of steps promises: the same numbers, however they are cut."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import filled, small_config

from chargpt.attention import AbstractAttention, GroupedQueryAttention
from chargpt.config import AttentionType, Config, Precision, options
from chargpt.corpus import epoch_batch, make_windows
from chargpt.optimizer import Hyperparameters
from chargpt.run.evaluate import attention_entropy, evaluate
from chargpt.train import (
    Stream,
    TrainState,
    cross_entropy,
    draw_batch,
    gradient_norms,
    init_state,
    loss_fn,
    make_inputs,
    random_key,
    train_steps,
)

VOCABULARY = 20
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, 600), jnp.int32)


def one_layer(*overrides: str) -> Config:
    """For what happens around the layers, not in them: half as much to compile."""
    return small_config("model.num_layers=1", *overrides)


def start(config: Config) -> TrainState:
    return eqx.filter_jit(lambda: init_state(config, VOCABULARY, config.seed))()


def compiled(config: Config, num_steps: int):
    return eqx.filter_jit(
        lambda state, tokens: train_steps(state, make_inputs(tokens, config), config, num_steps)
    )


def assert_equal(a: object, b: object) -> None:
    a, b = eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.name)
def test_same_seed_same_curve_bit_for_bit_and_another_seed_another(precision: Precision) -> None:
    config = one_layer("model.dropout=0.1", f"trainer.precision={precision.name}")
    steps = compiled(config, 6)
    first, second = (steps(start(config), TOKENS) for _ in range(2))
    assert_equal(first, second)
    other = one_layer("model.dropout=0.1", f"trainer.precision={precision.name}", "seed=1")
    assert not np.array_equal(compiled(other, 6)(start(other), TOKENS)[1].loss, first[1].loss)
    leaves = jax.tree.leaves(eqx.filter(first[0].model, eqx.is_inexact_array))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_every_type_learns_a_repeating_text_however_its_steps_are_cut_into_chunks(
    mha_type: AttentionType,
) -> None:
    options = ["model.dropout=0.05", "optimizer.warmup_steps=4", "optimizer.learning_rate=1e-2"]
    config = small_config(f"model.mha_type={mha_type.name}", *options)
    tokens = jnp.tile(jnp.arange(VOCABULARY, dtype=jnp.int32), 30)
    begin = start(config)
    whole, metrics = compiled(config, 40)(begin, tokens)
    assert abs(float(metrics.loss[0]) - np.log(VOCABULARY)) < 0.1
    assert float(metrics.loss[-1]) < 0.5 * float(metrics.loss[0])
    assert int(whole.step) == 40 and int(whole.skipped) == 0
    steps = compiled(config, 20)
    state, first = steps(begin, tokens)
    state, second = steps(state, tokens)
    assert_equal(state, whole)
    np.testing.assert_array_equal(np.concatenate([first.loss, second.loss]), metrics.loss)


def test_gradient_accumulation_changes_memory_not_mathematics() -> None:
    whole = one_layer("trainer.batch_size=4")
    parts = one_layer("trainer.batch_size=4", "trainer.grad_accum_steps=4")
    state, metrics = compiled(whole, 1)(start(whole), TOKENS)
    other, other_metrics = compiled(parts, 1)(start(parts), TOKENS)
    np.testing.assert_allclose(other_metrics.loss, metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(other_metrics.grad_norm, metrics.grad_norm, rtol=1e-5)
    moments = [eqx.filter(s.opt_state, eqx.is_inexact_array) for s in (state, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), *moments)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    config = one_layer("optimizer.warmup_steps=0")
    good, _ = compiled(config, 2)(start(config), TOKENS)
    broken = eqx.tree_at(
        lambda s: s.model.embedding, good, good.model.embedding.at[0, 0].set(jnp.inf)
    )
    state, metrics = compiled(config, 3)(broken, TOKENS)
    assert_equal(state.model, broken.model)
    assert_equal(state.opt_state, broken.opt_state)
    assert int(state.step) == 5
    np.testing.assert_array_equal(metrics.skipped_in_a_row, [1, 2, 3])
    mended = eqx.tree_at(lambda s: s.model, state, good.model)
    state, metrics = compiled(config, 1)(mended, TOKENS)
    assert int(state.skipped_in_a_row) == 0 and int(state.skipped) == 3
    assert not np.array_equal(state.model.embedding, good.model.embedding)


def test_with_epochs_the_batch_of_a_step_follows_from_seed_and_step_alone() -> None:
    config = one_layer("dataset.sampling=epochs")
    draw = jax.jit(lambda key, step: draw_batch(make_inputs(TOKENS, config), key, step, config))
    batches = [draw(jax.random.key(step % 2), jnp.asarray(step)) for step in (0, 5, 6, 5)]
    assert_equal(batches[1], draw(jax.random.key(7), jnp.asarray(5)))
    assert_equal(batches[1], batches[3])
    for other in (batches[0], batches[2]):
        assert (batches[1][0] != other[0]).any(axis=1).all()
    draw_with = jax.jit(lambda key: epoch_batch(TOKENS, key, jnp.asarray(5), 4, 16))
    for seed in (0, 1):
        drawn = draw_with(random_key(seed, Stream.epoch))
        assert (drawn[0] == batches[1][0]).all() == (seed == 0)

    state = eqx.tree_at(
        lambda s: s.step, start(config), jnp.asarray(5, jnp.int32)
    )  # as if resumed there
    _, metrics = compiled(config, 1)(state, TOKENS)
    expected = eqx.filter_jit(loss_fn)(state.model, *batches[1], None, jnp.float32)
    np.testing.assert_allclose(metrics.loss[0], expected, rtol=1e-6)


TRACED = {  # every option that is an input of the compiled step, with two values of it
    "seed": (0, 1),
    "trainer.num_steps": (1600, 50),
    "optimizer.learning_rate": (3e-3, 1e-2),
    "optimizer.adam_learning_rate": (1e-2, 2e-2),
    "optimizer.weight_decay": (0.1, 0.2),
    "optimizer.warmup_steps": ("null", 7),
    "optimizer.decay_fraction": (0.2, 0.5),
    "optimizer.final_lr_fraction": (0.1, 0.3),
}


def test_the_inputs_of_a_step_are_the_options_that_say_so() -> None:
    assert TRACED.keys() == {name for name, (_, facts) in options().items() if facts.traced}
    numbers = {field.name for field in dataclasses.fields(Hyperparameters)}
    assert numbers == {name.rpartition(".")[2] for name in TRACED} - {"seed"}


def program(*overrides: str) -> str:
    """What is compiled to initialise a model and to train it for two steps."""
    config = small_config("model.num_layers=1", "dataset.sampling=epochs", *overrides)
    inputs = make_inputs(TOKENS, config)
    make = eqx.filter_jit(lambda seed: init_state(config, VOCABULARY, seed))
    state = filled(eqx.filter_eval_shape(make, inputs.seed), 1.0)
    steps = eqx.filter_jit(lambda state, inputs: train_steps(state, inputs, config, 2))
    return make.lower(inputs.seed).as_text() + steps.lower(state, inputs).as_text()


def test_what_is_compiled_serves_every_seed_and_all_that_searches_vary(
    mha_type: AttentionType,
) -> None:
    """Jobs of a sweep that differ in these numbers compile once: they are known as inputs only."""
    varied = [name for name in TRACED if name != "optimizer.adam_learning_rate"]
    one, two = ([f"{name}={TRACED[name][i]}" for name in varied] for i in range(2))
    kind = f"model.mha_type={mha_type.name}"
    assert program(kind, *one) == program(kind, *two)


def test_so_does_what_is_compiled_for_muon() -> None:
    one, two = ([f"{name}={values[i]}" for name, values in TRACED.items()] for i in range(2))
    muon = ["optimizer.name=muon", "optimizer.schedule=wsd"]
    assert program(*muon, *one) == program(*muon, *two)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_seed_gives_the_same_key_as_a_number_and_as_an_input(seed: int) -> None:
    keys = [
        jax.random.key_data(random_key(form, Stream.step, 7)) for form in (seed, jnp.uint32(seed))
    ]
    assert (keys[0] == keys[1]).all()


def test_the_average_of_the_weights_equals_its_formula_and_passes_over_skipped_steps() -> None:
    """ema_n+1 = d ema_n + (1 - d) weights_n+1 with d = min(ema_decay, (1 + n) / (10 + n)).

    n counts the steps that were not skipped.
    """
    config = one_layer(
        "optimizer.ema_decay=0.2", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.1"
    )
    state, step = start(config), compiled(config, 1)
    assert_equal(state.ema, state.model)
    expected = [
        np.asarray(leaf, np.float64)
        for leaf in jax.tree.leaves(eqx.filter(state.ema, eqx.is_array))
    ]
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):
        broken = eqx.tree_at(
            lambda s: s.model.embedding, state, jnp.full_like(state.model.embedding, jnp.nan)
        )
        skipped, _ = step(broken, TOKENS)
        assert_equal(skipped.ema, state.ema)
        assert int(skipped.skipped) == int(state.skipped) + 1
        state, _ = step(eqx.tree_at(lambda s: s.model, skipped, state.model), TOKENS)
        weights = jax.tree.leaves(eqx.filter(state.model, eqx.is_array))
        expected = [
            decay * old + (1 - decay) * np.asarray(new)
            for old, new in zip(expected, weights, strict=True)
        ]
        for found, wanted in zip(
            jax.tree.leaves(eqx.filter(state.ema, eqx.is_array)), expected, strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert state.averaged is state.ema and not np.array_equal(
        state.ema.embedding, state.model.embedding
    )
    without = eqx.tree_at(lambda s: s.ema, state, None)
    assert without.averaged is without.model
    assert eqx.filter_eval_shape(init_state, small_config(), VOCABULARY, 0).ema is None


def test_muon_from_zeros_over_epochs_learns_a_repeating_text() -> None:
    """The options of a fast run together; the step is given the buffers of the state, as there."""
    config = small_config(
        "model.zero_init=true",
        "model.logit_softcap=15",
        "dataset.sampling=epochs",
        "optimizer.name=muon",
        "optimizer.learning_rate=2e-2",
        "optimizer.adam_learning_rate=2e-2",
        "optimizer.warmup_steps=0",
        "optimizer.ema_decay=0.8",
    )
    tokens = jnp.tile(jnp.arange(VOCABULARY, dtype=jnp.int32), 30)
    steps = eqx.filter_jit(
        lambda inputs, state: train_steps(state, inputs, config, 40), donate="all-except-first"
    )
    inputs = make_inputs(tokens, config)
    state = start(config)
    text = steps.lower(inputs, state).as_text()
    assert "stablehlo.scatter" not in text and "stablehlo.case" not in text
    state, metrics = steps(inputs, state)
    assert float(metrics.loss[0]) == pytest.approx(np.log(VOCABULARY), rel=1e-6)
    assert float(metrics.loss[-1]) < 0.5 * float(metrics.loss[0])
    windows = make_windows(np.asarray(tokens[:200]), config.dataset.seq_len)
    assert evaluate(state.averaged, windows, 4, Precision.float32)["val/loss"] < 0.5 * float(
        metrics.loss[0]
    )


def test_the_logged_learning_rate_is_the_one_that_was_applied() -> None:
    config = one_layer("optimizer.warmup_steps=3", "optimizer.learning_rate=1e-2")
    _, metrics = compiled(config, 4)(start(config), TOKENS)
    np.testing.assert_allclose(metrics.learning_rate, [2.5e-3, 5e-3, 7.5e-3, 1e-2], rtol=1e-6)


def test_cross_entropy_is_that_of_integer_labels() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 7, VOCABULARY))
    targets = jax.random.randint(jax.random.key(1), (5, 7), 0, VOCABULARY)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_is_the_mean_over_every_character_whatever_the_batch(batch_size: int) -> None:
    config = one_layer()
    model, length = start(config).model, config.dataset.seq_len
    split = np.asarray(TOKENS[:170])
    losses, correct = [], []
    for begin in range(0, len(split) - 1, length):  # window after window, the last one short
        inputs, targets = split[begin : begin + length], split[begin + 1 : begin + length + 1]
        logits = model(jnp.asarray(inputs[: len(targets)]))
        losses += list(
            np.asarray(
                optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets))
            )
        )
        correct += list(np.asarray(logits.argmax(-1)) == targets)
    assert len(losses) == len(split) - 1
    scores = evaluate(model, make_windows(split, length), batch_size, Precision.float32)
    assert scores["val/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["val/bpc"] == pytest.approx(np.mean(losses) / np.log(2), rel=1e-6)
    assert scores["val/accuracy"] == pytest.approx(np.mean(correct), rel=1e-6)


def test_the_compiled_step_has_no_scatter_and_no_conditional(mha_type: AttentionType) -> None:
    """On a GPU a scatter-add over 65 rows is slow, and a conditional stops the pipeline."""
    config = one_layer(f"model.mha_type={mha_type.name}", "model.dropout=0.1")
    text = compiled(config, 2).lower(start(config), TOKENS).as_text()
    assert "stablehlo.scatter" not in text and "stablehlo.case" not in text


def test_in_bfloat16_every_matrix_product_of_the_step_has_bfloat16_operands(
    mha_type: AttentionType,
) -> None:
    config = one_layer(f"model.mha_type={mha_type.name}", "trainer.precision=bfloat16")
    model = start(config).model
    inputs = TOKENS[:32].reshape(2, 16)
    gradient = eqx.filter_jit(
        eqx.filter_grad(lambda m: loss_fn(m, inputs, inputs, None, jnp.bfloat16))
    )
    products = [
        line
        for line in gradient.lower(model).as_text().split("\n")
        if "stablehlo.dot_general" in line
    ]
    assert products and all("xf32>, tensor" not in line.split(" : ")[-1] for line in products)


def test_attention_without_weights_has_no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = start(one_layer()).model, TOKENS[:32].reshape(2, 16)
    assert attention_entropy(model, inputs).shape == (1, 4)
    plain = AbstractAttention.attention_weights
    monkeypatch.setattr(GroupedQueryAttention, "attention_weights", plain)
    assert attention_entropy(model, inputs) is None


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.tie_embeddings=true", "model.learned_positions=true", "model.norm_position=post"]],
)
def test_the_parts_of_the_gradient_are_all_of_it(
    mha_type: AttentionType, overrides: list[str]
) -> None:
    config = small_config(f"model.mha_type={mha_type.name}", *overrides)
    model = filled(eqx.filter_eval_shape(init_state, config, VOCABULARY, 0).model, 0.2)
    grads = eqx.filter(model, eqx.is_inexact_array)
    norms = gradient_norms(grads)
    layers = [f"{part}_{layer}" for part in ("attention", "feed_forward") for layer in (0, 1)]
    assert list(norms) == ["embedding", *layers] + ([] if overrides else ["head"])
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(total, optax.tree.norm(grads), rtol=1e-5)
    attention = grads.stacked.attention, grads.stacked.attention_norm
    second = [leaf[1] for leaf in jax.tree.leaves(attention)]
    np.testing.assert_allclose(norms["attention_1"], optax.tree.norm(second), rtol=1e-5)
