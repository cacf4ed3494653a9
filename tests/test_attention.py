"""Attention: every type against an independent formula, and what all types promise."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import filled, layer_of, small_config

from chargpt.attention import (
    AbstractAttention,
    EquinoxAttention,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    SelectiveAttention,
    make_attention,
)
from chargpt.attention.kernel import CAUSAL, Reading, dot_product_attention
from chargpt.attention.rope import apply_rope
from chargpt.config import AttentionType

D_MODEL, NUM_HEADS, HEAD_DIM, SEQ_LEN = 16, 4, 4, 7
READ = 1e-3  # an attention weight above this shows in the output
THETAS = (None, 100.0)  # a small base: every pair rotates visibly within SEQ_LEN positions

# Compiled as a whole: op by op, compiling each shape would take most of this file's time.
forward = eqx.filter_jit(lambda attention, x, *how: attention(x, *how))
project = eqx.filter_jit(lambda attention, x, positions: attention.project(x, positions))
decode = eqx.filter_jit(lambda attention, x, cache, position: attention.decode(x, cache, position))

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


def build(cls, *args):
    """A layer, spread widely enough that no softmax is near uniform."""
    return filled(eqx.filter_eval_shape(functools.partial(cls, *args), key=jax.random.key(0)), 0.3)


@functools.cache
def make(mha_type: AttentionType, rope: bool = True, *overrides: str) -> AbstractAttention:
    """A layer as the real YAML has it."""
    config = small_config(
        f"model.mha_type={mha_type.name}", f"model.rope={rope}", "model.rope_theta=100", *overrides
    )
    return build(make_attention, config.model)


@pytest.fixture(params=[False, True], ids=["no_rope", "rope"])
def rope(request: pytest.FixtureRequest, mha_type: AttentionType) -> bool:
    """Without RoPE, where the type can do without, and with it."""
    if not request.param and "rope" not in layer_of(mha_type).accepts:
        pytest.skip(f"{mha_type.name} attention always has RoPE")
    return request.param


def tokens(seq_len: int = SEQ_LEN, seed: int = 0) -> jax.Array:
    return normal(seq_len, D_MODEL, seed=seed)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rotations(positions, width: int, theta: float | None) -> np.ndarray:
    """RoPE as what it is: a rotation matrix per position, pairs (i, i + width/2)."""
    matrices = np.tile(np.eye(width), (len(positions), 1, 1))
    if theta is not None:
        for row, position in enumerate(np.asarray(positions)):
            for i in range(width // 2):
                angle = position * theta ** (-2 * i / width)
                pair = np.ix_([i, i + width // 2], [i, i + width // 2])
                matrices[row][pair] = [
                    [np.cos(angle), -np.sin(angle)],
                    [np.sin(angle), np.cos(angle)],
                ]
    return matrices


def causal_softmax(scores: np.ndarray, head: int) -> np.ndarray:
    """[t, s]: how much a query reads of each key up to its own."""
    weights = np.zeros_like(scores)
    for i in range(len(scores)):
        row = np.exp(scores[i, : i + 1] - scores[i, : i + 1].max())
        weights[i, : i + 1] = row / row.sum()
    return weights


def multi_head_oracle(
    x,
    q_weight,
    k_weight,
    v_weight,
    o_weight,
    num_heads: int,
    theta: float | None,
    weigh=causal_softmax,
) -> np.ndarray:
    """Causal multi-head attention with RoPE: float64, one head and one query at a time."""
    x, q_weight, k_weight, v_weight, o_weight = (
        np.asarray(a, np.float64) for a in (x, q_weight, k_weight, v_weight, o_weight)
    )
    width = q_weight.shape[0] // num_heads
    turn = rotations(range(len(x)), width, theta)
    heads = []
    for head in range(num_heads):
        rows = slice(head * width, (head + 1) * width)
        q = np.einsum("tij,tj->ti", turn, x @ q_weight[rows].T)
        k = np.einsum("tij,tj->ti", turn, x @ k_weight[rows].T)
        heads.append(weigh(q @ k.T / np.sqrt(width), head) @ (x @ v_weight[rows].T))
    return np.concatenate(heads, axis=-1) @ o_weight.T


# --- rotary position embedding


def test_rope_is_multiplication_by_a_complex_number_of_modulus_one():
    x = normal(SEQ_LEN, 3, 8, seed=0)
    positions = jnp.array([0, 1, 2, 5, 40, 100, 1000])
    z = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    z *= np.exp(1j * np.asarray(positions)[:, None, None] * 10000.0 ** (-np.arange(4) / 4))
    close(apply_rope(x, positions, 10000.0), np.concatenate([z.real, z.imag], axis=-1), atol=1e-4)


@pytest.mark.parametrize("shift", [1, 13])
def test_rope_makes_scores_depend_on_the_distance_alone(shift):
    q, k = (normal(1, 1, 8, seed=seed) for seed in (0, 1))

    def score(i, j):
        return jnp.vdot(apply_rope(q, jnp.array([i]), 100.0), apply_rope(k, jnp.array([j]), 100.0))

    for i, j in ((0, 0), (5, 2), (9, 0)):
        close(score(i + shift, j + shift), score(i, j), atol=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_rope_leaves_position_zero_alone_and_theta_none_leaves_everything_alone():
    x = normal(SEQ_LEN, 3, 8, seed=0)
    np.testing.assert_array_equal(apply_rope(x, jnp.zeros(SEQ_LEN, int), 100.0), x)
    np.testing.assert_array_equal(apply_rope(x, jnp.arange(SEQ_LEN), None), x)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rope_keeps_the_dtype(dtype, theta):
    x = jnp.ones((SEQ_LEN, 1, 8), dtype)
    assert apply_rope(x, jnp.arange(SEQ_LEN), theta).dtype == dtype


def test_rope_angles_do_not_lose_precision_in_bfloat16():
    """Positions beyond 256 are no bfloat16 numbers: angles are computed wider than the vectors."""
    x = jnp.ones((2, 1, 8))
    positions = jnp.array([1001, 1002])
    narrow = apply_rope(x.astype(jnp.bfloat16), positions, 100.0)
    np.testing.assert_allclose(
        narrow.astype(jnp.float32), apply_rope(x, positions, 100.0), rtol=2**-8, atol=2**-8
    )


# --- the kernel's wrapper


@pytest.mark.parametrize("value_width", [2, 6])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_dot_product_attention_serves_adjacent_groups_and_any_width_of_values(
    num_kv_heads, value_width
):
    shapes = ((SEQ_LEN, 4, 4), (SEQ_LEN, num_kv_heads, 4), (SEQ_LEN, num_kv_heads, value_width))
    q, k, v = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    expected = np.stack(
        [
            causal_softmax(
                0.7 * (np.asarray(q)[:, head] @ k[:, head // (4 // num_kv_heads)].T), head
            )
            @ v[:, head // (4 // num_kv_heads)]
            for head in range(4)
        ],
        axis=1,
    )
    for reading in (CAUSAL, Reading(positions=(jnp.arange(SEQ_LEN), jnp.arange(SEQ_LEN)))):
        close(eqx.filter_jit(dot_product_attention)(q, k, v, reading, scale=0.7), expected)


# --- standard, grouped-query, multi-query


def test_standard_without_rope_equals_equinox_with_transplanted_weights():
    ours = make(AttentionType.standard, rope=False)
    mha = build(eqx.nn.MultiheadAttention, NUM_HEADS, D_MODEL)
    mha = eqx.tree_at(
        lambda m: (m.query_proj, m.key_proj, m.value_proj, m.output_proj),
        mha,
        (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj),
    )
    x = tokens()
    close(ours(x), mha(x, x, x, mask=jnp.tri(SEQ_LEN, dtype=bool)))


@pytest.mark.parametrize("theta", THETAS)
def test_standard_equals_its_formula(theta):
    ours = build(GroupedQueryAttention, D_MODEL, NUM_HEADS, NUM_HEADS, HEAD_DIM, theta)
    weights = [linear.weight for linear in (ours.q_proj, ours.k_proj, ours.v_proj, ours.o_proj)]
    close(forward(ours, tokens()), multi_head_oracle(tokens(), *weights, NUM_HEADS, theta))


@pytest.mark.parametrize("rope", [False, True])
def test_gqa_with_all_heads_equals_standard_bit_for_bit(rope):
    standard, gqa = (
        make(AttentionType.standard, rope),
        make(AttentionType.gqa, rope, "model.num_kv_heads=4"),
    )
    assert eqx.tree_equal(standard, gqa)
    np.testing.assert_array_equal(forward(gqa, tokens()), forward(standard, tokens()))
    cache = standard.init_cache(SEQ_LEN)
    assert eqx.tree_equal(decode(gqa, tokens(), cache, 0), decode(standard, tokens(), cache, 0))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_equal_standard_with_the_kv_weights_repeated(num_kv_heads, theta):
    grouped = build(GroupedQueryAttention, D_MODEL, NUM_HEADS, num_kv_heads, HEAD_DIM, theta)

    def repeated(linear):
        heads = linear.weight.reshape(num_kv_heads, HEAD_DIM, D_MODEL)
        return jnp.repeat(heads, NUM_HEADS // num_kv_heads, axis=0).reshape(
            NUM_HEADS * HEAD_DIM, D_MODEL
        )

    standard = build(GroupedQueryAttention, D_MODEL, NUM_HEADS, NUM_HEADS, HEAD_DIM, theta)
    standard = eqx.tree_at(
        lambda a: (a.q_proj, a.k_proj.weight, a.v_proj.weight, a.o_proj),
        standard,
        (grouped.q_proj, repeated(grouped.k_proj), repeated(grouped.v_proj), grouped.o_proj),
    )
    close(forward(grouped, tokens()), forward(standard, tokens()))


def test_heads_need_not_add_up_to_the_models_width():
    wide = build(GroupedQueryAttention, D_MODEL, 3, 1, 10, 100.0)
    k_weight, v_weight = jnp.tile(wide.k_proj.weight, (3, 1)), jnp.tile(wide.v_proj.weight, (3, 1))
    expected = multi_head_oracle(
        tokens(), wide.q_proj.weight, k_weight, v_weight, wide.o_proj.weight, 3, 100.0
    )
    close(forward(wide, tokens()), expected)


def test_qk_norm_makes_scores_blind_to_the_scale_of_queries_and_keys():
    normed = make(AttentionType.standard, True, "model.qk_norm=true")
    bare = make(AttentionType.standard)

    def louder(layer):
        return eqx.tree_at(
            lambda layer: (layer.q_proj.weight, layer.k_proj.weight),
            layer,
            replace_fn=lambda weight: 8 * weight,
        )

    close(forward(louder(normed), tokens()), forward(normed, tokens()), atol=1e-4)
    assert np.abs(forward(louder(bare), tokens()) - forward(bare, tokens())).max() > 0.1


# --- selective


def selective_literally(attention: SelectiveAttention, x: jax.Array, weigh=None) -> jax.Array:
    """The definition: every query makes its own key and value of every token, [t, s, m] each."""
    seq_len, width = x.shape
    heads = (seq_len, seq_len, attention.num_heads, attention.head_dim)
    q = x @ attention.q_proj.weight.T
    pairs = jnp.concatenate(
        [
            jnp.broadcast_to(q[:, None, :], (seq_len, seq_len, width)),
            jnp.broadcast_to(x[None, :, :], (seq_len, seq_len, width)),
        ],
        axis=-1,
    )
    keys = (pairs @ attention.k_proj.weight.T).reshape(heads)
    values = (pairs @ attention.v_proj.weight.T).reshape(heads)
    turn = jnp.asarray(rotations(range(seq_len), attention.head_dim, attention.rope_theta), x.dtype)
    queries = jnp.einsum(
        "tab,tnb->tna", turn, q.reshape(seq_len, attention.num_heads, attention.head_dim)
    )
    keys = jnp.einsum("sab,tsnb->tsna", turn, keys)
    scores = jnp.einsum("tnh,tsnh->nts", queries, keys) / np.sqrt(attention.head_dim)
    if weigh is None:
        weights = jax.nn.softmax(jnp.where(jnp.tri(seq_len, dtype=bool), scores, -jnp.inf), axis=-1)
    else:
        weights = np.stack([weigh(np.asarray(rows), head) for head, rows in enumerate(scores)])
    return (
        jnp.einsum("nts,tsnh->tnh", weights, values).reshape(seq_len, width)
        @ attention.o_proj.weight.T
    )


@eqx.filter_jit
def gradients(forward, attention, x):
    probe = normal(*x.shape, seed=8)
    return eqx.filter_grad(lambda inputs: jnp.vdot(probe, forward(*inputs)))((attention, x))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_selective_equals_its_literal_form_in_values_and_gradients(num_heads, theta):
    attention = build(SelectiveAttention, D_MODEL, num_heads, theta)
    close(forward(attention, tokens()), eqx.filter_jit(selective_literally)(attention, tokens()))
    ours = gradients(forward, attention, tokens())
    literal = gradients(selective_literally, attention, tokens())
    assert len(jax.tree.leaves(ours)) == 5  # four weights and x
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(ours))
    jax.tree.map(lambda a, b: close(a, b, atol=5e-6 * np.abs(b).max()), ours, literal)


@pytest.mark.parametrize("theta", THETAS)
def test_the_bias_of_a_selective_query_is_its_score_of_keys_without_tokens(theta):
    attention = build(SelectiveAttention, D_MODEL, 4, theta)
    halved = attention.k_proj.weight.at[:, D_MODEL:].set(0)
    bare = eqx.tree_at(lambda layer: layer.k_proj.weight, attention, halved)
    literal = []
    selective_literally(bare, tokens(), lambda rows, _: literal.append(rows) or rows)
    found = attention.query_bias(tokens())
    if theta is None:  # the same for all keys: it cancels
        assert found is None and np.ptp(literal, axis=-1).max() < 1e-5
    else:
        future = np.triu(np.ones_like(literal[0], dtype=bool), 1)
        close(found, np.where(future, -np.inf, np.stack(literal)))


def test_selective_learns_how_queries_make_keys_only_with_rope():
    """W_k = [A | B]. A shifts all scores of a query alike, unless RoPE tells the keys apart."""
    for rope in (False, True):
        attention = make(AttentionType.selective, rope)
        (grad, _) = gradients(forward, attention, tokens())
        query_half, token_half = jnp.split(grad.k_proj.weight, 2, axis=1)
        assert np.abs(token_half).max() > 0.1
        if rope:
            assert np.abs(query_half).max() > 0.1
        else:
            np.testing.assert_array_equal(
                query_half, 0
            )  # exactly: A takes no part in the factorised form


def test_selective_without_its_query_halves_is_standard_attention():
    selective, standard = make(AttentionType.selective), make(AttentionType.standard)
    keys, values = (
        jnp.split(linear.weight, 2, axis=1)[1] for linear in (selective.k_proj, selective.v_proj)
    )
    standard = eqx.tree_at(
        lambda a: (a.q_proj, a.k_proj.weight, a.v_proj.weight, a.o_proj),
        standard,
        (selective.q_proj, keys, values, selective.o_proj),
    )
    bare = eqx.tree_at(
        lambda a: (a.k_proj.weight, a.v_proj.weight),
        selective,
        replace_fn=lambda w: w.at[:, :D_MODEL].set(0),
    )
    close(forward(bare, tokens()), forward(standard, tokens()))


# --- multi-head latent attention


def make_mla(
    q_lora_rank: int | None, theta: float | None, v_head_dim: int = 6
) -> MultiHeadLatentAttention:
    """Every width is different: nothing fits by chance."""
    return build(
        MultiHeadLatentAttention, D_MODEL, NUM_HEADS, q_lora_rank, 5, 3, 4, v_head_dim, theta
    )


def mla_literally(a: MultiHeadLatentAttention, x, weigh=causal_softmax) -> np.ndarray:
    """DeepSeek-V2's equations in float64, head by head."""
    x = np.asarray(x, np.float64)
    dn, dr, dv, r = a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank

    def weight(layer):
        return np.asarray(layer.weight, np.float64)

    def rms_norm(norm, y):
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * weight(norm)

    if a.q_proj is not None:
        q = x @ weight(a.q_proj).T
    else:
        q = rms_norm(a.q_a_norm, x @ weight(a.q_a_proj).T) @ weight(a.q_b_proj).T
    down = x @ weight(a.kv_a_proj).T
    c, k_rope = rms_norm(a.kv_a_norm, down[:, :r]), down[:, r:]
    up = c @ weight(a.kv_b_proj).T
    turn = rotations(range(len(x)), dr, a.rope_theta)
    k_rope = np.einsum("tij,tj->ti", turn, k_rope)
    heads = []
    for head in range(a.num_heads):
        q_head = q[:, head * (dn + dr) : (head + 1) * (dn + dr)]
        up_head = up[:, head * (dn + dv) : (head + 1) * (dn + dv)]
        q_rope = np.einsum("tij,tj->ti", turn, q_head[:, dn:])
        scores = (q_head[:, :dn] @ up_head[:, :dn].T + q_rope @ k_rope.T) / np.sqrt(dn + dr)
        heads.append(weigh(scores, head) @ up_head[:, dn:])
    return np.concatenate(heads, axis=-1) @ weight(a.o_proj).T


@pytest.mark.parametrize("v_head_dim", [6, 9], ids=["narrow_values", "wide_values"])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_mla_equals_its_formula(q_lora_rank, theta, v_head_dim):
    attention = make_mla(q_lora_rank, theta, v_head_dim)
    close(forward(attention, tokens()), mla_literally(attention, tokens()))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_mla_absorbed_equals_expanded(q_lora_rank, theta):
    attention = make_mla(q_lora_rank, theta)
    queries, entries = project(attention, tokens(), jnp.arange(SEQ_LEN))
    absorbed, expanded = (
        eqx.filter_jit(attention.read_absorbed),
        eqx.filter_jit(attention.read_expanded),
    )
    everything = expanded(queries, entries, CAUSAL)
    close(absorbed(queries, entries, CAUSAL), everything)
    for i in (0, SEQ_LEN - 1):  # one query, as in decoding
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], queries)
        reading = Reading(positions=(jnp.array([i]), jnp.arange(SEQ_LEN)))
        close(absorbed(one, entries, reading), everything[i : i + 1])


def test_mla_decodes_one_token_without_expanding_the_cache(monkeypatch):
    attention = make(AttentionType.mla)
    cache = attention.init_cache(32)
    monkeypatch.setattr(
        MultiHeadLatentAttention, "read_expanded", lambda *_: pytest.fail("expanded")
    )
    eqx.filter_eval_shape(attention.decode, tokens(1), cache, SEQ_LEN)
    with pytest.raises(pytest.fail.Exception):
        eqx.filter_eval_shape(attention.decode, tokens(2), cache, SEQ_LEN)


# --- the reference


def test_equinox_without_rope_is_equinox_itself():
    """Bit for bit up to the output projection, which the base class applies for every type."""
    attention, x = make(AttentionType.equinox, rope=False), tokens()
    causal = jnp.tri(SEQ_LEN, dtype=bool)
    heads = attention.attend(*attention.project(x, jnp.arange(SEQ_LEN)), CAUSAL)
    bare = eqx.tree_at(lambda mha: mha.output_proj, attention.mha, eqx.nn.Identity())
    np.testing.assert_array_equal(heads.reshape(SEQ_LEN, -1), bare(x, x, x, mask=causal))
    close(attention(x), attention.mha(x, x, x, mask=causal))


@pytest.mark.parametrize("theta", THETAS)
def test_equinox_equals_the_formula_with_rope(theta):
    attention = build(EquinoxAttention, D_MODEL, NUM_HEADS, theta)
    mha = attention.mha
    weights = [
        linear.weight for linear in (mha.query_proj, mha.key_proj, mha.value_proj, mha.output_proj)
    ]
    close(forward(attention, tokens()), multi_head_oracle(tokens(), *weights, NUM_HEADS, theta))


# --- each type as its name says

CLASSES = {
    "standard": GroupedQueryAttention,
    "gqa": GroupedQueryAttention,
    "mqa": GroupedQueryAttention,
    "selective": SelectiveAttention,
    "mla": MultiHeadLatentAttention,
    "equinox": EquinoxAttention,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_make_attention_builds_the_type_that_is_asked_for(kind):
    mha_type = AttentionType[kind]
    attention = make(mha_type)
    assert type(attention) is CLASSES[kind]
    assert attention.rope_theta == 100.0
    assert make(mha_type, rope=False).rope_theta is None
    kv_heads = {"standard": 4, "gqa": 2, "mqa": 1}
    assert getattr(attention, "num_kv_heads", None) == kv_heads.get(kind)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_options_of_each_type_are_those_that_it_implements(kind):
    grouped = CLASSES[kind] is GroupedQueryAttention
    expected = {"rope", "qk_norm", "head_dim"} if grouped else {"rope"}
    assert make(AttentionType[kind]).accepts == expected


def test_make_attention_hands_every_width_on():
    grouped = make(
        AttentionType.gqa, True, "model.num_kv_heads=1", "model.head_dim=6", "model.qk_norm=true"
    )
    assert (grouped.num_kv_heads, grouped.head_dim, grouped.q_proj.out_features) == (1, 6, 24)
    assert grouped.q_norm is not None and grouped.k_norm is not None
    widths = {
        "q_lora_rank": 5,
        "kv_lora_rank": 7,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
    }
    mla = make(
        AttentionType.mla, True, *(f"model.mla.{name}={width}" for name, width in widths.items())
    )
    shapes = {
        name: linear.weight.shape
        for name, linear in vars(mla).items()
        if isinstance(linear, eqx.nn.Linear)
    }
    assert shapes == {
        "q_a_proj": (5, 16),
        "q_b_proj": (4 * 5, 5),
        "kv_a_proj": (7 + 2, 16),
        "kv_b_proj": (4 * 7, 7),
        "o_proj": (16, 4 * 4),
    }


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_holds_the_bytes_that_the_formula_says(kind, dtype):
    numbers = {
        "standard": 2 * NUM_HEADS * HEAD_DIM,
        "gqa": 2 * (NUM_HEADS // 2) * HEAD_DIM,
        "mqa": 2 * HEAD_DIM,
        "selective": 2 * NUM_HEADS * HEAD_DIM,
        "mla": 8 + 4,  # kv_lora_rank + qk_rope_head_dim
        "equinox": D_MODEL,
    }
    cache = narrowed(make(AttentionType[kind]), dtype).init_cache(11)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert total == 11 * numbers[kind] * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("kind", CLASSES)
def test_each_type_reads_every_earlier_token_in_every_head(kind):
    for rope in (False, True):
        weights = np.asarray(make(AttentionType[kind], rope).attention_weights(tokens()))
        assert weights.shape == (NUM_HEADS, SEQ_LEN, SEQ_LEN)
        earlier = weights[:, *np.tril_indices(SEQ_LEN)]
        assert earlier.min() > 0 and earlier.max(axis=0).min() > READ


def test_only_selective_attention_without_rope_has_a_remark():
    for kind in CLASSES:
        assert make(AttentionType[kind]).remark() is None
        remark = make(AttentionType[kind], rope=False).remark()
        assert (remark is not None) == (kind == "selective")
    assert "cancel" in make(AttentionType.selective, rope=False).remark()


ROWS, COLUMNS = np.arange(48), np.arange(32)  # of kv_b_proj and of selective's projections
FUSED = {  # type: {projection: (rows, columns) of the matrices in it}; SMALL has the sizes
    "standard": {},
    "gqa": {},
    "mqa": {},
    "selective": {
        "k_proj": [(ROWS[:16], COLUMNS[:16]), (ROWS[:16], COLUMNS[16:])],
        "v_proj": [(ROWS[:16], COLUMNS[:16]), (ROWS[:16], COLUMNS[16:])],
    },
    "mla": {
        # the latent, 8 wide, and the rotary key
        "kv_a_proj": [(ROWS[:8], COLUMNS[:16]), (ROWS[8:12], COLUMNS[:16])],
        # in every head 4 rows of keys and 8 of values
        "kv_b_proj": [(ROWS[ROWS % 12 < 4], COLUMNS[:8]), (ROWS[ROWS % 12 >= 4], COLUMNS[:8])],
    },
    "equinox": {},
}


def indices(shape: tuple[int, ...]) -> jax.Array:
    """A weight whose numbers say where they are."""
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize("kind", CLASSES)
def test_fused_projections_are_several_matrices_in_one_as_the_formulas_have_them(kind):
    attention = make(AttentionType[kind])
    splits = attention.fused_projections()
    assert splits.keys() == FUSED[kind].keys()
    for name, matrices in FUSED[kind].items():
        weight = indices(getattr(attention, name).weight.shape)
        expected = [weight[np.ix_(*matrix)] for matrix in matrices]
        for part, matrix in zip(splits[name](weight), expected, strict=True):
            np.testing.assert_array_equal(part, matrix)


# --- what every type promises


def test_make_attention_builds_a_layer_of_the_models_width(mha_type):
    attention = make(mha_type)
    assert isinstance(attention, AbstractAttention) and attention.d_model == D_MODEL


def test_no_attention_type_overrides_what_the_base_does_once(mha_type):
    layer_class = type(make(mha_type))
    bases = layer_class.__mro__[: layer_class.__mro__.index(AbstractAttention)]
    once = {"__call__", "init_cache", "decode"}
    assert not any(once & vars(base).keys() for base in bases)
    ours = [cls for cls in layer_class.__subclasses__() if cls.__module__.startswith("chargpt")]
    assert not ours, f"{layer_class} is concrete, hence final"


def test_every_concrete_class_is_the_layer_of_a_type():
    """Equinox makes a twin of a class at its first construction: it is told by its name."""
    named = {type(layer_of(kind)).__name__ for kind in AttentionType}
    pending, seen = [AbstractAttention], set()
    while pending:
        for subclass in pending.pop().__subclasses__():
            pending.append(subclass)
            if subclass.__module__.startswith("chargpt."):
                seen.add(subclass.__name__)
    assert named == seen


def test_no_attention_type_has_biases(mha_type):
    """They would decay like weights, and no file of Llama architecture has a place for them."""
    linears = jax.tree.leaves(make(mha_type), is_leaf=lambda node: isinstance(node, eqx.nn.Linear))
    linears = [node for node in linears if isinstance(node, eqx.nn.Linear)]
    assert linears and all(linear.bias is None for linear in linears)


def test_fused_projections_split_without_loss(mha_type):
    """Every number of the weight is in one part, once."""
    attention = make(mha_type)
    for path, split in attention.fused_projections().items():
        weight = indices(functools.reduce(getattr, path.split("."), attention).weight.shape)
        parts = split(weight)
        assert len(parts) > 1 and all(part.ndim == 2 for part in parts)
        numbers = np.sort(np.concatenate([np.ravel(part) for part in parts]))
        np.testing.assert_array_equal(numbers, np.ravel(weight))


def test_what_a_type_declares_is_what_it_has(mha_type):
    """Paths of projections, widths of products, a remark of one line."""
    attention = make(mha_type)
    for path in (attention.output, *attention.fused_projections()):
        assert isinstance(functools.reduce(getattr, path.split("."), attention), eqx.nn.Linear)
    score_width, value_width = attention.widths
    assert score_width > 0 and value_width > 0
    assert attention.remark() is None or attention.remark().isprintable()


def test_outputs_depend_on_no_later_token_and_on_every_one_that_is_read(mha_type, rope):
    """What a type without weights reads is unknown, but for the token itself."""
    attention = make(mha_type, rope)
    jacobian = jax.jit(jax.jacobian(attention))(tokens())
    depends = np.abs(jacobian).max(axis=(1, 3))  # [i, j]: how much y_i moves with x_j
    np.testing.assert_array_equal(np.triu(depends, 1), 0)
    weights = attention.attention_weights(tokens())
    read = np.eye(SEQ_LEN) if weights is None else np.asarray(weights).max(axis=0)
    assert depends[read > READ].min() > 1e-4


@pytest.mark.parametrize("prompt_len, max_seq_len", [(0, 12), (SEQ_LEN - 1, 12), (SEQ_LEN, 7)])
def test_decode_equals_the_forward_pass(mha_type, rope, prompt_len, max_seq_len):
    """A prompt, then token by token, in a longer cache that was not clean before."""
    attention, x, dirt = make(mha_type, rope), tokens(), 3.0
    cache = jax.tree.map(lambda leaf: leaf + dirt, attention.init_cache(max_seq_len))
    pieces = [x[:prompt_len]] * (prompt_len > 0) + [
        x[i : i + 1] for i in range(prompt_len, SEQ_LEN)
    ]
    outputs, position = [], 0
    for piece in pieces:
        y, cache = decode(attention, piece, cache, jnp.asarray(position))
        position += len(piece)
        outputs.append(y)
    close(jnp.concatenate(outputs), forward(attention, x))
    _, entries = project(attention, x, jnp.arange(SEQ_LEN))
    jax.tree.map(lambda slots, entry: close(slots[:SEQ_LEN], entry), cache, entries)
    jax.tree.map(lambda slots: np.testing.assert_array_equal(slots[SEQ_LEN:], dirt), cache)


def test_decode_takes_a_prompt_in_chunks(mha_type):
    attention, x = make(mha_type), tokens(6)
    first, cache = decode(attention, x[:3], attention.init_cache(6), jnp.asarray(0))
    second, _ = decode(attention, x[3:], cache, jnp.asarray(3))
    close(jnp.concatenate([first, second]), forward(attention, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_cache_is_empty_has_a_slot_per_token_and_the_dtype_of_the_weights(mha_type, dtype):
    leaves = jax.tree.leaves(narrowed(make(mha_type), dtype).init_cache(11))
    assert leaves and all(leaf.shape[0] == 11 and leaf.dtype == dtype for leaf in leaves)
    assert not any(leaf.any() for leaf in leaves)


def narrowed(attention, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, attention
    )


def test_bfloat16_stays_bfloat16_and_near_float32(mha_type, rope):
    attention, x = narrowed(make(mha_type, rope), jnp.bfloat16), tokens().astype(jnp.bfloat16)
    wide = forward(narrowed(attention, jnp.float32), x.astype(jnp.float32))
    y = forward(attention, x)
    decoded, cache = decode(attention, x, attention.init_cache(SEQ_LEN), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, decoded, cache))} == {
        jnp.dtype(jnp.bfloat16)
    }
    for narrow in (y, decoded):
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.03 * np.abs(wide).max())


def test_a_wrong_width_is_caught_by_the_shape_checker(mha_type):
    attention = make(mha_type)
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(jnp.ones((SEQ_LEN, D_MODEL + 1)))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention(jnp.ones((2, SEQ_LEN, D_MODEL)))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention.project(tokens(), jnp.arange(SEQ_LEN + 1))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention.decode(tokens().astype(int), attention.init_cache(SEQ_LEN), 0)


def test_every_array_of_a_layer_is_a_weight(mha_type):
    """Constants such as RoPE tables must not be leaves: an optimizer would change them."""
    attention = make(mha_type)
    grads, _ = gradients(forward, attention, tokens())
    arrays = [leaf for leaf in jax.tree.leaves(attention) if eqx.is_array(leaf)]
    assert len(arrays) == len(jax.tree.leaves(grads))
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads))


def test_a_batch_is_its_sequences(mha_type):
    """Also beyond a block of the kernel."""
    attention = make(mha_type)
    x = normal(3, 70, D_MODEL, seed=4)
    batched = eqx.filter_jit(lambda layer, rows: layer.batch(rows, 3))
    found = batched(attention, x.reshape(-1, D_MODEL)).reshape(x.shape)
    for sequence, expected in zip(x, found, strict=True):
        close(forward(attention, sequence), expected, atol=1e-5)
