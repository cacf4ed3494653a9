"""Mixture of experts: many feed-forward layers, of which a router gives each token a few."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from chargpt.attention.base import Stream, projection
from chargpt.config import ModelConfig, Router
from chargpt.feed_forward import FeedForward

Shares = Float[Array, "t e"]  # of the experts, for each token


class Routing(eqx.Module):
    """What a layer's router did with a batch: means over its tokens."""

    load: Float[Array, "*layers e"]  # what each expert got of all that was given out
    entropy: Float[Array, "*layers"]  # of a token's probabilities, in nats
    aux_loss: Float[Array, "*layers"]  # e sum(load · probability): 1 if both are even
    z_loss: Float[Array, "*layers"]  # logsumexp(logits)², arXiv 2202.08906


class TopKRouter(eqx.Module):
    """Which experts a token is given, and their shares; in float32 whatever the precision is.

    softmax: the k largest probabilities (Mixtral, arXiv 2401.04088). sigmoid_bias: the k largest
    of sigmoid + bias, with shares from the sigmoids alone; each step moves the bias towards even
    loads, in place of an auxiliary loss (DeepSeek-V3, arXiv 2412.19437). The shares add up to one
    if they are renormalised.
    """

    proj: eqx.nn.Linear
    bias: Float[Array, " e"] | None
    num_experts: int = eqx.field(static=True)
    experts_per_token: int = eqx.field(static=True)
    renormalise: bool = eqx.field(static=True)

    def __init__(self, config: ModelConfig, num_experts: int, *, key: PRNGKeyArray):
        self.proj = projection(config.d_model, num_experts, key)
        self.bias = jnp.zeros(num_experts) if config.router is Router.sigmoid_bias else None
        self.num_experts = num_experts
        self.experts_per_token = config.experts_per_token
        self.renormalise = config.router_renormalise

    def __call__(self, x: Stream) -> tuple[Shares, Routing]:
        """A share of zero where a token does not go. Each token is routed by itself."""
        logits = jnp.einsum(
            "tm,em->te",
            x.astype(jnp.float32),
            self.proj.weight.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,  # on a GPU, XLA might round to TensorFloat-32
        )
        if self.bias is None:
            scores = ranks = probabilities = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            ranks = scores + jax.lax.stop_gradient(self.bias)
            probabilities = normalised(scores)
        chosen = largest(ranks, self.experts_per_token).astype(jnp.float32)
        shares = scores * chosen
        load, probability = chosen.mean(axis=0) / self.experts_per_token, probabilities.mean(axis=0)
        routing = Routing(
            load=load,
            entropy=jax.scipy.special.entr(probabilities).sum(axis=1).mean(),
            aux_loss=self.num_experts * jnp.sum(load * probability),
            z_loss=jnp.square(jax.nn.logsumexp(logits, axis=1)).mean(),
        )
        return normalised(shares) if self.renormalise else shares, routing


def largest(ranks: Shares, number: int) -> Bool[Array, "t e"]:
    """Which of them are the largest of each token; of equal ones the first.

    By comparing all pairs: `jax.lax.top_k` of a batch that devices share would gather it.
    """
    own, other = ranks[:, :, None], ranks[:, None, :]
    earlier = jnp.tri(ranks.shape[1], k=-1, dtype=bool)
    ahead = (other > own) | ((other == own) & earlier)
    return ahead.sum(axis=2) < number


def normalised(shares: Shares) -> Shares:
    """Adding up to one; sigmoids may all be zero, so not divided by zero, as in DeepSeek-V3."""
    return shares / (shares.sum(axis=1, keepdims=True) + 1e-20)


class MixtureOfExperts(eqx.Module):
    """sum over experts of share · expert(x), and the shared experts, which every token is given.

    Nothing is dropped: there is no capacity, so a token's output depends on no other token, and a
    cached decode equals the forward pass. Every expert is computed for every token, all in one
    product: together they are a feed-forward layer of width e f, of whose hidden units each token
    keeps its share. That is more work than the chosen experts are, yet faster for few of them than
    sorting tokens for `jax.lax.ragged_dot`, which XLA for a CPU expands to the same products.
    """

    router: TopKRouter
    experts: FeedForward  # weights [e, out, in]
    shared_experts: FeedForward | None  # as one

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        assert config.num_experts is not None
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        width, shared = config.expert_width, config.shared_experts

        def expert(width: int, key: PRNGKeyArray) -> FeedForward:
            return FeedForward(config.d_model, width, config.activation, key=key)

        self.router = TopKRouter(config, config.num_experts, key=router_key)
        keys = jax.random.split(experts_key, config.num_experts)
        self.experts = eqx.filter_vmap(lambda key: expert(width, key))(keys)
        self.shared_experts = expert(shared * width, shared_key) if shared else None

    def __call__(self, x: Stream) -> Stream:
        return self.routed(x)[0]

    def routed(self, x: Stream) -> tuple[Stream, Routing]:
        """The output, and what the router did."""
        shares, routing = self.router(x)
        hidden = self.experts.hidden(x).reshape(*shares.shape, -1)
        weighted = hidden * shares.astype(x.dtype)[:, :, None]
        y = jnp.einsum("tef,emf->tm", weighted, self.experts.down_proj.weight)
        return y if self.shared_experts is None else y + self.shared_experts(x), routing

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths of what adds to the stream."""
        shared = () if self.shared_experts is None else ("shared_experts.down_proj",)
        return ("experts.down_proj", *shared)
