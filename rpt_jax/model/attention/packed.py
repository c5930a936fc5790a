"""Attention inside rows that hold many stretches of text: each token sees a few ranges of its own row's keys.

So sequences that share prefixes lie in one row, each prefix once: a token sees its ancestors' ranges and its own stretch. A
block of queries goes over those blocks of keys alone that some query in it sees, with a running softmax as in blockwise.py,
many blocks of queries at a time; memory grows with the tokens of a row, forward and backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from rpt_jax.model.attention.blockwise import HIDDEN
from rpt_jax.model.attention.platform import target_platform

# Tokens of a block, and of the blocks of queries that are run at one time: what stays in a core's cache is fastest on a CPU, an
# accelerator wants large products.
BLOCK = {"cpu": 64, "gpu": 256, "tpu": 256}
PANEL = {"cpu": 512, "gpu": 4096, "tpu": 4096}


class KeyRanges(NamedTuple):
    """What the tokens of N rows of W tokens see of their row; the same in every layer.

    Attributes:
      begin_NxMxW, end_NxMxW: int32, M ranges of keys; a token sees what is in any of its M. Each must see something.
      blocks_NxBxB: int32, for each block of W / B queries the blocks of keys, those with something to see first;
      counts_NxB: int32, and how many these are.
    """

    begin_NxMxW: jax.Array
    end_NxMxW: jax.Array
    blocks_NxBxB: jax.Array
    counts_NxB: jax.Array


def row_size(tokens: int) -> int:
    """The least size of a row, at least `tokens`, that is made of whole blocks."""
    platform = target_platform()
    multiple = next((m for m in (PANEL[platform], BLOCK[platform]) if tokens > m), 1)
    return -(-tokens // multiple) * multiple


def make_key_ranges(begin_NxMxW: jax.Array, end_NxMxW: jax.Array, block: int | None = None) -> KeyRanges:
    """Find out which blocks see each other. `block`, a platform's own by default, must divide W if it is smaller."""
    n, _, size = begin_NxMxW.shape
    block = min(block or BLOCK[target_platform()], size)
    first_B = jnp.arange(0, size, block, dtype=jnp.int32)

    def sees(range_: tuple[jax.Array, jax.Array]) -> jax.Array:
        begin_NxWx1, end_NxWx1 = (x[..., None] for x in range_)
        met = (jnp.maximum(begin_NxWx1, first_B) < jnp.minimum(end_NxWx1, first_B + block)).reshape(
            n, -1, block, len(first_B)
        )
        return met.any(axis=2)

    seen_NxBxB = functools.reduce(jnp.logical_or, map(sees, zip(*_ranges(begin_NxMxW, end_NxMxW), strict=True)))
    blocks_NxBxB = jnp.argsort(~seen_NxBxB, axis=-1, stable=True).astype(jnp.int32)
    return KeyRanges(begin_NxMxW, end_NxMxW, blocks_NxBxB, seen_NxBxB.sum(axis=-1, dtype=jnp.int32))


def _ranges(*arrays_NxMxW: jax.Array) -> tuple[list[jax.Array], ...]:
    return tuple([x[:, m] for m in range(x.shape[1])] for x in arrays_NxMxW)


@jax.named_scope("packed_attention")
def attend_packed(
    q_NxKx1xRxWxC: jax.Array, k_NxKx1xWxC: jax.Array, v_NxKx1xWxC: jax.Array, seen: KeyRanges, attention: str
) -> jax.Array:
    """Softmax attention of each token over what it sees of its row.

    Args:
      q_NxKx1xRxWxC: rotated queries; a row is one branch.
      k_NxKx1xWxC, v_NxKx1xWxC: keys and values of the same tokens.
      attention: "reference" forms all scores at once. The platforms' kernels know no such rows: all others mean blocks.

    Returns: [N, K, 1, R, W, C] in the dtype of the queries; scores and softmax are float32.
    """
    attend = _attend_reference if attention == "reference" else _attend_blocks
    if not jax.sharding.get_abstract_mesh().empty:
        # Each device runs its own rows and kv heads, as many blocks as these need.
        axes = nn.logical_to_mesh_axes(("prompt", "kv_heads"))
        specs = (*[axes] * 3, PartitionSpec(axes[0]))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=axes, check_vma=False)
    q = q_NxKx1xRxWxC * q_NxKx1xRxWxC.shape[-1] ** -0.5
    return attend(*(x[:, :, 0] for x in (q, k_NxKx1xWxC, v_NxKx1xWxC)), seen)[:, :, None]


def _attend_reference(q_NxKxRxWxC: jax.Array, k_NxKxWxC: jax.Array, v_NxKxWxC: jax.Array, seen: KeyRanges) -> jax.Array:
    """All scores at once: what the blocks must equal."""
    keys_W = jnp.arange(k_NxKxWxC.shape[2])
    sees = ((seen.begin_NxMxW[..., None] <= keys_W) & (keys_W < seen.end_NxMxW[..., None])).any(axis=1)
    scores = jnp.einsum("nkrqc,nksc->nkrqs", q_NxKxRxWxC, k_NxKxWxC, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, HIDDEN)).astype(v_NxKxWxC.dtype)
    out = jnp.einsum("nkrqs,nksc->nkrqc", weights, v_NxKxWxC, preferred_element_type=jnp.float32)
    return out.astype(q_NxKxRxWxC.dtype)


class _Queries(NamedTuple):
    """Blocks of b queries, [B, N, …] each: who they are, what they see, and in the backward pass what came of them."""

    q: jax.Array  # [B, N, K, R, b, C]
    begin: jax.Array  # [B, N, M, b]
    end: jax.Array
    blocks: jax.Array  # [B, N, B]
    counts: jax.Array  # [B, N]
    dout: jax.Array | None = None  # As q,
    inner: jax.Array | None = None  # and [B, N, K, R, b, 1]: the products of `dout` and the output,
    log_total: jax.Array | None = None  # the logarithm of each query's sum of exponentials.


@jax.custom_vjp
def _attend_blocks(q_NxKxRxWxC: jax.Array, k_NxKxWxC: jax.Array, v_NxKxWxC: jax.Array, seen: KeyRanges) -> jax.Array:
    return _saving(q_NxKxRxWxC, k_NxKxWxC, v_NxKxWxC, seen)[0]


def _saving(q: jax.Array, k: jax.Array, v: jax.Array, seen: KeyRanges) -> tuple[jax.Array, tuple[Any, ...]]:
    queries, (k_NxBxKxbxC, v_NxBxKxbxC) = _queries(q, seen), (_key_blocks(x, seen) for x in (k, v))

    def rows(panel: _Queries, results: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
        def add(running: tuple[jax.Array, ...], index_BxN: jax.Array, live_BxN: jax.Array) -> tuple[jax.Array, ...]:
            peak, total, out = running
            scores = _scores(panel, _pick(k_NxBxKxbxC, index_BxN), index_BxN, live_BxN)
            higher = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(peak - higher)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return higher, total, out * shrink + _weighted(weights, _pick(v_NxBxKxbxC, index_BxN))

        peak = jnp.full((*panel.q.shape[:-1], 1), HIDDEN, jnp.float32)
        start = peak, jnp.zeros_like(peak), jnp.zeros(panel.q.shape, jnp.float32)
        peak, total, out = _over_keys(add, start, panel)
        new = (out / total).astype(q.dtype), peak + jnp.log(total)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, first, 0) for x, y in zip(results, new, strict=True))

    room = jnp.zeros(queries.q.shape, q.dtype), jnp.zeros((*queries.q.shape[:-1], 1), jnp.float32)
    out, log_total = _over_queries(rows, room, queries)
    return _in_rows(out), (queries, k_NxBxKxbxC, v_NxBxKxbxC, out, log_total)


def _backward(saved: tuple[Any, ...], dout_NxKxRxWxC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    queries, k_NxBxKxbxC, v_NxBxKxbxC, out, log_total = saved
    dout = _query_blocks(dout_NxKxRxWxC, queries.q.shape[0])
    inner = jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True)
    queries = queries._replace(dout=dout, inner=inner, log_total=log_total)

    def rows(panel: _Queries, grads: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
        def add(carry: tuple[jax.Array, ...], index_BxN: jax.Array, live_BxN: jax.Array) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            k, v = _pick(k_NxBxKxbxC, index_BxN), _pick(v_NxBxKxbxC, index_BxN)
            weights = jnp.exp(_scores(panel, k, index_BxN, live_BxN) - panel.log_total)
            dscores = weights * (_products(panel.dout, v) - panel.inner)
            dk = _add_at(dk, index_BxN, _key_sums(dscores, panel.q))
            dv = _add_at(dv, index_BxN, _key_sums(weights, panel.dout))
            return dq + _weighted(dscores, k), dk, dv

        dq, *dkv = grads
        dq_panel, *dkv = _over_keys(add, (jnp.zeros(panel.q.shape, jnp.float32), *dkv), panel)
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_panel, first, 0), *dkv

    dq, dk, dv = _over_queries(rows, tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries.q, *saved[1:3])), queries)
    dk, dv = (x.transpose(0, 2, 1, 3, 4).reshape(*dk.shape[:1], dk.shape[2], -1, dk.shape[4]) for x in (dk, dv))
    return _in_rows(dq).astype(queries.q.dtype), dk.astype(k_NxBxKxbxC.dtype), dv.astype(v_NxBxKxbxC.dtype), None


_attend_blocks.defvjp(_saving, _backward)


def _over_queries(rows: Any, carry: Any, queries: _Queries) -> Any:
    """Fold `rows(some blocks of queries, carry, index of the first)` over all of them."""
    blocks, size = queries.q.shape[0], queries.q.shape[4]
    panel = max(1, PANEL[target_platform()] // size)
    panel = panel if blocks % panel == 0 else 1

    def step(i: jax.Array, carry: Any) -> Any:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * panel, panel, 0), queries)
        return rows(part, carry, i * panel)

    return jax.lax.fori_loop(0, blocks // panel, step, carry)


@jax.named_scope("packed_key_blocks")
def _over_keys(add: Any, carry: Any, panel: _Queries) -> Any:
    """Fold `add(carry, a block of keys for each block of queries, whether it sees it)`."""

    def step(j: jax.Array, carry: Any) -> Any:
        return add(carry, jax.lax.dynamic_index_in_dim(panel.blocks, j, 2, keepdims=False), j < panel.counts)

    return jax.lax.fori_loop(0, panel.counts.max(), step, carry)


def _scores(panel: _Queries, k: jax.Array, index_BxN: jax.Array, live_BxN: jax.Array) -> jax.Array:
    """Products [B, N, K, R, b, b] of queries and a block of keys each, `HIDDEN` where a query does not see a key."""
    keys = (index_BxN[..., None] * k.shape[3] + jnp.arange(k.shape[3]))[:, :, None, None]
    seen = ((panel.begin[..., None] <= keys) & (keys < panel.end[..., None])).any(axis=2) & live_BxN[..., None, None]
    return jnp.where(seen[:, :, None, None], _products(panel.q, k), HIDDEN)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqc,bnksc->bnkrqs", q, k, preferred_element_type=jnp.float32)


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqs,bnksc->bnkrqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _key_sums(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bnkrqs,bnkrqc->bnksc", weights.astype(x.dtype), x, preferred_element_type=jnp.float32)


def _pick(x_NxBxKxbxC: jax.Array, index_BxN: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, index: x[index], in_axes=(0, 1), out_axes=1)(x_NxBxKxbxC, index_BxN)


def _add_at(x_NxBxKxbxC: jax.Array, index_BxN: jax.Array, y: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, index, y: x.at[index].add(y), in_axes=(0, 1, 1))(x_NxBxKxbxC, index_BxN, y)


def _queries(q: jax.Array, seen: KeyRanges) -> _Queries:
    blocks = seen.counts_NxB.shape[1]
    begin, end = (x.reshape(*x.shape[:2], blocks, -1).transpose(2, 0, 1, 3) for x in (seen.begin_NxMxW, seen.end_NxMxW))
    return _Queries(
        _query_blocks(q, blocks), begin, end, seen.blocks_NxBxB.transpose(1, 0, 2), seen.counts_NxB.transpose(1, 0)
    )


def _query_blocks(q_NxKxRxWxC: jax.Array, blocks: int) -> jax.Array:
    n, k, r, _, c = q_NxKxRxWxC.shape
    return q_NxKxRxWxC.reshape(n, k, r, blocks, -1, c).transpose(3, 0, 1, 2, 4, 5)


def _key_blocks(k_NxKxWxC: jax.Array, seen: KeyRanges) -> jax.Array:
    n, k, _, c = k_NxKxWxC.shape
    return k_NxKxWxC.reshape(n, k, seen.counts_NxB.shape[1], -1, c).transpose(0, 2, 1, 3, 4)


def _in_rows(x: jax.Array) -> jax.Array:
    x = x.transpose(1, 2, 3, 0, 4, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[5])
