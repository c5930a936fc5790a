"""Attention of new tokens over the several places where keys may lie: one signature, one implementation a platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.errors import UserError
from rpt_jax.model.attention.blockwise import KeyBlock, attend_blockwise, masked_scores, weighted_sums
from rpt_jax.model.attention.kernels import attend_cudnn, attend_splash
from rpt_jax.model.attention.platform import target_platform


class _Kernel(NamedTuple):
    platform: str
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    dtypes: tuple[str, ...]


_KERNELS = {
    "cudnn": _Kernel("gpu", attend_cudnn, ("bfloat16",)),
    "splash": _Kernel("tpu", attend_splash, ("bfloat16", "float32")),
}
# Blocks that stay in a core's cache are fastest on a CPU; an accelerator wants fewer and larger products.
_BLOCK = {"cpu": 64, "gpu": 256, "tpu": 256}
# The most pairs of a query and a key, in any head, that are compared at one time without blocks.
_DENSE_PAIRS = 64 * 128


class KeyValues(NamedTuple):
    """Keys and values of S tokens for N prompts, K kv heads and G branches; G is 1 where the branches share them.

    Attributes: k_NxKxGxSxC, v_NxKxGxSxC, rotated already. A leading L axis is present where all layers are meant.
    """

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """Keys that new tokens may look at: a query sees those from `begin` up to, not including, `end`.

    A range a query, not a truth value a pair: it says the same of prompts, caches and packed sequences in Q numbers.

    Attributes:
      kv: the keys and values.
      begin_NxGxQ: int32, broadcasts; None: the first key.
      end_NxGxQ: int32, broadcasts; None: the keys are those of the queries' own tokens, and a token sees itself and what
        comes before it.
    """

    kv: KeyValues
    begin_NxGxQ: jax.Array | None = None
    end_NxGxQ: jax.Array | None = None


def choose_attention(name: str, platform: str, dtype: str) -> str:
    """Return the implementation that `policy.attention` means on a platform ("cpu", "gpu" or "tpu").

    "auto" is the platform's kernel, and blockwise where there is none. Raises: UserError, where the kernel is another
    platform's or does not compute in `dtype`.
    """
    fitting = [n for n, kernel in _KERNELS.items() if kernel.platform == platform and dtype in kernel.dtypes]
    if name == "auto":
        return fitting[0] if fitting else "blockwise"
    if name in _KERNELS and name not in fitting:
        kernel = _KERNELS[name]
        raise UserError(
            f"policy.attention='{name}' is for a {kernel.platform} and {' or '.join(kernel.dtypes)}; here are a {platform} and "
            f"policy.dtype='{dtype}'. 'auto' takes the best that runs."
        )
    return name


def attend(q_NxKxGxRxQxC: jax.Array, contexts: Sequence[Context], attention: str = "reference") -> jax.Array:
    """Softmax attention over the union of `contexts`, without gluing their keys together.

    A context whose branch axis is 1 is read once for all G branches: a prompt's keys are never repeated for its samples.
    The kernels ("cudnn", "splash") know causal self-attention only, which prefill and pre-training are made of; where there is
    more to look at, blockwise takes their place, since the kernels' derivatives cannot be merged over several contexts.

    Args:
      q_NxKxGxRxQxC: queries; R query heads belong to each of the K kv heads.
      contexts: where to look; every query must see at least one key in one of them.
      attention: "reference", "blockwise", "cudnn" or "splash".

    Returns: [N, K, G, R, Q, C] in the dtype of the queries; scores and softmax are float32.
    """
    queries, keys = q_NxKxGxRxQxC.shape[4], sum(context.kv.k.shape[-2] for context in contexts)
    dense = attention == "reference" or queries * keys <= _DENSE_PAIRS
    causal = len(contexts) == 1 and contexts[0].begin_NxGxQ is None and contexts[0].end_NxGxQ is None
    if attention in _KERNELS and causal and not dense:
        return _KERNELS[attention].attend(q_NxKxGxRxQxC, *contexts[0].kv)
    q = q_NxKxGxRxQxC * q_NxKxGxRxQxC.shape[-1] ** -0.5
    parts = tuple(_part(context, queries) for context in contexts)
    return _attend_reference(q, parts) if dense else attend_blockwise(q, parts, _BLOCK[target_platform()])


def _part(context: Context, queries: int) -> KeyBlock:
    """Write the range of keys of each query out."""
    begin, end = context.begin_NxGxQ, context.end_NxGxQ
    if begin is None:
        begin = jnp.zeros((1, 1, 1), jnp.int32)
    if end is None:
        end = jnp.arange(1, queries + 1, dtype=jnp.int32)[None, None]
    begin, end = (jnp.broadcast_to(x, (*x.shape[:2], queries)) for x in (begin, end))
    return KeyBlock(*context.kv, begin, end)


def _attend_reference(q_NxKxGxRxQxC: jax.Array, parts: tuple[KeyBlock, ...]) -> jax.Array:
    """All scores at once: what the others must equal, and the fastest where the queries are few."""
    scores = [masked_scores(q_NxKxGxRxQxC, part, jnp.arange(part.k.shape[3])) for part in parts]
    peak = scores[0].max(-1, keepdims=True)
    for s in scores[1:]:
        peak = jnp.maximum(peak, s.max(-1, keepdims=True))
    # The softmax does not depend on the peak; without this the backward pass would go through it for nothing.
    peak = jax.lax.stop_gradient(peak)
    total, out = 0.0, 0.0
    for s, part in zip(scores, parts, strict=True):
        weights = jnp.exp(s - peak)
        total = total + weights.sum(-1, keepdims=True)
        out = out + weighted_sums(weights, part.v)
    return (out / total).astype(q_NxKxGxRxQxC.dtype)
