"""Attention of new tokens over the several places where keys may lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, because exp(-inf - -inf) is NaN where a part has no visible key at all.
_HIDDEN = -1e30


class KeyValues(NamedTuple):
    """Keys and values of S tokens for N prompts, K kv heads and G branches; G is 1 where the branches share them.

    Attributes: k_NxKxGxSxC, v_NxKxGxSxC, rotated already. A leading L axis is present where all layers are meant.
    """

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """Keys that new tokens may look at, and which of them: `visible_NxGxQxS` is bool and broadcasts."""

    kv: KeyValues
    visible_NxGxQxS: jax.Array


def attend(q_NxKxGxRxQxC: jax.Array, contexts: Sequence[Context]) -> jax.Array:
    """Softmax attention over the union of `contexts`, without gluing their keys together.

    A context whose branch axis is 1 is read once for all G branches: a prompt's keys are never repeated for its samples.

    Args:
      q_NxKxGxRxQxC: queries; R query heads belong to each of the K kv heads.
      contexts: where to look; every query must see at least one key in one of them.

    Returns: [N, K, G, R, Q, C] in the dtype of the queries; scores and softmax are float32.
    """
    scale = q_NxKxGxRxQxC.shape[-1] ** -0.5
    scores = [_scores(q_NxKxGxRxQxC * scale, context) for context in contexts]
    peak = scores[0].max(-1, keepdims=True)
    for s in scores[1:]:
        peak = jnp.maximum(peak, s.max(-1, keepdims=True))
    # The softmax does not depend on the peak; without this the backward pass would go through it for nothing.
    peak = jax.lax.stop_gradient(peak)
    total, out = 0.0, 0.0
    for s, context in zip(scores, contexts, strict=True):
        weights = jnp.exp(s - peak)
        total = total + weights.sum(-1, keepdims=True)
        out = out + _weighted_values(weights.astype(context.kv.v.dtype), context.kv.v)
    return (out / total).astype(q_NxKxGxRxQxC.dtype)


def _scores(q_NxKxGxRxQxC: jax.Array, context: Context) -> jax.Array:
    k = context.kv.k
    f32 = {"preferred_element_type": jnp.float32}
    if k.shape[2] == 1:
        scores = jnp.einsum("nkgrqc,nksc->nkgrqs", q_NxKxGxRxQxC, k[:, :, 0], **f32)
    else:
        scores = jnp.einsum("nkgrqc,nkgsc->nkgrqs", q_NxKxGxRxQxC, k, **f32)
    return jnp.where(context.visible_NxGxQxS[:, None, :, None], scores, _HIDDEN)


def _weighted_values(weights_NxKxGxRxQxS: jax.Array, v_NxKxGxSxC: jax.Array) -> jax.Array:
    f32 = {"preferred_element_type": jnp.float32}
    if v_NxKxGxSxC.shape[2] == 1:
        return jnp.einsum("nkgrqs,nksc->nkgrqc", weights_NxKxGxRxQxS, v_NxKxGxSxC[:, :, 0], **f32)
    return jnp.einsum("nkgrqs,nkgsc->nkgrqc", weights_NxKxGxRxQxS, v_NxKxGxSxC, **f32)
