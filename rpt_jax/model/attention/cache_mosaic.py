"""Attention of a decode step over a KV cache on TPUs (Pallas, Mosaic).

The grid runs over groups of rows and visits of a block. A visit copies that block of all rows of a group and of all kv heads,
while the visit before is computed; blocks in which no row of the group has keys to attend to are not copied. The state of the
online softmax stays in the core's memory until the last visit of a group.

Keys lie along axis 1 of the scores, along the lanes of a register, because a row has only a few queries. In packed_mosaic.py
they lie along axis 0.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpt_jax.model.attention.blocked_cache import (
    BlockedCache,
    CacheRanges,
    CacheSizes,
    PartialSoftmax,
    attended_entries,
    group_size,
)
from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.packed_kernels import Softmax, add_keys, masked_scores
from rpt_jax.model.tpu import fill_lanes

_KEYS_AXIS = 1
# Queries are padded to whole registers.
_QUERY_MULTIPLE = 8
_FLOAT_BYTES = 4


class _State(NamedTuple):
    """Refs of the online softmax of a group of rows."""

    peak_NxKxQx1: Any
    total_NxKxQx1: Any
    out_NxKxQxC: Any

    def load(self, row: Any, head: int) -> Softmax:
        """Return the state of the queries of a row and a kv head."""
        return Softmax(*(ref[row, head] for ref in self))

    def store(self, row: Any, head: int, softmax: Softmax) -> None:
        """Set the state of the queries of a row and a kv head."""
        for ref, value in zip(self, softmax, strict=True):
            ref[row, head] = value


def _kernel(
    layer: Any,
    begin_N: Any,
    visits_G: Any,
    blocks_GxJ: Any,
    copied_G: Any,
    length_Nx1xQ: Any,
    q_NxKxQxC: Any,
    k_NxKxBxC: Any,
    v_NxKxBxC: Any,
    peak_NxKx1xQ: Any,
    total_NxKx1xQ: Any,
    out_NxKxQxC: Any,
    *state_refs: Any,
    num_blocks: int,
    num_rows: int,
) -> None:
    group = pl.program_id(0)
    visit = pl.program_id(1)
    rows, kv_heads, num_queries, head_size = q_NxKxQxC.shape
    size = k_NxKxBxC.shape[2]
    state = _State(*state_refs)
    # The last group may have fewer rows.
    rows_left = jnp.minimum(rows, num_rows - group * rows)

    @pl.when(visit == 0)
    def _() -> None:
        for ref, value in zip(state, (MASKED_SCORE, 0, 0), strict=True):
            ref[...] = jnp.full_like(ref, value)

    @pl.when(visit < visits_G[group])
    def _() -> None:
        entry = blocks_GxJ[group, visit] * size + jax.lax.broadcasted_iota(jnp.int32, (num_queries, size), 1)

        @pl.loop(0, rows_left)
        def _(row: jax.Array) -> None:
            begin = begin_N[group * rows + row]
            length = _turn(length_Nx1xQ[row], axis=1)
            attended = attended_entries(begin, length, entry, num_blocks * size)
            for head in range(kv_heads):
                scores = masked_scores(q_NxKxQxC[row, head], k_NxKxBxC[row, head], attended, _KEYS_AXIS)
                state.store(row, head, add_keys(state.load(row, head), scores, v_NxKxBxC[row, head], _KEYS_AXIS))

    @pl.when(visit == pl.num_programs(1) - 1)
    def _() -> None:
        out_NxKxQxC[...] = state.out_NxKxQxC[...]

        @pl.loop(0, rows_left)
        def _(row: jax.Array) -> None:
            for head in range(kv_heads):
                peak_NxKx1xQ[row, head] = _turn(state.peak_NxKxQx1[row, head], axis=0)
                total_NxKx1xQ[row, head] = _turn(state.total_NxKxQx1[row, head], axis=0)


def _turn(vector: jax.Array, axis: int) -> jax.Array:
    """Turn a row [1, Q] into a column (`axis` 1) or a column [Q, 1] into a row (0).

    In memory, a column takes a register for every eight numbers, a row for every 128.
    """
    queries = vector.size
    index, other = (jax.lax.broadcasted_iota(jnp.int32, (queries, queries), side) for side in (0, 1))
    return jnp.where(index == other, vector, 0).sum(axis, keepdims=True)


def attend_cache_mosaic(
    q_NxKxQxC: jax.Array,
    cache: BlockedCache,
    layer: jax.Array | int,
    ranges: CacheRanges,
    interpret: bool = False,
) -> PartialSoftmax:
    """Attend over the rows of a KV cache on a TPU.

    Args:
      q_NxKxQxC: scaled queries.
      cache: keys and values of all layers; keys are not transposed.
      layer: index of the layer.
      ranges: which keys each query attends to.
      interpret: run the kernel in interpret mode, without a TPU.
    """
    assert not cache.transposed_keys
    _, num_blocks, rows, kv_heads, size, head_size = cache.k.shape
    num_queries = q_NxKxQxC.shape[2]
    padding = -num_queries % _QUERY_MULTIPLE
    q = jnp.pad(q_NxKxQxC, ((0, 0), (0, 0), (0, padding), (0, 0)))
    length_NxQ = jnp.pad(ranges.length_NxQ, ((0, 0), (0, padding)))

    groups = len(ranges.visits_G)
    group_rows = group_size(rows, groups)
    padded = num_queries + padding

    def key_block(
        group: Any, visit: Any, layer: Any, _: Any, visits_G: Any, blocks_GxJ: Any, copied_G: Any
    ) -> tuple[Any, ...]:
        copied = copied_G[group]
        last = jnp.maximum(visits_G[copied] - 1, 0)
        # Nothing is copied where the index stays the same: after the last visit of a group, and in groups without visits.
        idle = jnp.where(copied < group, last, 0)
        index = jnp.where(copied == group, jnp.minimum(visit, last), idle)
        return layer[0], blocks_GxJ[copied, index], copied, 0, 0, 0

    def of_group(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((group_rows, *dims), lambda group, *_: (group, *(0 for _ in dims)))

    keys = pl.BlockSpec((None, None, group_rows, kv_heads, size, head_size), key_block)
    results = (1, padded), (1, padded), (padded, head_size)
    state = (padded, 1), (padded, 1), (padded, head_size)
    peak, total, out = pl.pallas_call(
        functools.partial(_kernel, num_blocks=num_blocks, num_rows=rows),
        out_shape=tuple(jax.ShapeDtypeStruct((rows, kv_heads, *dims), jnp.float32) for dims in results),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(groups, jnp.maximum(ranges.visits_G.max(), 1)),
            in_specs=(of_group(1, padded), of_group(kv_heads, padded, head_size), keys, keys),
            out_specs=tuple(of_group(kv_heads, *dims) for dims in results),
            scratch_shapes=[pltpu.VMEM((group_rows, kv_heads, *dims), jnp.float32) for dims in state],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="cached_attention",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32)[None],
        ranges.begin_N,
        ranges.visits_G,
        ranges.blocks_GxJ,
        ranges.copied_G,
        length_NxQ[:, None],
        q,
        cache.k,
        cache.v,
    )
    columns = (peak.swapaxes(-1, -2), total.swapaxes(-1, -2), out)
    return PartialSoftmax(*(x[:, :, :num_queries] for x in columns))


def cached_attention_bytes(
    sizes: CacheSizes, *, rows: int, active_rows: float, max_group_rows: int, blocks_per_row: float
) -> float:
    """Return the bytes that the kernel reads and writes; the last axis of an array takes whole registers.

    Args:
      sizes: of the device's part.
      rows: rows of the cache.
      active_rows: rows with keys to attend to, which are adjacent.
      max_group_rows: as in `make_cache_ranges`.
      blocks_per_row: blocks that are read of an active row, on average.
    """
    group_rows = group_size(rows, -(-rows // max_group_rows))
    blocks = min(rows, math.ceil(active_rows / group_rows) * group_rows) * blocks_per_row

    queries = sizes.num_queries + -sizes.num_queries % _QUERY_MULTIPLE
    queries_in_lanes = fill_lanes(queries)
    head_in_lanes = fill_lanes(sizes.head_size)
    operands = head_in_lanes * (2 * blocks * sizes.block + rows * queries)
    results = rows * (queries * head_in_lanes + 2 * queries_in_lanes)
    lengths = rows * queries_in_lanes
    return sizes.kv_heads * (operands * sizes.itemsize + results * _FLOAT_BYTES) + lengths * _FLOAT_BYTES
