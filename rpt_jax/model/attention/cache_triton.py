"""Attention of a decode step over a KV cache on GPUs (Pallas, Triton).

A program computes a tile of a row's queries of one kv head, and loops over the blocks in which the row has keys to attend to. All
rollouts that share a row are queries of the same tile, so that its keys are read once for all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rpt_jax.model.attention.blocked_cache import (
    BlockedCache,
    CacheRanges,
    PartialSoftmax,
    attended_entries,
    query_lengths,
)
from rpt_jax.model.attention.packed_kernels import Softmax, add_keys, masked_scores, start_softmax
from rpt_jax.model.gpu import fill_side

# Queries per tile. More of them would share a read of the keys, but not fit in registers.
_LARGEST_TILE = 64


def _kernel(
    layer: Any,
    begin: Any,
    visits: Any,
    blocks_J: Any,
    length_q: Any,
    q_qxC: Any,
    k_LxJxBxC: Any,
    v_LxJxBxC: Any,
    peak_q: Any,
    total_q: Any,
    out_qxC: Any,
) -> None:
    _, num_blocks, size, head_size = k_LxJxBxC.shape
    queries = q_qxC[...]
    length_qx1 = length_q[...][:, None]

    def fold(visit: jax.Array, softmax: Softmax) -> Softmax:
        block = blocks_J[visit]
        entry_1xB = block * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        attended = attended_entries(begin[0], length_qx1, entry_1xB, num_blocks * size)
        scores = masked_scores(queries, k_LxJxBxC[layer[0], block], attended, keys_axis=1)
        return add_keys(softmax, scores, v_LxJxBxC[layer[0], block], keys_axis=1)

    softmax = jax.lax.fori_loop(0, visits[0], fold, start_softmax(queries.shape[0], head_size, keys_axis=1))
    peak_q[...] = softmax.peak.reshape(-1)
    total_q[...] = softmax.total.reshape(-1)
    out_qxC[...] = softmax.out


def attend_cache_triton(
    q_NxKxQxC: jax.Array,
    cache: BlockedCache,
    layer: jax.Array | int,
    ranges: CacheRanges,
    interpret: bool = False,
) -> PartialSoftmax:
    """Attend over the rows of a KV cache on a GPU.

    Args:
      q_NxKxQxC: scaled queries, for the first N rows of the cache.
      cache: keys and values of all layers, in separate arrays.
      layer: index of the layer.
      ranges: which keys each query attends to, with one row per group.
      interpret: run the kernel in interpret mode, without a GPU.
    """
    assert cache.order == "separate"
    layers, num_blocks, _, kv_heads, size, head_size = cache.k.shape
    rows, _, num_queries, _ = q_NxKxQxC.shape
    tile = min(_LARGEST_TILE, fill_side(num_queries))
    padding = -num_queries % tile
    q = jnp.pad(q_NxKxQxC, ((0, 0), (0, 0), (0, padding), (0, 0)))

    of_row = pl.BlockSpec((1,), lambda tile, head, row: (row,))
    keys = pl.BlockSpec(
        (layers, num_blocks, None, None, size, head_size), lambda tile, head, row: (0, 0, row, head, 0, 0)
    )
    statistics = pl.BlockSpec((None, None, tile), lambda tile, head, row: (row, head, tile))
    queries = pl.BlockSpec((None, None, tile, head_size), lambda tile, head, row: (row, head, tile, 0))
    peak, total, out = pl.pallas_call(
        _kernel,
        grid=(q.shape[2] // tile, kv_heads, rows),
        in_specs=(
            pl.BlockSpec((1,), lambda tile, head, row: (0,)),
            of_row,
            of_row,
            pl.BlockSpec((None, num_blocks), lambda tile, head, row: (row, 0)),
            pl.BlockSpec((None, tile), lambda tile, head, row: (row, tile)),
            queries,
            keys,
            keys,
        ),
        out_specs=(statistics, statistics, queries),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="cached_attention",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32)[None],
        ranges.begin_N,
        ranges.visits_G,
        ranges.block_GxV,
        jnp.pad(query_lengths(ranges, num_queries), ((0, 0), (0, padding))),
        q,
        cache.k,
        cache.v,
    )
    return PartialSoftmax(
        peak=peak[:, :, :num_queries, None],
        total=total[:, :, :num_queries, None],
        out=out[:, :, :num_queries],
    )
