"""One token of every live rollout through the policy's layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.dispatch import KeyValues
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.transformer import Head, Layer, Params, Transformer, embed, head, rms_norm, rotary_angles
from rpt_jax.rollout.kv_cache import Look

# Every layer more is compiled once more, at every size of the live batch.
_MOST_TAKEN_APART = 6


def lay_out(policy: Transformer, params: Params) -> Params:
    """Lay the parameters out for decoding, once before the loop.

    Few layers are taken apart: a slice of the stack a token would copy every weight. XLA's CPU backend would also turn the head
    round every token, which takes as long as a third of all the rest for 8 rollouts of a policy of 11 M.
    """
    if target_platform() == "cpu":
        params = params | {"head_DxV": jax.lax.optimization_barrier(head(policy, params).matrix_VxD.T)}
    if policy.config.layers > _MOST_TAKEN_APART:
        return params
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(policy.config.layers)]
    return params | {"layers": layers}


def decode_head(policy: Transformer, params: Params) -> Head:
    """Return the head of parameters that `lay_out` returned."""
    ours = head(policy, params)
    return ours._replace(matrix_VxD=params["head_DxV"].T) if "head_DxV" in params else ours


def decode_token(
    policy: Transformer, params: Params, tokens_M: jax.Array, positions_M: jax.Array, look: Look
) -> tuple[jax.Array, KeyValues]:
    """Run one token of each of M rollouts.

    Args:
      params: as `lay_out` returns them.
      tokens_M, positions_M: int32.
      look: attention over what the rollouts have behind them.

    Returns: hidden_MxD after the final norm, and the tokens' KeyValues [L, M, K, 1, 1, C].
    """
    shape = policy.config
    rotary = rotary_angles(positions_M[:, None, None], shape.head_size, shape.rope_base, shape.rope_scaling)
    layer = Layer(shape, policy.dtype, policy.attention)

    def run(x_Mx1x1xD: jax.Array, weights_and_index: tuple[Any, jax.Array | int]) -> tuple[jax.Array, KeyValues]:
        weights, index = weights_and_index
        return layer.apply({"params": weights}, x_Mx1x1xD, (), (), rotary, functools.partial(look, index))

    x_Mx1x1xD, layers = embed(params, tokens_M[:, None, None], policy.dtype), params["layers"]
    if isinstance(layers, list):
        news = []
        for index, weights in enumerate(layers):
            x_Mx1x1xD, new = run(x_Mx1x1xD, (weights, index))
            news.append(new)
        new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *news)
    else:
        x_Mx1x1xD, new = jax.lax.scan(run, x_Mx1x1xD, (layers, jnp.arange(shape.layers)))
    return rms_norm(x_Mx1x1xD[:, 0, 0], params["norm"], shape.norm_epsilon), new
