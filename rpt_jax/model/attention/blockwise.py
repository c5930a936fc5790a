"""Attention in blocks of queries and keys, in plain XLA: memory grows with Q + S, not with Q·S, forward and backward.

A block of queries goes over those blocks of keys that some query in it sees, and keeps a running softmax: the largest score
so far, the sum of the exponentials, and the values so weighted. The backward pass forms the weights once more, block by
block, from the logarithm of that sum (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

RESULT = "attention"  # The name by which rematerialization keeps what the backward pass needs of the forward one.
# Finite, because exp(-inf - -inf) is NaN where a query sees nothing of a block.
HIDDEN = -1e30


class KeyBlock(NamedTuple):
    """Keys and values [N, K, G or 1, S, C], and the range of keys that each query sees, [N or 1, G or 1, Q] int32."""

    k: jax.Array
    v: jax.Array
    begin: jax.Array
    end: jax.Array


def masked_scores(q_NxKxGxRxQxC: jax.Array, part: KeyBlock, keys_S: jax.Array) -> jax.Array:
    """Products [N, K, G, R, Q, S] of queries and keys in float32, `HIDDEN` where the key with that index is out of range."""
    seen = (part.begin[..., None] <= keys_S) & (keys_S < part.end[..., None])
    return jnp.where(seen[:, None, :, None], products(q_NxKxGxRxQxC, part.k), HIDDEN)


def products(q_NxKxGxRxQxC: jax.Array, k_NxKxGxSxC: jax.Array) -> jax.Array:
    """Products [N, K, G, R, Q, S] in float32; what all branches share is read once."""
    return _einsum("nkgrqc,nk*sc->nkgrqs", k_NxKxGxSxC.shape[2], q_NxKxGxRxQxC, k_NxKxGxSxC)


def weighted_sums(weights_NxKxGxRxQxS: jax.Array, v_NxKxGxSxC: jax.Array) -> jax.Array:
    """Sums over the keys, [N, K, G, R, Q, C] in float32, the weights rounded to the dtype of what they weigh."""
    weights = weights_NxKxGxRxQxS.astype(v_NxKxGxSxC.dtype)
    return _einsum("nkgrqs,nk*sc->nkgrqc", v_NxKxGxSxC.shape[2], weights, v_NxKxGxSxC)


def _key_sums(weights_NxKxGxRxQxS: jax.Array, x_NxKxGxRxQxC: jax.Array, branches: int) -> jax.Array:
    """Sums over the queries that share a key, [N, K, branches, S, C] in float32."""
    weights = weights_NxKxGxRxQxS.astype(x_NxKxGxRxQxC.dtype)
    pattern = "nkgrqs,nkgrqc->nksc" if branches == 1 else "nkgrqs,nkgrqc->nkgsc"
    sums = jnp.einsum(pattern, weights, x_NxKxGxRxQxC, preferred_element_type=jnp.float32)
    return sums[:, :, None] if branches == 1 else sums


def _einsum(pattern: str, branches: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """`*` in the pattern of `y` is the branch axis, which a shared operand has with size 1."""
    y, star = (jnp.squeeze(y, 2), "") if branches == 1 else (y, "g")
    return jnp.einsum(pattern.replace("*", star), x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend_blockwise(q_NxKxGxRxQxC: jax.Array, parts: tuple[KeyBlock, ...], block: int) -> jax.Array:
    """Softmax attention over the union of `parts`, [N, K, G, R, Q, C] in the dtype of the queries.

    Args:
      q_NxKxGxRxQxC: queries, scaled already.
      parts: where to look; every query must see at least one key in one of them.
      block: most queries, and most keys, that are compared at one time.
    """
    return _forward(q_NxKxGxRxQxC, parts, block)[0]


def _forward(q: jax.Array, parts: tuple[KeyBlock, ...], block: int) -> tuple[jax.Array, jax.Array]:
    """Return the output and the logarithm of each query's sum of exponentials, [N, K, G, R, Q, 1] in float32."""

    def rows(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = _first(i, block, q.shape[4])
        q_i = _take(q, first, block, 4)

        def add(running: tuple[jax.Array, ...], keys: KeyBlock, indices_S: jax.Array) -> tuple[jax.Array, ...]:
            peak, total, out = running
            scores = masked_scores(q_i, keys, indices_S)
            higher = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return higher, total, out * shrink + weighted_sums(weights, keys.v)

        peak = jnp.full((*q_i.shape[:-1], 1), HIDDEN, jnp.float32)
        running = peak, jnp.zeros_like(peak), jnp.zeros(q_i.shape, jnp.float32)
        for part in parts:
            running = _over_keys(add, running, _rows_of(part, first, block), block)
        peak, total, out = running
        new = (out / total).astype(q.dtype), peak + jnp.log(total)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, first, 4) for x, y in zip(results, new, strict=True))

    start = jnp.zeros(q.shape, q.dtype), jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    return _over_queries(rows, start, q.shape[4], block)


def _saving(q: jax.Array, parts: tuple[KeyBlock, ...], block: int) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = (checkpoint_name(x, RESULT) for x in _forward(q, parts, block))
    return out, (q, parts, out, log_total)


def _backward(block: int, saved: tuple[Any, ...], dout: jax.Array) -> tuple[jax.Array, tuple[KeyBlock, ...]]:
    q, parts, out, log_total = saved

    def rows(i: jax.Array, grads: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        dq, dkvs = grads
        first = _first(i, block, q.shape[4])
        q_i, out_i, log_total_i = (_take(x, first, block, 4) for x in (q, out, log_total))
        # The last block may reach back over rows that have had their turn: without a gradient they add nothing.
        fresh_Q = first + jnp.arange(q_i.shape[4]) >= i * block
        dout_i = jnp.where(fresh_Q[:, None], _take(dout, first, block, 4), 0)
        inner = jnp.sum(dout_i.astype(jnp.float32) * out_i, -1, keepdims=True)

        def add(carry: tuple[jax.Array, ...], keys: KeyBlock, indices_S: jax.Array) -> tuple[jax.Array, ...]:
            dq_i, dk, dv = carry
            weights = jnp.exp(masked_scores(q_i, keys, indices_S) - log_total_i)
            dscores = weights * (products(dout_i, keys.v) - inner)
            dk = _add_at(dk, _key_sums(dscores, q_i, dk.shape[2]), indices_S[0], 3)
            dv = _add_at(dv, _key_sums(weights, dout_i, dv.shape[2]), indices_S[0], 3)
            return dq_i + weighted_sums(dscores, keys.k), dk, dv

        dq_i, new = jnp.zeros(q_i.shape, jnp.float32), []
        for part, dkv in zip(parts, dkvs, strict=True):
            dq_i, *dkv = _over_keys(add, (dq_i, *dkv), _rows_of(part, first, block), block)
            new.append(tuple(dkv))
        return _add_at(dq, dq_i.astype(dq.dtype), first, 4), new

    start = jnp.zeros(q.shape, q.dtype), [tuple(jnp.zeros(x.shape, jnp.float32) for x in part[:2]) for part in parts]
    dq, dkvs = _over_queries(rows, start, q.shape[4], block)
    return dq, tuple(
        KeyBlock(dk.astype(part.k.dtype), dv.astype(part.v.dtype), None, None)
        for part, (dk, dv) in zip(parts, dkvs, strict=True)
    )


attend_blockwise.defvjp(_saving, _backward)


@jax.named_scope("key_blocks")
def _over_keys(add: Callable[..., Any], carry: Any, part: KeyBlock, block: int) -> Any:
    """Fold `add(carry, a block of the part's keys, their indices)` over the blocks that some query sees."""
    size = part.k.shape[3]

    def step(j: jax.Array, carry: Any) -> Any:
        first = _first(j, block, size)
        k, v = (_take(x, first, block, 3) for x in part[:2])
        # The last block may reach back over keys that have had their turn: they begin to be seen after those.
        seen = KeyBlock(k, v, jnp.maximum(part.begin, j * block), part.end)
        return add(carry, seen, first + jnp.arange(k.shape[3]))

    if size <= block:
        return step(0, carry)
    return jax.lax.fori_loop(part.begin.min() // block, -(-part.end.max() // block), step, carry)


def _rows_of(part: KeyBlock, first: jax.Array | int, block: int) -> KeyBlock:
    """The part as a block of queries sees it."""
    return part._replace(begin=_take(part.begin, first, block, 2), end=_take(part.end, first, block, 2))


def _over_queries(rows: Callable[..., Any], carry: Any, size: int, block: int) -> Any:
    return rows(0, carry) if size <= block else jax.lax.fori_loop(0, -(-size // block), rows, carry)


def _first(i: jax.Array | int, block: int, size: int) -> jax.Array | int:
    """Where block i of an axis of `size` begins; the last one ends with the axis."""
    return jnp.minimum(i * block, size - block) if size > block else 0


def _take(x: jax.Array, first: jax.Array | int, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, min(block, x.shape[axis]), axis)


def _add_at(x: jax.Array, y: jax.Array, first: jax.Array | int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _take(x, first, y.shape[axis], axis) + y, first, axis)
