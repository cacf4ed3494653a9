"""Mixture of experts: against the literal rule, and in everything that a run does with a model."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, small_config
from programs import metrics
from safetensors.numpy import load_file
from test_model import TOKENS, VOCAB
from test_modifiers import extend, model_config, model_of, score, shapes_of
from test_optimizer import MUON, by_name, make, orthogonalised
from test_weights import TINY, assert_round_trip, export, make_run, names_of

from chargpt import checkpoint
from chargpt.cli import run_tool
from chargpt.corpus import load_corpus
from chargpt.costs import count_parameters, flops_per_token, idle_parameters
from chargpt.errors import ConfigError
from chargpt.experts import MixtureOfExperts, TopKRouter, largest
from chargpt.optimizer import label_hidden
from chargpt.parallel import choose_devices
from chargpt.run.program import Program
from chargpt.run.start import resume, train
from chargpt.train import (
    TrainState,
    accumulate_gradients,
    cast,
    init_state,
    loss_fn,
    make_inputs,
    routed_loss,
    train_step,
    train_steps,
)

EXPERTS, WIDTH, LENGTH = 4, 16, 12
SIGMOID = ("num_experts=4", "router=sigmoid_bias", "shared_experts=2")
KINDS = {
    "softmax": ("num_experts=4", "activation=relu2"),
    "as it is": ("num_experts=4", "activation=swiglu", "router_renormalise=false"),
    "sigmoid": (*SIGMOID, "activation=swiglu"),
    "one each": (
        "num_experts=4",
        "activation=relu",
        "experts_per_token=1",
        "router_renormalise=false",
    ),
    "all of them": ("num_experts=3", "activation=relu", "experts_per_token=3", "expert_d_ff=5"),
}
STREAM = jnp.asarray(np.random.default_rng(1).normal(size=(LENGTH, WIDTH)), jnp.float32)
BIAS = np.array([0.3, -0.2, 0.0, 0.1])


def layer_of(*options: str) -> MixtureOfExperts:
    """With arbitrary weights, and a bias that changes what is chosen."""
    build = functools.partial(MixtureOfExperts, model_config(*options))
    layer = filled(eqx.filter_eval_shape(build, key=jax.random.key(0)), 0.3)
    if layer.router.bias is None:
        return layer
    bias = jnp.asarray(BIAS, jnp.float32)
    return eqx.tree_at(lambda layer: layer.router.bias, layer, bias)


def probabilities(layer: MixtureOfExperts, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits, scores) of a token, in float64."""
    logits = np.asarray(layer.router.proj.weight, np.float64) @ x
    if layer.router.bias is not None:
        return logits, 1 / (1 + np.exp(-logits))
    return logits, np.exp(logits) / np.exp(logits).sum()


def chosen(layer: MixtureOfExperts, x: np.ndarray) -> np.ndarray:
    _, scores = probabilities(layer, x)
    ranks = scores if layer.router.bias is None else scores + BIAS
    return np.argsort(-ranks)[: layer.router.experts_per_token]


def expert(layer, x: np.ndarray, number: int | None) -> np.ndarray:
    """One feed-forward layer, of several if it is numbered."""
    up, down, gate = (
        None if linear is None else np.asarray(linear.weight, np.float64)
        for linear in (layer.up_proj, layer.down_proj, layer.gate_proj)
    )
    if number is not None:
        up, down, gate = up[number], down[number], None if gate is None else gate[number]
    if gate is not None:
        return down @ (gate @ x / (1 + np.exp(-gate @ x)) * (up @ x))
    power = 2 if layer.activation.name == "relu2" else 1
    return down @ np.maximum(up @ x, 0) ** power


def literally(layer: MixtureOfExperts, x: np.ndarray) -> np.ndarray:
    """The rule for one token: only its experts are computed."""
    _, scores = probabilities(layer, x)
    experts = chosen(layer, x)
    total = scores[experts].sum() if layer.router.renormalise else 1
    y = sum(scores[e] / total * expert(layer.experts, x, e) for e in experts)
    shared = layer.shared_experts
    return y if shared is None else y + expert(shared, x, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_given_its_experts_and_no_other_token_matters(kind):
    layer = layer_of(*KINDS[kind])
    forward = eqx.filter_jit(lambda layer, x: layer(x))
    found = forward(layer, STREAM)
    expected = np.stack([literally(layer, x) for x in np.asarray(STREAM, np.float64)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    one = forward(layer, STREAM[3:4])
    np.testing.assert_allclose(one[0], found[3], rtol=1e-5, atol=1e-6)
    if layer.router.bias is not None:
        plain = eqx.tree_at(lambda layer: layer.router.bias, layer, jnp.zeros(EXPERTS))
        assert np.abs(forward(plain, STREAM) - found).max() > 0.01


@pytest.mark.parametrize("kind", ["softmax", "as it is", "sigmoid"])
def test_gradients_are_those_of_computing_each_tokens_experts_alone(kind):
    layer = layer_of(*KINDS[kind])
    experts = jnp.asarray([chosen(layer, x) for x in np.asarray(STREAM, np.float64)])

    def alone(layer: MixtureOfExperts, x: jax.Array) -> jax.Array:
        logits = x @ layer.router.proj.weight.T
        scores = jax.nn.softmax(logits) if layer.router.bias is None else jax.nn.sigmoid(logits)
        shares = jnp.take_along_axis(scores, experts, axis=1)
        if layer.router.renormalise:
            shares = shares / shares.sum(axis=1, keepdims=True)
        own = jax.tree.map(lambda leaf: leaf[experts], layer.experts)
        read = jax.vmap(jax.vmap(lambda expert, x: expert(x[None])[0], (0, None)))(own, x)
        y = jnp.einsum("tk,tkm->tm", shares, read)
        return y if layer.shared_experts is None else y + layer.shared_experts(x)

    def gradients(function):
        def loss(inputs):
            return jnp.sin(function(*inputs)).sum()

        return eqx.filter_jit(eqx.filter_grad(loss))((layer, STREAM))

    expected, found = gradients(alone), gradients(lambda layer, x: layer(x))
    moving = jax.tree.leaves(expected)
    assert sum(bool(jnp.abs(leaf).max() > 1e-2) for leaf in moving) >= 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    if layer.router.bias is not None:
        assert not found[0].router.bias.any()


def test_the_largest_are_those_of_top_k_ties_included():
    ranks = jnp.asarray(np.random.default_rng(0).integers(0, 4, (50, 6)), jnp.float32)
    for number in (1, 2, 6):
        _, places = jax.lax.top_k(ranks, number)
        expected = jax.nn.one_hot(places, 6).sum(axis=1) > 0
        np.testing.assert_array_equal(largest(ranks, number), expected)


@pytest.mark.parametrize("kind", ["softmax", "as it is", "sigmoid"])
def test_what_a_router_did_is_by_the_formulas(kind):
    layer = layer_of(*KINDS[kind])
    found = eqx.filter_jit(lambda layer, x: layer.routed(x)[1])(layer, STREAM)
    tokens = np.asarray(STREAM, np.float64)
    load, each, squares, entropies = np.zeros(EXPERTS), [], [], []
    for x in tokens:
        load[chosen(layer, x)] += 1 / (LENGTH * layer.router.experts_per_token)
        logits, scores = probabilities(layer, x)
        each.append(scores / scores.sum())
        squares.append(np.log(np.exp(logits).sum()) ** 2)
        entropies.append(-(each[-1] * np.log(each[-1])).sum())
    np.testing.assert_allclose(found.load, load, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, np.mean(entropies), rtol=1e-5)
    np.testing.assert_allclose(found.z_loss, np.mean(squares), rtol=1e-5)
    balance = EXPERTS * (load * np.mean(each, axis=0)).sum()
    np.testing.assert_allclose(found.aux_loss, balance, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [("num_experts=4",), (*SIGMOID, "window=3", "output_gate=head")]
)
def test_decoding_equals_the_forward_pass(options):
    model = model_of(*options)
    logits, cache = extend(model, TOKENS[:4], model.init_cache(9), 0)
    rest = [logits]
    for i in range(4, 9):
        logits, cache = extend(model, TOKENS[i : i + 1], cache, jnp.asarray(i))
        rest.append(logits)
    np.testing.assert_allclose(jnp.concatenate(rest), score(model, TOKENS), rtol=1e-4, atol=2e-5)


def test_each_layers_routing_is_told_in_their_order():
    """With windows that repeat too, in rounds of several layers."""
    model = model_of("num_experts=4", "num_layers=4", "window=3", "window_pattern=LG")
    _, routing = eqx.filter_jit(lambda model, x: model.routed(x))(model, TOKENS[None])
    each = eqx.filter_jit(lambda block, x, window: block.routed(x, window=window))
    x = model.embedding[TOKENS]
    for layer, (block, window) in enumerate(zip(model.layers(), model.windows, strict=True)):
        x, own = each(block, x, window)
        of_layer = jax.tree.map(lambda leaf, i=layer: leaf[i], routing)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), of_layer, own)
    assert routing.load.shape == (4, EXPERTS)


def test_routers_compute_in_float32_whatever_the_precision_is():
    model = cast(model_of(*SIGMOID), jnp.bfloat16)
    layer = model.stacked.feed_forward
    assert {leaf.dtype for leaf in jax.tree.leaves(layer.router)} == {jnp.dtype("float32")}
    rest = eqx.tree_at(lambda layer: layer.router, layer, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(rest)} == {jnp.dtype("bfloat16")}
    assert score(model, TOKENS).dtype == jnp.bfloat16


# --- training

CORPUS = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)


def training_config(*options: str, others: Sequence[str] = ()):
    """`options` of the model, and others by their dotted names."""
    named = [f"model.{option}" for option in options]
    return small_config("optimizer.warmup_steps=0", *named, *others)


def start(config, scale: float = 0.2) -> TrainState:
    """Arbitrary weights, moments of zero: nothing to compile."""
    shapes = eqx.filter_eval_shape(init_state, config, VOCAB, 0)
    model, zeros = filled(shapes.model, scale), filled(shapes, 0.0)
    zeros = jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, zeros)
    return dataclasses.replace(zeros, model=model, ema=None if shapes.ema is None else model)


def stepper(config):
    inputs = make_inputs(CORPUS, config)
    return eqx.filter_jit(lambda state: train_step(state, inputs, config))


@pytest.mark.parametrize(("router", "parts"), [("softmax", 2), ("sigmoid_bias", 1)])
def test_the_routers_losses_are_in_the_gradient_and_not_in_the_loss(router, parts):
    options = ["num_experts=4", f"router={router}", "router_z_loss=0.1"]
    options += ["router_aux_loss=0.5"] if router == "softmax" else []
    config = training_config(*options, others=[f"trainer.grad_accum_steps={parts}"])
    model, inputs = start(config).model, jnp.asarray(CORPUS[:64].reshape(4, 16))
    targets, key = inputs[::-1], jax.random.key(0)
    batch = inputs, targets

    def total(model):
        sums = 0.0
        for part in np.split(np.arange(4), parts):
            values = inputs[part], targets[part], None, jnp.float32
            loss, routing = routed_loss(model, *values)
            balance = 0.5 * routing.aux_loss.sum() / 2 if router == "softmax" else 0.0
            sums += (loss + balance + 0.1 * routing.z_loss.sum() / 2) / parts
        return sums

    expected = eqx.filter_jit(eqx.filter_grad(total))(model)
    gradients = eqx.filter_jit(lambda model: accumulate_gradients(model, *batch, key, config))
    (loss, routing), found = gradients(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected
    )
    assert np.abs(found.blocks.feed_forward.router.proj.weight).max() > 1e-3
    alone = eqx.filter_jit(loss_fn)(model, inputs, targets, None, jnp.float32)
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    np.testing.assert_allclose(routing.load.sum(axis=1), 1, rtol=1e-5)


def test_a_bias_moves_by_the_sign_of_what_an_expert_lacks_and_evens_out_the_loads():
    others = ["optimizer.learning_rate=1e-9", "trainer.batch_size=16"]
    config = training_config(*SIGMOID, "router_bias_rate=0.01", others=others)
    step, state = stepper(config), start(config)

    def where(state: TrainState) -> jax.Array:
        return state.model.blocks.feed_forward.router.bias

    state = eqx.tree_at(where, state, jnp.tile(jnp.array([0.6, 0.0, 0.0, -0.6]), (2, 1)))
    before = where(state)
    after, metrics = step(state)
    moves = np.asarray(where(after) - before) / 0.01
    np.testing.assert_allclose(moves[:, 0], -1, atol=1e-4)
    np.testing.assert_allclose(moves[:, 3], 1, atol=1e-4)
    np.testing.assert_allclose(np.abs(moves), 1, atol=1e-4)
    assert metrics.experts["load_max"] == 0.5 and metrics.experts["load_min"] == 0
    assert metrics.experts["dead"] >= 2
    for _ in range(90):
        after, metrics = step(after)
    assert metrics.experts["load_max"] < 0.35 and metrics.experts["load_min"] > 0.15
    assert metrics.experts["dead"] == 0 and metrics.experts["load_entropy"] > 1.35
    broken = eqx.tree_at(
        lambda s: s.model.embedding, after, after.model.embedding.at[0].set(np.inf)
    )
    skipped, metrics = step(broken)
    assert int(metrics.skipped) == 1
    np.testing.assert_array_equal(where(skipped), where(broken))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_steps_move_every_weight_and_the_average_follows(optimizer):
    options = (*SIGMOID, "activation=swiglu", "dropout=0.1", "num_layers=1")
    others = [f"optimizer.name={optimizer}", "optimizer.ema_decay=0.9"]
    config = training_config(*options, others=others)
    step, state = stepper(config), start(config)
    first = eqx.filter(state.model, eqx.is_array)
    for _ in range(2):
        state, metrics = step(state)
    for model in (state.model, state.ema):
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), first, eqx.filter(model, eqx.is_array)
        )
        assert all(jax.tree.leaves(moved)), moved
    assert int(metrics.skipped) == 0


def test_muon_orthogonalises_each_experts_matrix_by_itself_and_leaves_routers_to_adam():
    params = eqx.filter(model_of("num_experts=4"), eqx.is_inexact_array)
    grads = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, params)
    optimizer = make(dataclasses.replace(MUON, adam_learning_rate=0.01))
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    weights, gradients, moves = by_name(params), by_name(grads), by_name(update(grads, params))
    for part in ("up_proj", "down_proj"):
        name = f".blocks.feed_forward.experts.{part}.weight"
        assert weights[name].shape[:2] == (2, EXPERTS)
        for layer in range(2):
            for number in range(EXPERTS):
                matrix = np.asarray(gradients[name][layer, number], np.float64)
                expected = orthogonalised(matrix) + 0.5 * weights[name][layer, number]
                found = moves[name][layer, number]
                np.testing.assert_allclose(found, -0.1 * expected, atol=1e-4)
    router = moves[".blocks.feed_forward.router.proj.weight"]
    np.testing.assert_allclose(np.abs(router), 0.01 * (1 + 0.9 / 1.9), rtol=1e-3)
    kinds = label_hidden(params, lambda leaf: True, False)
    assert kinds.blocks.feed_forward.experts.up_proj.weight
    assert not kinds.blocks.feed_forward.router.proj.weight


def test_devices_learn_what_one_learns():
    """With loads of the whole batch, and each expert's weights shared out."""
    options = (*SIGMOID, "expert_d_ff=16", "num_layers=1")
    others = ["optimizer.name=muon", "trainer.grad_accum_steps=2", "trainer.batch_size=8"]
    others += ["trainer.num_devices=null", "optimizer.eps=1e-4"]

    def losses(layout: list[str]) -> tuple[np.ndarray, np.ndarray, TrainState]:
        config = training_config(*options, others=[*others, *layout])
        devices = choose_devices(config)
        inputs = devices.replicate(make_inputs(CORPUS, config))
        begin = eqx.filter_jit(lambda: devices.place(init_state(config, VOCAB, 0)))()
        steps = eqx.filter_jit(lambda state: train_steps(state, inputs, config, 4, devices))
        state, metrics = steps(begin)
        return np.asarray(metrics.loss), np.asarray(metrics.experts["load_entropy"]), state

    alone, shared = losses(["parallel.data=1"]), losses(["parallel.data=2", "parallel.fsdp=true"])
    for one, other in zip(alone[:2], shared[:2], strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5)
    weight = shared[2].model.stacked.feed_forward.experts.up_proj.weight
    assert {shard.data.size for shard in weight.addressable_shards} == {weight.size // 2}


def test_a_member_of_a_population_is_the_run_that_it_would_be_by_itself():
    steps = "trainer.num_steps=4"
    configs = [
        training_config(*SIGMOID, "num_layers=1", others=[steps, f"seed={seed}"]) for seed in (0, 1)
    ]
    corpus = load_corpus(configs[0].dataset)

    def trained(members):
        program = Program(configs[0], corpus, None if len(members) == 1 else len(members))
        states = None
        for lane, own in enumerate(members):
            states = program.put(states, lane, program.initial_state(own.seed))
        inputs = program.inputs(members)
        program.compile([4], inputs)
        states, _ = program.train(4, states, inputs, [4] * len(members))
        return [eqx.filter(program.take(states, i), eqx.is_array) for i in range(len(members))]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
        trained(configs)[1],
        trained(configs[1:])[0],
    )


def test_a_run_logs_what_its_routers_did_and_resumes(tmp_path: Path, capsys):
    sizes = ["num_steps=4", "eval_every=4", "log_every=2", "eval_tokens=64", "sample_chars=0"]
    others = ["mode=disabled", *(f"trainer.{size}" for size in sizes)]
    train(training_config(*SIGMOID, "num_layers=1", others=others), tmp_path)
    assert "each token uses 2 of 4 experts and 2 shared: " in capsys.readouterr().out
    resume(tmp_path, ["trainer.num_steps=6"])
    names = {"load_max", "load_min", "load_entropy", "dead", "router_entropy", "aux_loss", "z_loss"}
    lines = metrics(tmp_path)
    assert [line["trainer/step"] for line in lines] == [2, 4, 6]
    for line in lines:
        logged = {name for name in line if name.startswith("experts/")}
        assert logged == {f"experts/{name}" for name in names}
    summary = json.loads((tmp_path / "summary.json").read_text())
    idle = 2 * 2 * WIDTH * 16  # experts, matrices
    assert summary["num_active_params"] == summary["num_params"] - idle


# --- what it costs, files, rules


def test_parameters_and_operations_are_those_of_the_experts_that_a_token_is_given():
    plain, model = shapes_of("d_ff=32"), shapes_of(*SIGMOID, "d_ff=32")
    expert = 2 * WIDTH * 8  # d_ff / (2 + 2) wide
    router = EXPERTS * WIDTH + EXPERTS
    parts = count_parameters(model)
    assert parts["feed-forward, 2 layers"] == 2 * ((EXPERTS + 2) * expert + router)
    assert idle_parameters(model) == 2 * 2 * expert and idle_parameters(plain) == 0
    assert flops_per_token(model, 9) - flops_per_token(plain, 9) == 6 * 2 * router


DEEPSEEK = ("model.router=sigmoid_bias", "model.shared_experts=1", "model.activation=swiglu")


@pytest.mark.parametrize("more", [(), DEEPSEEK], ids=["softmax", "sigmoid"])
def test_export_and_import_restore_every_expert(more, tmp_path: Path):
    assert_round_trip(tmp_path, *TINY, "model.num_experts=3", *more)


def test_names_are_those_of_olmoe_and_deepseek(tmp_path: Path):
    file, state = export(tmp_path, *TINY, "model.num_experts=2", *DEEPSEEK)
    own = {name for name in names_of(file) if name.startswith("mlp.")}
    projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    expected = {f"mlp.experts.{number}.{name}" for number in (0, 1) for name in projections}
    expected |= {f"mlp.shared_experts.{name}" for name in projections}
    assert own == expected | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    weight = state.model.blocks.feed_forward.experts.down_proj.weight
    found = load_file(file)["model.layers.1.mlp.experts.0.down_proj.weight"]
    assert found.tobytes() == np.asarray(weight[1, 0]).tobytes()


REFUSED = {
    "num_experts=0": "model.num_experts=0: must be at least 1",
    "num_experts=2 experts_per_token=1": "model.experts_per_token=1: the share of a token's one",
    "num_experts=1": "model.experts_per_token=2: is more than model.num_experts=1; write that or",
    "num_experts=4 match=params": "model.match=params: counts the weights of a layer without",
    "shared_experts=1": "model.shared_experts=1: is read only with model.num_experts=E; write",
    "expert_d_ff=8": "model.expert_d_ff=8: is read only with model.num_experts=E",
    "router=sigmoid_bias": "model.router=sigmoid_bias: is read only with model.num_experts=E",
    "router_z_loss=0.1": "model.router_z_loss=0.1: is read only with model.num_experts=E",
    "experts_per_token=3": "model.experts_per_token=3: is read only with model.num_experts=E",
    "num_experts=4 router_bias_rate=1": "model.router_bias_rate=1.0: is read only with model.rou",
    "num_experts=4 router=sigmoid_bias router_aux_loss=1": "model.router_aux_loss=1.0: is read o",
    "num_experts=4 router_z_loss=-1": "model.router_z_loss=-1.0: must be a finite number in",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="^" + REFUSED[options]):
        model_config(*options.split())


def test_tensor_parallelism_is_refused():
    others = ["parallel.tensor=2", "trainer.num_devices=null"]
    with pytest.raises(ConfigError, match=r"^parallel.tensor=2: experts are not cut; write"):
        training_config("num_experts=4", others=others)


def test_without_experts_nothing_is_routed_or_logged():
    config = training_config()
    state, found = eqx.filter_eval_shape(stepper(config), eqx.filter_eval_shape(start, config))
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TopKRouter))
    assert not any(isinstance(leaf, TopKRouter) for leaf in leaves) and found.experts == {}


def test_a_run_with_experts_is_converted_as_any_other(tmp_path: Path):
    state = make_run(tmp_path / "run", small_config(*TINY, "model.num_experts=3"))
    words = ["convert", f"run={tmp_path / 'run'}", f"out={tmp_path / 'gqa'}"]
    assert run_tool([*words, "model.mha_type=gqa"]) == 0
    found, _ = checkpoint.load(tmp_path / "gqa" / "checkpoints" / "best.eqx")
    assert found.model.stacked.attention.num_kv_heads == 2
    layers = [model.stacked.feed_forward for model in (found.model, state.model)]
    for one, other in zip(*map(jax.tree.leaves, layers), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
