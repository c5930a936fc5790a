"""Blockwise attention in plain XLA: memory grows with Q + S instead of Q·S, forward and backward.

Each block of queries is compared with the blocks of keys that any of its queries attends to, with an online softmax: the largest
score so far, the sum of exponentials and the weighted sum of values. The backward pass recomputes the weights block by block
from the log of that sum (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Checkpoint name of what the backward pass of attention needs, for rematerialization policies.
ATTENTION_RESULT = "attention"
# Score of a key that a query does not attend to. Finite, because exp(-inf - -inf) is NaN for a query without keys in a block.
MASKED_SCORE = -1e30

# Queries and keys per block, by platform. On CPUs, blocks that fit in a core's cache are fastest; accelerators need larger
# matrix products.
BLOCK_SIZES = {"cpu": 64, "gpu": 256, "tpu": 256}


class KeyBlock(NamedTuple):
    """Keys and values, and the range of keys that each query attends to.

    Attributes:
      k, v: [N, K, G, S, C]; G is 1 if the branches share them.
      begin, end: int32 [N, G, Q], where N and G may be 1; a query attends to the keys from `begin` up to, but not including,
        `end`.
    """

    k: jax.Array
    v: jax.Array
    begin: jax.Array
    end: jax.Array


def masked_scores(q_NxKxGxRxQxC: jax.Array, key_block: KeyBlock, keys_S: jax.Array) -> jax.Array:
    """Compute scores [N, K, G, R, Q, S] in float32, `MASKED_SCORE` for keys outside of a query's range.

    Args:
      q_NxKxGxRxQxC: scaled queries.
      key_block: keys and the range of each query.
      keys_S: indices of these keys, to which the ranges refer.
    """
    attended = (key_block.begin[..., None] <= keys_S) & (keys_S < key_block.end[..., None])
    return jnp.where(attended[:, None, :, None], products(q_NxKxGxRxQxC, key_block.k), MASKED_SCORE)


def products(q_NxKxGxRxQxC: jax.Array, k_NxKxGxSxC: jax.Array) -> jax.Array:
    """Compute dot products [N, K, G, R, Q, S] in float32; keys shared by the branches are read once."""
    return _einsum("nkgrqc,nk*sc->nkgrqs", k_NxKxGxSxC.shape[2], q_NxKxGxRxQxC, k_NxKxGxSxC)


def weighted_sums(weights_NxKxGxRxQxS: jax.Array, v_NxKxGxSxC: jax.Array) -> jax.Array:
    """Compute weighted sums over keys, [N, K, G, R, Q, C] in float32, with the weights cast to the dtype of the values."""
    weights = weights_NxKxGxRxQxS.astype(v_NxKxGxSxC.dtype)
    return _einsum("nkgrqs,nk*sc->nkgrqc", v_NxKxGxSxC.shape[2], weights, v_NxKxGxSxC)


def _sum_over_queries(weights_NxKxGxRxQxS: jax.Array, x_NxKxGxRxQxC: jax.Array, branches: int) -> jax.Array:
    """Compute weighted sums over the queries that share a key, [N, K, branches, S, C] in float32."""
    weights = weights_NxKxGxRxQxS.astype(x_NxKxGxRxQxC.dtype)
    pattern = "nkgrqs,nkgrqc->nksc" if branches == 1 else "nkgrqs,nkgrqc->nkgsc"
    sums = jnp.einsum(pattern, weights, x_NxKxGxRxQxC, preferred_element_type=jnp.float32)
    return sums[:, :, None] if branches == 1 else sums


def _einsum(pattern: str, branches: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """Run einsum; `*` in the pattern is the branch axis of `y`, which is squeezed out if it has size 1."""
    if branches == 1:
        y = jnp.squeeze(y, 2)
    pattern = pattern.replace("*", "" if branches == 1 else "g")
    return jnp.einsum(pattern, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend_blockwise(q_NxKxGxRxQxC: jax.Array, key_blocks: tuple[KeyBlock, ...], block_size: int) -> jax.Array:
    """Compute softmax attention over the union of `key_blocks`.

    Args:
      q_NxKxGxRxQxC: scaled queries.
      key_blocks: keys and values; every query must attend to at least one key in one of them.
      block_size: number of queries, and of keys, that are compared at a time.

    Returns: [N, K, G, R, Q, C] in the dtype of the queries.
    """
    return _forward(q_NxKxGxRxQxC, key_blocks, block_size)[0]


def _forward(q: jax.Array, key_blocks: tuple[KeyBlock, ...], block_size: int) -> tuple[jax.Array, jax.Array]:
    """Return the output, and the log of each query's sum of exponentials, [N, K, G, R, Q, 1] in float32."""

    def run_queries(i: jax.Array | int, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        first = _block_start(i, block_size, q.shape[4])
        q_i = _take(q, first, block_size, 4)

        def add_keys(running: tuple[jax.Array, ...], keys: KeyBlock, indices_S: jax.Array) -> tuple[jax.Array, ...]:
            # Online softmax: rescale the sums so far whenever a larger score appears.
            peak, total, out = running
            scores = masked_scores(q_i, keys, indices_S)
            higher = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return higher, total, out * shrink + weighted_sums(weights, keys.v)

        # Run over the blocks of all keys, then normalize and write this block's part of the results.
        peak = jnp.full((*q_i.shape[:-1], 1), MASKED_SCORE, jnp.float32)
        running = peak, jnp.zeros_like(peak), jnp.zeros(q_i.shape, jnp.float32)
        for key_block in key_blocks:
            running = _fold_keys(add_keys, running, _for_queries(key_block, first, block_size), block_size)
        peak, total, out = running
        new = (out / total).astype(q.dtype), peak + jnp.log(total)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, first, 4) for x, y in zip(results, new, strict=True))

    start = jnp.zeros(q.shape, q.dtype), jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    return _fold_queries(run_queries, start, q.shape[4], block_size)


def _forward_with_residuals(
    q: jax.Array, key_blocks: tuple[KeyBlock, ...], block_size: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = (checkpoint_name(x, ATTENTION_RESULT) for x in _forward(q, key_blocks, block_size))
    return out, (q, key_blocks, out, log_total)


def _backward(block_size: int, residuals: tuple[Any, ...], dout: jax.Array) -> tuple[jax.Array, tuple[KeyBlock, ...]]:
    """Return the gradients of the queries, and of the keys and values of each key block.

    Args:
      block_size: as in `attend_blockwise`.
      residuals: from `_forward_with_residuals`.
      dout: gradient of the output, [N, K, G, R, Q, C].
    """
    q, key_blocks, out, log_total = residuals

    def run_queries(i: jax.Array | int, grads: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        dq, dkvs = grads
        first = _block_start(i, block_size, q.shape[4])
        q_i, out_i, log_total_i = (_take(x, first, block_size, 4) for x in (q, out, log_total))
        # The last block may overlap the one before: zero the gradient of the rows that were already added.
        new_Q = first + jnp.arange(q_i.shape[4]) >= i * block_size
        dout_i = jnp.where(new_Q[:, None], _take(dout, first, block_size, 4), 0)
        dout_dot_out = jnp.sum(dout_i.astype(jnp.float32) * out_i, -1, keepdims=True)

        def add_keys(carry: tuple[jax.Array, ...], keys: KeyBlock, indices_S: jax.Array) -> tuple[jax.Array, ...]:
            # Gradient of the softmax (algorithm 2): dS = P * (dO V^T - rowsum(dO * O)).
            dq_i, dk, dv = carry
            weights = jnp.exp(masked_scores(q_i, keys, indices_S) - log_total_i)
            dscores = weights * (products(dout_i, keys.v) - dout_dot_out)
            dk = _add_at(dk, _sum_over_queries(dscores, q_i, dk.shape[2]), indices_S[0], 3)
            dv = _add_at(dv, _sum_over_queries(weights, dout_i, dv.shape[2]), indices_S[0], 3)
            return dq_i + weighted_sums(dscores, keys.k), dk, dv

        # The gradient of these queries is complete after all keys; those of keys and values are sums over all queries.
        dq_i = jnp.zeros(q_i.shape, jnp.float32)
        new = []
        for key_block, (dk, dv) in zip(key_blocks, dkvs, strict=True):
            keys = _for_queries(key_block, first, block_size)
            dq_i, dk, dv = _fold_keys(add_keys, (dq_i, dk, dv), keys, block_size)
            new.append((dk, dv))
        return _add_at(dq, dq_i.astype(dq.dtype), first, 4), new

    dkvs = [(jnp.zeros(x.k.shape, jnp.float32), jnp.zeros(x.v.shape, jnp.float32)) for x in key_blocks]
    start = jnp.zeros(q.shape, q.dtype), dkvs
    dq, dkvs = _fold_queries(run_queries, start, q.shape[4], block_size)
    # None: the integer ranges have no gradient.
    return dq, tuple(
        key_block._replace(k=dk.astype(key_block.k.dtype), v=dv.astype(key_block.v.dtype), begin=None, end=None)
        for key_block, (dk, dv) in zip(key_blocks, dkvs, strict=True)
    )


attend_blockwise.defvjp(_forward_with_residuals, _backward)


@jax.named_scope("key_blocks")
def _fold_keys(add_keys: Callable[..., Any], carry: Any, key_block: KeyBlock, block_size: int) -> Any:
    """Fold `add_keys(carry, keys, their indices)` over the blocks of `block_size` keys that any query attends to."""
    size = key_block.k.shape[3]

    def step(j: jax.Array | int, carry: Any) -> Any:
        first = _block_start(j, block_size, size)
        keys = KeyBlock(
            k=_take(key_block.k, first, block_size, 3),
            v=_take(key_block.v, first, block_size, 3),
            # The last block may overlap the one before: mask the keys that were already added.
            begin=jnp.maximum(key_block.begin, j * block_size),
            end=key_block.end,
        )
        return add_keys(carry, keys, first + jnp.arange(keys.k.shape[3]))

    if size <= block_size:
        return step(0, carry)
    return jax.lax.fori_loop(key_block.begin.min() // block_size, -(-key_block.end.max() // block_size), step, carry)


def _for_queries(key_block: KeyBlock, first: jax.Array | int, block_size: int) -> KeyBlock:
    """Return `key_block` with the ranges of the block of queries that begins at `first`."""
    return key_block._replace(
        begin=_take(key_block.begin, first, block_size, 2), end=_take(key_block.end, first, block_size, 2)
    )


def _fold_queries(run_queries: Callable[..., Any], carry: Any, size: int, block_size: int) -> Any:
    """Fold `run_queries(index of a block of queries, carry)` over all blocks."""
    if size <= block_size:
        return run_queries(0, carry)
    return jax.lax.fori_loop(0, -(-size // block_size), run_queries, carry)


def _block_start(i: jax.Array | int, block_size: int, size: int) -> jax.Array | int:
    """Return where block `i` of an axis begins; the last block is moved back so that it ends with the axis."""
    return jnp.minimum(i * block_size, size - block_size) if size > block_size else 0


def _take(x: jax.Array, first: jax.Array | int, block_size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, min(block_size, x.shape[axis]), axis)


def _add_at(x: jax.Array, y: jax.Array, first: jax.Array | int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _take(x, first, y.shape[axis], axis) + y, first, axis)
