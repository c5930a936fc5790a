"""Attention within rows into which many sequences are packed: each token attends to a few ranges of keys of its row.

Sequences that share a prefix lie in one row, which holds the prefix once: a token attends to the ranges of the prefixes that its
sequence begins with, and to its own sequence up to itself. A block of queries is compared only with the blocks of keys that any
of its queries attends to, so that memory grows linearly with the tokens of a row, forward and backward.

This module has the choice of the implementation, the reference, and the implementation in plain XLA: an online softmax as in
blockwise.py, for a panel of many query blocks at a time. The kernels are in packed_mosaic.py and packed_triton.py.

Letters in shape suffixes: N rows of W tokens, each of B blocks of b tokens (W = B·b), M ranges per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec

from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.dispatch import KERNELS
from rpt_jax.model.attention.key_ranges import QUERY_PANEL_SIZES, KeyRanges
from rpt_jax.model.attention.platform import target_platform


@jax.named_scope("packed_attention")
def attend_packed(
    q_NxKx1xRxWxC: jax.Array, k_NxKx1xWxC: jax.Array, v_NxKx1xWxC: jax.Array, key_ranges: KeyRanges, attention: str
) -> jax.Array:
    """Compute softmax attention of each token over its key ranges.

    Args:
      q_NxKx1xRxWxC: queries after rotary position embedding; each row has one branch.
      k_NxKx1xWxC, v_NxKx1xWxC: keys and values of the same tokens.
      key_ranges: which keys of its row each token attends to.
      attention: "reference" computes all scores at once, "blockwise" block by block in plain XLA; or one of
        `dispatch.KERNELS`.

    Returns: [N, K, 1, R, W, C] in the dtype of the queries; scores and softmax are computed in float32.
    """
    attend = _implementation(attention, q_NxKx1xRxWxC.dtype.name)
    if not jax.sharding.get_abstract_mesh().empty:
        # Each device computes its own rows and kv heads: XLA cannot partition a kernel, and a loop runs only as long as the
        # device's own rows need.
        axes = logical_to_mesh_axes(("prompt", "kv_heads"))
        assert axes is not None  # It is None only for names that are None.
        attend = jax.shard_map(
            attend, in_specs=(axes, axes, axes, PartitionSpec(axes[0])), out_specs=axes, check_vma=False
        )
    q = q_NxKx1xRxWxC * q_NxKx1xRxWxC.shape[-1] ** -0.5
    return attend(q[:, :, 0], k_NxKx1xWxC[:, :, 0], v_NxKx1xWxC[:, :, 0], key_ranges)[:, :, None]


def _implementation(attention: str, dtype: str) -> Callable[..., jax.Array]:
    """Return the function of scaled queries, keys, values and key ranges, for one device."""
    if attention == "reference":
        return attend_all_keys
    if attention in KERNELS and dtype in KERNELS[attention].packed.dtypes:
        return KERNELS[attention].packed.attend
    return _attend_in_blocks


def attend_all_keys(
    q_NxKxRxWxC: jax.Array, k_NxKxWxC: jax.Array, v_NxKxWxC: jax.Array, key_ranges: KeyRanges
) -> jax.Array:
    """Compute attention with all scores of a row at once: the reference for the others."""
    keys_W = jnp.arange(k_NxKxWxC.shape[2])
    attended = (key_ranges.begin_NxMxW[..., None] <= keys_W) & (keys_W < key_ranges.end_NxMxW[..., None])
    mask_NxWxW = attended.any(axis=1)
    scores = jnp.einsum("nkrqc,nksc->nkrqs", q_NxKxRxWxC, k_NxKxWxC, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask_NxWxW[:, None, None], scores, MASKED_SCORE)).astype(v_NxKxWxC.dtype)
    out = jnp.einsum("nkrqs,nksc->nkrqc", weights, v_NxKxWxC, preferred_element_type=jnp.float32)
    return out.astype(q_NxKxRxWxC.dtype)


class _QueryBlocks(NamedTuple):
    """Blocks of b queries with their key ranges; the block axis comes first, so that a panel is a slice of it."""

    q: jax.Array  # [B, N, K, R, b, C]
    begin: jax.Array  # [B, N, M, b]
    end: jax.Array  # [B, N, M, b]
    blocks: jax.Array  # [B, N, B], key blocks, those that are attended to first.
    counts: jax.Array  # [B, N], how many of them are attended to.


class _OutputBlocks(NamedTuple):
    """What the backward pass needs of the output, with the layout of `_QueryBlocks`."""

    dout: jax.Array  # [B, N, K, R, b, C], gradient of the output.
    dout_dot_out: jax.Array  # [B, N, K, R, b, 1], dot product of the gradient and the output.
    log_total: jax.Array  # [B, N, K, R, b, 1], log of each query's sum of exponentials.


@jax.custom_vjp
def _attend_in_blocks(
    q_NxKxRxWxC: jax.Array, k_NxKxWxC: jax.Array, v_NxKxWxC: jax.Array, key_ranges: KeyRanges
) -> jax.Array:
    return _forward_with_residuals(q_NxKxRxWxC, k_NxKxWxC, v_NxKxWxC, key_ranges)[0]


def _forward_with_residuals(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Return the output [N, K, R, W, C], and the residuals for `_backward`, split into blocks.

    Args:
      q: scaled queries [N, K, R, W, C].
      k, v: keys and values [N, K, W, C].
      key_ranges: which keys of its row each query attends to.
    """
    queries = _split_queries(q, key_ranges)
    num_blocks = key_ranges.counts_NxB.shape[1]
    k_NxBxKxbxC = _split_keys(k, num_blocks)
    v_NxBxKxbxC = _split_keys(v, num_blocks)

    def run_panel(panel: _QueryBlocks, results: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
        def add_keys(
            running: tuple[jax.Array, ...], index_BxN: jax.Array, live_BxN: jax.Array
        ) -> tuple[jax.Array, ...]:
            # Online softmax: rescale the sums so far whenever a larger score appears.
            peak, total, out = running
            scores = _masked_scores(panel, _gather_blocks(k_NxBxKxbxC, index_BxN), index_BxN, live_BxN)
            higher = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return higher, total, out * shrink + _weighted_sums(weights, _gather_blocks(v_NxBxKxbxC, index_BxN))

        # Run over the key blocks, then normalize and write the panel's part of the results.
        peak = jnp.full((*panel.q.shape[:-1], 1), MASKED_SCORE, jnp.float32)
        start = peak, jnp.zeros_like(peak), jnp.zeros(panel.q.shape, jnp.float32)
        peak, total, out = _fold_keys(add_keys, start, panel)
        new = (out / total).astype(q.dtype), peak + jnp.log(total)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, first, 0) for x, y in zip(results, new, strict=True))

    start = jnp.zeros(queries.q.shape, q.dtype), jnp.zeros((*queries.q.shape[:-1], 1), jnp.float32)
    out, log_total = _fold_panels(run_panel, start, queries, queries)
    return _join_queries(out), (queries, k_NxBxKxbxC, v_NxBxKxbxC, out, log_total)


def _backward(residuals: tuple[Any, ...], dout_NxKxRxWxC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients of queries, keys and values; the weights are recomputed from `log_total`, block by block.

    Args:
      residuals: from `_forward_with_residuals`.
      dout_NxKxRxWxC: gradient of the output.
    """
    queries, k_NxBxKxbxC, v_NxBxKxbxC, out, log_total = residuals
    dout = _split_tokens(dout_NxKxRxWxC, queries.q.shape[0])
    outputs = _OutputBlocks(
        dout=dout,
        dout_dot_out=jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True),
        log_total=log_total,
    )

    def run_panel(
        panels: tuple[_QueryBlocks, _OutputBlocks], grads: tuple[jax.Array, ...], first: jax.Array
    ) -> tuple[jax.Array, ...]:
        panel, output = panels

        def add_keys(carry: tuple[jax.Array, ...], index_BxN: jax.Array, live_BxN: jax.Array) -> tuple[jax.Array, ...]:
            # Gradient of the softmax (FlashAttention-2, algorithm 2): dS = P * (dO V^T - rowsum(dO * O)).
            dq, dk, dv = carry
            k = _gather_blocks(k_NxBxKxbxC, index_BxN)
            v = _gather_blocks(v_NxBxKxbxC, index_BxN)
            weights = jnp.exp(_masked_scores(panel, k, index_BxN, live_BxN) - output.log_total)
            dscores = weights * (_products(output.dout, v) - output.dout_dot_out)
            dk = _scatter_add_blocks(dk, index_BxN, _sum_over_queries(dscores, panel.q))
            dv = _scatter_add_blocks(dv, index_BxN, _sum_over_queries(weights, output.dout))
            return dq + _weighted_sums(dscores, k), dk, dv

        # The gradient of the queries is complete after one panel; those of keys and values are sums over all panels.
        dq, dk, dv = grads
        dq_panel, dk, dv = _fold_keys(add_keys, (jnp.zeros(panel.q.shape, jnp.float32), dk, dv), panel)
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_panel, first, 0), dk, dv

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries.q, k_NxBxKxbxC, v_NxBxKxbxC))
    dq, dk, dv = _fold_panels(run_panel, start, queries, (queries, outputs))
    return (
        _join_queries(dq).astype(queries.q.dtype),
        _join_keys(dk).astype(k_NxBxKxbxC.dtype),
        _join_keys(dv).astype(v_NxBxKxbxC.dtype),
        None,  # The integer ranges have no gradient.
    )


_attend_in_blocks.defvjp(_forward_with_residuals, _backward)


def _fold_panels(run_panel: Callable[..., Any], carry: Any, queries: _QueryBlocks, blocks: Any) -> Any:
    """Fold `run_panel(panel, carry, index of its first block)` over panels of query blocks.

    Args:
      run_panel: function of a panel, which is a slice of `blocks` along their first axis.
      carry: initial value.
      queries: all query blocks; they determine the size of a panel.
      blocks: tree of arrays with a leading block axis, sliced into panels.
    """
    num_blocks = queries.q.shape[0]
    block_size = queries.q.shape[4]
    panel_blocks = max(1, QUERY_PANEL_SIZES[target_platform()] // block_size)
    # A row that is shorter than a panel is processed block by block.
    panel_blocks = math.gcd(panel_blocks, num_blocks) if num_blocks >= panel_blocks else 1

    def step(i: jax.Array, carry: Any) -> Any:
        first = i * panel_blocks
        panel = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, panel_blocks, 0), blocks)
        return run_panel(panel, carry, first)

    return jax.lax.fori_loop(0, num_blocks // panel_blocks, step, carry)


@jax.named_scope("packed_key_blocks")
def _fold_keys(add_keys: Callable[..., Any], carry: Any, panel: _QueryBlocks) -> Any:
    """Fold `add_keys(carry, a key block for each query block, whether it attends to that key block)`."""

    def step(j: jax.Array, carry: Any) -> Any:
        return add_keys(carry, jax.lax.dynamic_index_in_dim(panel.blocks, j, 2, keepdims=False), j < panel.counts)

    return jax.lax.fori_loop(0, panel.counts.max(), step, carry)


def _masked_scores(panel: _QueryBlocks, k: jax.Array, index_BxN: jax.Array, live_BxN: jax.Array) -> jax.Array:
    """Compute scores [B, N, K, R, b, b] of each query block and one key block, `MASKED_SCORE` outside of the ranges.

    Args:
      panel: query blocks.
      k: a key block for each query block, [B, N, K, b, C].
      index_BxN: indices of these key blocks in their rows.
      live_BxN: bool, whether the query block attends to this key block at all.
    """
    keys = (index_BxN[..., None] * k.shape[3] + jnp.arange(k.shape[3]))[:, :, None, None]
    in_range = ((panel.begin[..., None] <= keys) & (keys < panel.end[..., None])).any(axis=2)
    attended = in_range & live_BxN[..., None, None]
    return jnp.where(attended[:, :, None, None], _products(panel.q, k), MASKED_SCORE)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqc,bnksc->bnkrqs", q, k, preferred_element_type=jnp.float32)


def _weighted_sums(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqs,bnksc->bnkrqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _sum_over_queries(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqs,bnkrqc->bnksc", weights.astype(x.dtype), x, preferred_element_type=jnp.float32)


def _gather_blocks(x_NxBxKxbxC: jax.Array, index_BxN: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, index: x[index], in_axes=(0, 1), out_axes=1)(x_NxBxKxbxC, index_BxN)


def _scatter_add_blocks(x_NxBxKxbxC: jax.Array, index_BxN: jax.Array, y: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, index, y: x.at[index].add(y), in_axes=(0, 1, 1))(x_NxBxKxbxC, index_BxN, y)


def _split_queries(q: jax.Array, key_ranges: KeyRanges) -> _QueryBlocks:
    num_blocks = key_ranges.counts_NxB.shape[1]

    def split_ranges(x_NxMxW: jax.Array) -> jax.Array:
        return x_NxMxW.reshape(*x_NxMxW.shape[:2], num_blocks, -1).transpose(2, 0, 1, 3)

    return _QueryBlocks(
        q=_split_tokens(q, num_blocks),
        begin=split_ranges(key_ranges.begin_NxMxW),
        end=split_ranges(key_ranges.end_NxMxW),
        blocks=key_ranges.blocks_NxBxB.transpose(1, 0, 2),
        counts=key_ranges.counts_NxB.transpose(1, 0),
    )


def _split_tokens(x_NxKxRxWxC: jax.Array, num_blocks: int) -> jax.Array:
    """Return [B, N, K, R, b, C]."""
    n, k, r, _, c = x_NxKxRxWxC.shape
    return x_NxKxRxWxC.reshape(n, k, r, num_blocks, -1, c).transpose(3, 0, 1, 2, 4, 5)


def _join_queries(x_BxNxKxRxbxC: jax.Array) -> jax.Array:
    """Return [N, K, R, W, C], the inverse of `_split_tokens`."""
    x = x_BxNxKxRxbxC.transpose(1, 2, 3, 0, 4, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[5])


def _split_keys(k_NxKxWxC: jax.Array, num_blocks: int) -> jax.Array:
    """Return [N, B, K, b, C]."""
    n, k, _, c = k_NxKxWxC.shape
    return k_NxKxWxC.reshape(n, k, num_blocks, -1, c).transpose(0, 2, 1, 3, 4)


def _join_keys(x_NxBxKxbxC: jax.Array) -> jax.Array:
    """Return [N, K, W, C], the inverse of `_split_keys`."""
    n, _, k, _, c = x_NxBxKxbxC.shape
    return x_NxBxKxbxC.transpose(0, 2, 1, 3, 4).reshape(n, k, -1, c)
