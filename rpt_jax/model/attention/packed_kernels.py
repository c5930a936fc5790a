"""Attention over packed rows by kernels: what those for TPUs and those for GPUs have in common.

Both compare a block of queries with one block of keys at a time (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2), so
memory grows linearly with the tokens of a row. They differ in how they go through the pairs of blocks, and in the axis of the
scores along which the keys lie: 0 for scores [s, q], 1 for scores [q, s].

Letters in shape suffixes: a block has q queries and s keys; N rows of W tokens, K kv heads, R query heads for each of them, head
size C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rpt_jax.model.attention.blockwise import ATTENTION_RESULT, MASKED_SCORE
from rpt_jax.model.attention.key_ranges import KeyRanges


class OutputGradient(NamedTuple):
    """What the backward pass needs of the output.

    Attributes:
      dout_NxKxRxWxC: gradient of the output.
      log_total_NxKxRxW: float32, log of each query's sum of exponentials.
      dout_dot_out_NxKxRxW: float32, dot product of the gradient and the output.
    """

    dout_NxKxRxWxC: jax.Array
    log_total_NxKxRxW: jax.Array
    dout_dot_out_NxKxRxW: jax.Array


class RowKernels(NamedTuple):
    """The kernels of a platform; queries are scaled, and results have the dtype of what they belong to.

    Attributes:
      forward: function of q [N, K, R, W, C], k and v [N, K, W, C], and the key ranges; returns the output, as q, and the log of
        each query's sum of exponentials, float32 [N, K, R, W].
      query_gradient: function of q, k, v, `OutputGradient` and the key ranges; returns the gradient of q.
      key_gradients: function of the same; returns the gradients of k and v.
    """

    forward: Callable[[jax.Array, jax.Array, jax.Array, KeyRanges], tuple[jax.Array, jax.Array]]
    query_gradient: Callable[[jax.Array, jax.Array, jax.Array, OutputGradient, KeyRanges], jax.Array]
    key_gradients: Callable[[jax.Array, jax.Array, jax.Array, OutputGradient, KeyRanges], tuple[jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_by_kernels(
    kernels: RowKernels, q_NxKxRxWxC: jax.Array, k_NxKxWxC: jax.Array, v_NxKxWxC: jax.Array, key_ranges: KeyRanges
) -> jax.Array:
    """Compute softmax attention of each token over its key ranges; a token without keys gets zeros.

    Args:
      kernels: the platform's kernels.
      q_NxKxRxWxC: scaled queries.
      k_NxKxWxC, v_NxKxWxC: keys and values of the same tokens.
      key_ranges: which keys of its row each token attends to.

    Returns: [N, K, R, W, C] in the dtype of the queries.
    """
    return kernels.forward(q_NxKxRxWxC, k_NxKxWxC, v_NxKxWxC, key_ranges)[0]


def _forward(
    kernels: RowKernels, q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, log_total = (checkpoint_name(x, ATTENTION_RESULT) for x in kernels.forward(q, k, v, key_ranges))
    return out, (q, k, v, key_ranges, out, log_total)


def _backward(
    kernels: RowKernels, residuals: tuple[Any, ...], dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, key_ranges, out, log_total = residuals
    output = OutputGradient(
        dout_NxKxRxWxC=dout,
        log_total_NxKxRxW=log_total,
        dout_dot_out_NxKxRxW=jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1),
    )
    dq = kernels.query_gradient(q, k, v, output, key_ranges)
    dk, dv = kernels.key_gradients(q, k, v, output, key_ranges)
    return dq, dk, dv, None  # The integer ranges have no gradient.


attend_by_kernels.defvjp(_forward, _backward)


# --- within a kernel: one block of queries and one block of keys ---


class Softmax(NamedTuple):
    """Online softmax of a block of queries.

    Attributes:
      peak: the largest score so far, [1, q] or [q, 1].
      total: the sum of exponentials, likewise.
      out: the weighted sum of values, [C, q] or [q, C].
    """

    peak: jax.Array
    total: jax.Array
    out: jax.Array


def start_softmax(queries: int, head_size: int, keys_axis: int) -> Softmax:
    """Return the state before the first block of keys."""
    statistic = (1, queries) if keys_axis == 0 else (queries, 1)
    out = (head_size, queries) if keys_axis == 0 else (queries, head_size)
    return Softmax(
        peak=jnp.full(statistic, MASKED_SCORE, jnp.float32),
        total=jnp.zeros(statistic, jnp.float32),
        out=jnp.zeros(out, jnp.float32),
    )


def attended_keys(
    ranges: Iterable[tuple[jax.Array, jax.Array]], first_key: jax.Array, keys: int, keys_axis: int
) -> jax.Array:
    """Return which keys of a block each query attends to, bool [s, q] or [q, s].

    Args:
      ranges: begin and end of each range, int32 [q].
      first_key: index of the block's first key in its row.
      keys: number of keys of the block.
      keys_axis: 0 or 1.
    """
    attended = None
    for begin_q, end_q in ranges:
        begin, end = (jnp.expand_dims(x, keys_axis) for x in (begin_q, end_q))
        dims = (keys, begin_q.shape[0]) if keys_axis == 0 else (begin_q.shape[0], keys)
        index = first_key + jax.lax.broadcasted_iota(jnp.int32, dims, keys_axis)
        in_range = (begin <= index) & (index < end)
        attended = in_range if attended is None else attended | in_range
    assert attended is not None
    return attended


def masked_scores(q_qxC: jax.Array, k_sxC: jax.Array, attended: jax.Array, keys_axis: int) -> jax.Array:
    """Compute scores [s, q] or [q, s], `MASKED_SCORE` for keys that a query does not attend to."""
    return jnp.where(attended, _products(q_qxC, k_sxC, keys_axis), MASKED_SCORE)


def add_keys(softmax: Softmax, scores: jax.Array, v_sxC: jax.Array, keys_axis: int) -> Softmax:
    """Add a block of keys to an online softmax: rescale the sums so far whenever a larger score appears."""
    higher = jnp.maximum(softmax.peak, scores.max(keys_axis, keepdims=True))
    weights = jnp.exp(scores - higher)
    shrink = jnp.exp(softmax.peak - higher)
    return Softmax(
        peak=higher,
        total=softmax.total * shrink + weights.sum(keys_axis, keepdims=True),
        out=softmax.out * shrink + sum_over_keys(weights, v_sxC, keys_axis),
    )


def merge(a: Softmax, b: Softmax) -> Softmax:
    """Combine the results over different keys."""
    peak = jnp.maximum(a.peak, b.peak)
    share_a, share_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return Softmax(peak, a.total * share_a + b.total * share_b, a.out * share_a + b.out * share_b)


def finish_softmax(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """Return the output, and the log of the sum of exponentials.

    For queries without keys the output is zero, and the log so large that the backward pass computes weights of zero.
    """
    has_keys = softmax.peak > MASKED_SCORE
    total = jnp.where(has_keys, softmax.total, 1.0)
    out = jnp.where(has_keys, softmax.out / total, 0.0)
    return out, jnp.where(has_keys, softmax.peak + jnp.log(total), -MASKED_SCORE)


def score_gradients(
    scores: jax.Array,
    log_total: jax.Array,
    dout_qxC: jax.Array,
    dout_dot_out: jax.Array,
    v_sxC: jax.Array,
    keys_axis: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the attention weights and the gradient of the scores, dS = P * (dO V^T - rowsum(dO * O)); both as `scores`.

    Args:
      scores: from `masked_scores`.
      log_total, dout_dot_out: of each query, [1, q] or [q, 1].
      dout_qxC: gradient of the output.
      v_sxC: values.
      keys_axis: 0 or 1.
    """
    weights = jnp.exp(scores - log_total)
    return weights, weights * (_products(dout_qxC, v_sxC, keys_axis) - dout_dot_out)


def sum_over_keys(weights: jax.Array, x_sxC: jax.Array, keys_axis: int) -> jax.Array:
    """Compute weighted sums over keys, [C, q] or [q, C]; the weights are cast to the dtype of `x_sxC`."""
    weights = weights.astype(x_sxC.dtype)
    return _dot(x_sxC, 0, weights, 0) if keys_axis == 0 else _dot(weights, 1, x_sxC, 0)


def sum_over_queries(weights_sxq: jax.Array, x_qxC: jax.Array) -> jax.Array:
    """Compute weighted sums over queries, [s, C]; the weights are cast to the dtype of `x_qxC`."""
    return _dot(weights_sxq.astype(x_qxC.dtype), 1, x_qxC, 0)


def _products(q_qxC: jax.Array, k_sxC: jax.Array, keys_axis: int) -> jax.Array:
    return _dot(k_sxC, 1, q_qxC, 1) if keys_axis == 0 else _dot(q_qxC, 1, k_sxC, 1)


def _dot(x: jax.Array, x_axis: int, y: jax.Array, y_axis: int) -> jax.Array:
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
