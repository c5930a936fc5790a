"""One decode step: the next token of every live rollout through the policy's layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.dispatch import KeyValues
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.experts import ROUTING, Routing
from rpt_jax.model.transformer import Head, Layer, Params, Transformer, embed, head, rms_norm, rotary_angles
from rpt_jax.rollout.kv_cache import AttentionFn

# Input axes of the projections of attention, for which heads have an axis of their own.
_ATTENTION_INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 3}


def prepare_decode_params(policy: Transformer, params: Params) -> Params:
    """Convert parameters to the form that `decode_token` takes, once before the decode loop.

    On a CPU the head is transposed here: XLA would transpose it for every token, which takes a third of the time of
    everything else for 8 rollouts of a policy with 11 M parameters.
    """
    if target_platform() == "cpu":
        params = params | {"head_DxV": jax.lax.optimization_barrier(head(policy, params).matrix_VxD.T)}
    return params


def decode_head(policy: Transformer, params: Params) -> Head:
    """Return the head of parameters from `prepare_decode_params`."""
    result = head(policy, params)
    return dataclasses.replace(result, matrix_VxD=params["head_DxV"].T) if "head_DxV" in params else result


@jax.named_scope("decode")
def decode_token(
    policy: Transformer, params: Params, tokens_M: jax.Array, positions_M: jax.Array, attend: AttentionFn
) -> tuple[jax.Array, KeyValues, Routing | None]:
    """Run one token of each of M rollouts.

    Args:
      policy: the decoder.
      params: from `prepare_decode_params`.
      tokens_M: int32 ids.
      positions_M: int32 positions.
      attend: attention over the rollouts' caches.

    Returns: hidden_MxD after the final norm, the tokens' KeyValues [L, M, K, 1, 1, C], and their experts, [L, M, …], None if the
      policy has none.
    """
    config = policy.config
    rotary = rotary_angles(positions_M[:, None, None], config.head_size, config.rope_base, config.rope_scaling)
    layer = Layer(config=config, dtype=policy.dtype, attention=policy.attention, lora=policy.lora)

    # XLA multiplies with a layer's part of a stack of matrices in place, but copies a part with more axes first.
    stacks = params["layers"]
    matrices = {name: _as_matrices(stacks[name], inputs) for name, inputs in _ATTENTION_INPUT_AXES.items()}

    def run(x_Mx1x1xD: jax.Array, weights_and_index: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        weights, index = weights_and_index
        weights |= {name: weights[name].reshape(stacks[name].shape[1:]) for name in matrices}
        attention = functools.partial(attend, index)
        outputs, recorded = layer.apply({"params": weights}, x_Mx1x1xD, (), (), rotary, attention, mutable=[ROUTING])
        x_Mx1x1xD, new = cast(tuple[jax.Array, KeyValues], outputs)
        return x_Mx1x1xD, (new, recorded)

    x_Mx1x1xD = embed(params, tokens_M[:, None, None], policy.dtype)
    x_Mx1x1xD, (new, recorded) = jax.lax.scan(run, x_Mx1x1xD, (stacks | matrices, jnp.arange(config.layers)))
    routing = jax.tree.map(lambda x: x[:, :, 0, 0], recorded[ROUTING]["routing"]) if config.experts else None
    return rms_norm(x_Mx1x1xD[:, 0, 0], params["norm"], config.norm_epsilon), new, routing


def _as_matrices(stack: jax.Array, inputs: int) -> jax.Array:
    """Return the parameters of all layers, [L, …], as matrices [L, I, O]; `inputs` axes after the first are inputs."""
    dims = stack.shape[1 : 1 + inputs]
    return stack.reshape(len(stack), math.prod(dims), -1)
