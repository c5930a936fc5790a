"""Mixture of experts: a feed-forward layer of E experts, of which each token runs through the A that its router prefers.

No token is dropped and no expert has a capacity, so a token's result does not depend on other tokens, padding among them.

The rows of all pairs of a token and one of its experts are sorted by expert, so that the layer is three products of groups of
rows, each group with its expert's matrix (`grouped_matmul`). On a mesh, the experts of a layer are split over the devices that
share the layer. Each of them has all tokens, computes the pairs of its own experts, and the results are summed, as those of a
dense layer are.

Letters in shape suffixes: E experts, A experts of a token, M tokens, S = M·A pairs, sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jax.ad_checkpoint import checkpoint_name

from rpt_jax.model.grouped_matmul import grouped_matmul

# Collection of Flax variables in which layers record their `Routing`, for callers that ask for it.
ROUTING = "routing"
# Name of the products that the backward pass needs, for policies of rematerialization.
EXPERT_PRODUCT = "expert_product"


class Routing(NamedTuple):
    """The experts of tokens. Leading axes are those of the tokens, after a layer axis where layers are stacked.

    Attributes:
      experts: int32 [..., A], different from each other, the one with the highest probability first.
      weights: float32 [..., A], factors of their outputs.
      probabilities: float32 [..., E], of all experts.
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


@jax.named_scope("router")
def route(x: jax.Array, router_DxE: jax.Array, experts_per_token: int, normalize: bool) -> Routing:
    """Choose the experts of each token, as Qwen3 does: the most likely ones of a softmax over all experts.

    Args:
      x: activations [..., D].
      router_DxE: matrix of the router, in the dtype of `x`; logits and probabilities are float32.
      experts_per_token: A.
      normalize: divide the weights of a token's experts by their sum.
    """
    logits = jnp.einsum("...d,de->...e", x, router_DxE, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(experts=experts, weights=weights, probabilities=probabilities)


def expert_counts(routing: Routing, is_counted: jax.Array) -> jax.Array:
    """Return how many of the counted tokens each expert gets, int32 [L, E].

    Args:
      routing: of tokens [L, …].
      is_counted: bool […].
    """
    is_chosen = routing.experts[..., None] == jnp.arange(routing.probabilities.shape[-1])  # [L, …, A, E]
    counted_axes = tuple(range(1, is_chosen.ndim - 1))
    return jnp.sum(is_chosen & is_counted[..., None, None], axis=counted_axes, dtype=jnp.int32)


def expert_shares(counts_LxE: jax.Array) -> jax.Array:
    """Return the share of each expert in a layer's pairs of a token and an expert, float32 [L, E]; 0 if there are none."""
    return counts_LxE / jnp.maximum(counts_LxE.sum(axis=1, keepdims=True), 1)


def load_metrics(shares_LxE: jax.Array) -> dict[str, jax.Array]:
    """Return how evenly tokens are spread over the experts of a layer, by names in metrics.jsonl."""
    return {
        "experts/busiest": (shares_LxE.max(axis=1) * shares_LxE.shape[1]).mean(),
        "experts/unused": (shares_LxE == 0).mean(),
    }


def balance_terms(routing: Routing, shares_LxE: jax.Array) -> jax.Array:
    """Return the load-balancing loss of each token, float32 […], a mean over layers.

    Its mean over tokens is E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, equation 4), where f_e is the share of expert e
    and P_e its mean probability: 1 if the load is balanced. The shares are those of the whole batch (arXiv 2501.11873), and the
    gradient is that of the probabilities.

    Args:
      routing: of tokens [L, …].
      shares_LxE: from `expert_shares`.
    """
    layers, experts = shares_LxE.shape
    shares = jnp.expand_dims(shares_LxE, tuple(range(1, routing.probabilities.ndim - 1)))
    return experts / layers * jnp.sum(routing.probabilities * shares, axis=(0, -1))


class ExpertMatrices(NamedTuple):
    """The matrices of the experts of a layer, or of those of one device."""

    gate_ExDxF: jax.Array
    up_ExDxF: jax.Array
    down_ExFxD: jax.Array


@jax.named_scope("experts")
def run_experts(x_NxGxQxD: jax.Array, routing: Routing, matrices: ExpertMatrices) -> jax.Array:
    """Return the weighted sum of the outputs of each token's experts, [N, G, Q, D] in the dtype of `x_NxGxQxD`.

    Args:
      x_NxGxQxD: activations.
      routing: of the tokens.
      matrices: of all experts.
    """
    chosen = routing.experts, routing.weights
    if jax.sharding.get_abstract_mesh().empty:
        return run_local_experts(x_NxGxQxD, *chosen, matrices, first=0)

    # Under shard_map, tokens are sorted on their own device only.
    tokens = logical_to_mesh_axes(("prompt",))
    split = logical_to_mesh_axes(("experts",))
    assert tokens is not None and split is not None  # They are None only for names that are None.
    axes = split[0]

    def run_local(x: jax.Array, experts: jax.Array, weights: jax.Array, local: ExpertMatrices) -> jax.Array:
        if axes is None:
            return run_local_experts(x, experts, weights, local, first=0)
        first = jax.lax.axis_index(axes) * len(local.gate_ExDxF)
        return jax.lax.psum(run_local_experts(x, experts, weights, local, first), axes)

    run = jax.shard_map(run_local, in_specs=(tokens, tokens, tokens, split), out_specs=tokens, check_vma=False)
    return run(x_NxGxQxD, *chosen, matrices)


def run_local_experts(
    x_NxGxQxD: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertMatrices, first: jax.Array | int
) -> jax.Array:
    """Return what some of the experts contribute to `run_experts`: the other experts of a token count as zero.

    Args:
      x_NxGxQxD: activations.
      experts, weights: of the tokens, see `Routing`.
      matrices: of the experts.
      first: number of the first of them.
    """
    x_MxD = x_NxGxQxD.reshape(-1, x_NxGxQxD.shape[-1])
    per_token = experts.shape[-1]
    count = len(matrices.gate_ExDxF)

    # Sort the pairs by expert, those of other devices' experts last.
    expert_S = experts.reshape(-1) - first
    expert_S = jnp.where((expert_S >= 0) & (expert_S < count), expert_S, count)
    order_S = jnp.argsort(expert_S)
    inverse_S = jnp.argsort(order_S)
    sizes_E = (expert_S[:, None] == jnp.arange(count)).sum(axis=0, dtype=jnp.int32)
    # What a product of groups returns for rows after the last group is not defined, nor is their gradient.
    is_local_Sx1 = (jnp.arange(len(expert_S)) < sizes_E.sum())[:, None]
    x_SxD = jnp.where(is_local_Sx1, _permute(jnp.repeat(x_MxD, per_token, axis=0), order_S, inverse_S), 0)
    weights_Sx1 = jnp.where(is_local_Sx1, _permute(weights.reshape(-1, 1), order_S, inverse_S), 0)

    # SwiGLU. The output is linear in the hidden units, so the weights are applied to these, which are fewer.
    gate_SxF = checkpoint_name(grouped_matmul(x_SxD, matrices.gate_ExDxF, sizes_E), EXPERT_PRODUCT)
    up_SxF = checkpoint_name(grouped_matmul(x_SxD, matrices.up_ExDxF, sizes_E), EXPERT_PRODUCT)
    hidden_SxF = (nn.silu(gate_SxF) * up_SxF * weights_Sx1).astype(x_MxD.dtype)
    y_SxD = jnp.where(is_local_Sx1, grouped_matmul(hidden_SxF, matrices.down_ExFxD, sizes_E), 0)

    # Back to the order of the tokens.
    y_MxAxD = _permute(y_SxD, inverse_S, order_S).reshape(-1, per_token, x_MxD.shape[1])
    return y_MxAxD.sum(axis=1, dtype=jnp.float32).astype(x_MxD.dtype).reshape(x_NxGxQxD.shape)


@jax.custom_vjp
def _permute(x_SxD: jax.Array, order_S: jax.Array, inverse_S: jax.Array) -> jax.Array:
    """Return the rows of `x_SxD` in another order. The gradient is a permutation, too, where that of indexing is a scatter."""
    return x_SxD[order_S]


def _permute_forward(
    x_SxD: jax.Array, order_S: jax.Array, inverse_S: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_SxD[order_S], (order_S, inverse_S)


def _permute_backward(indices: tuple[jax.Array, jax.Array], gradient_SxD: jax.Array) -> tuple[jax.Array, None, None]:
    _, inverse_S = indices
    return gradient_SxD[inverse_S], None, None


_permute.defvjp(_permute_forward, _permute_backward)
