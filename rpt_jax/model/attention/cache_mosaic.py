"""Attention of a decode step over a KV cache on TPUs (Pallas, Mosaic).

The grid runs over groups of rows and steps. A step visits several blocks, each of any row of the group and for all kv heads: one
alone is too small for the overhead of a step. They are copied to the core's memory while those of the step before are computed.
Blocks without keys to attend to are not visited. The state of the online softmax stays in the core's memory until the last step
of a group.

Keys lie along axis 1 of the scores, along the lanes of a register, because a row has only a few queries. In packed_mosaic.py
they lie along axis 0.
"""

from __future__ import annotations

import functools
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
from rpt_jax.model.tpu import SUBLANES, fill_lanes

_KEYS_AXIS = 1
_FLOAT_BYTES = 4
# Blocks that a step copies: about as many bytes as take longer to read than a step's overhead, in a limited number of copies.
_STEP_BYTES = 2**20
_MAX_STEP_VISITS = 16


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
    row_GxV: Any,
    block_GxV: Any,
    length_Nx1xQ: Any,
    q_NxKxQxC: Any,
    *refs: Any,
    num_blocks: int,
    step_visits: int,
) -> None:
    blocks = refs[:step_visits]
    peak_NxKx1xQ, total_NxKx1xQ, out_NxKxQxC = refs[step_visits:][:3]
    state = _State(*refs[step_visits + 3 :])
    group = pl.program_id(0)
    step = pl.program_id(1)
    rows, kv_heads, num_queries, query_size = q_NxKxQxC.shape
    _, size, width = blocks[0].shape
    # Queries as long as a key and its value, with zeros for the value, save separating them.
    keys_end, values_begin = (width, 0) if query_size == width else (query_size, query_size)

    @pl.when(step == 0)
    def _() -> None:
        for ref, value in zip(state, (MASKED_SCORE, 0, 0), strict=True):
            ref[...] = jnp.full_like(ref, value)

    for index in range(step_visits):
        visit = step * step_visits + index

        @pl.when(visit < visits_G[group])
        def _(visit: jax.Array = visit, kv_KxBxD: Any = blocks[index]) -> None:
            row = row_GxV[group, visit] - group * rows
            entry = block_GxV[group, visit] * size + jax.lax.broadcasted_iota(jnp.int32, (num_queries, size), 1)
            length = _turn(length_Nx1xQ[row], axis=1)
            attended = attended_entries(begin_N[group * rows + row], length, entry, num_blocks * size)
            for head in range(kv_heads):
                k_BxC, v_BxC = kv_KxBxD[head, :, :keys_end], kv_KxBxD[head, :, values_begin:]
                scores = masked_scores(q_NxKxQxC[row, head], k_BxC, attended, _KEYS_AXIS)
                state.store(row, head, add_keys(state.load(row, head), scores, v_BxC, _KEYS_AXIS))

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        out_NxKxQxC[...] = state.out_NxKxQxC[...]

        @pl.loop(0, rows)
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
      q_NxKxQxC: scaled queries, for the first N rows of the cache.
      cache: joined keys and values of all layers.
      layer: index of the layer.
      ranges: which keys each query attends to.
      interpret: run the kernel in interpret mode, without a TPU.
    """
    assert cache.order == "joined"
    _, num_blocks, _, kv_heads, size, width = cache.k.shape
    rows, _, num_queries, head_size = q_NxKxQxC.shape
    sizes = CacheSizes(num_queries, size, kv_heads, head_size, cache.k.dtype.itemsize)
    padding = -num_queries % SUBLANES
    q = jnp.pad(q_NxKxQxC, ((0, 0), (0, 0), (0, padding), (0, sizes.query_size - head_size)))
    length_NxQ = jnp.pad(ranges.length_NxQ, ((0, 0), (0, padding)))
    padded = num_queries + padding

    groups, visits = ranges.block_GxV.shape
    group_rows = group_size(rows, groups)
    step_visits = max(1, min(_STEP_BYTES // sizes.block_bytes, _MAX_STEP_VISITS, visits))

    def block_spec(index: int) -> pl.BlockSpec:
        """Return the spec of the blocks of the `index`-th visits of all steps."""

        def block(
            group: Any, step: Any, layer: Any, _: Any, visits_G: Any, row_GxV: Any, block_GxV: Any
        ) -> tuple[Any, ...]:
            # After the last visit of a group the block stays the same, so that nothing is copied.
            last_visit = jnp.maximum(visits_G[group] - 1, 0)
            last_step = jax.lax.div(jnp.maximum(last_visit - index, 0), step_visits)
            visit = jnp.minimum(jnp.minimum(step, last_step) * step_visits + index, last_visit)
            return layer[0], block_GxV[group, visit], row_GxV[group, visit], 0, 0, 0

        return pl.BlockSpec((None, None, None, kv_heads, size, width), block)

    def of_group(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((group_rows, *dims), lambda group, *_: (group, *(0 for _ in dims)))

    blocks = [block_spec(index) for index in range(step_visits)]
    results = (1, padded), (1, padded), (padded, sizes.query_size)
    state = (padded, 1), (padded, 1), (padded, sizes.query_size)
    peak, total, out = pl.pallas_call(
        functools.partial(_kernel, num_blocks=num_blocks, step_visits=step_visits),
        out_shape=tuple(jax.ShapeDtypeStruct((rows, kv_heads, *dims), jnp.float32) for dims in results),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(groups, jnp.maximum(pl.cdiv(ranges.visits_G.max(), step_visits), 1)),
            in_specs=(of_group(1, padded), of_group(kv_heads, padded, sizes.query_size), *blocks),
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
        ranges.row_GxV,
        ranges.block_GxV,
        length_NxQ[:, None],
        q,
        *[cache.k] * step_visits,
    )
    columns = (peak.swapaxes(-1, -2), total.swapaxes(-1, -2), out[..., -head_size:])
    return PartialSoftmax(*(x[:, :, :num_queries] for x in columns))


def cached_attention_bytes(sizes: CacheSizes, *, rows: int, visits: float) -> float:
    """Return the bytes that the kernel reads and writes; the last axis of an array takes whole registers.

    Where a group has fewer visits than a step, it copies its last block several times, which is not counted.

    Args:
      sizes: of the device's part.
      rows: rows of the cache.
      visits: visits of all rows.
    """
    queries = sizes.num_queries + -sizes.num_queries % SUBLANES
    queries_in_lanes = fill_lanes(queries)
    numbers = queries * fill_lanes(sizes.query_size)
    row = sizes.kv_heads * (numbers * (sizes.itemsize + _FLOAT_BYTES) + 2 * queries_in_lanes * _FLOAT_BYTES)
    lengths = queries_in_lanes * _FLOAT_BYTES
    return visits * sizes.block_bytes + rows * (row + lengths)
