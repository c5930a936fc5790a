"""Attention of a decode step over the KV caches on TPUs (Pallas, Mosaic).

One kernel reads a cache that rollouts share, and one reads the rollouts' own tokens, adds the new token itself, and merges all
parts. Their grids run over groups of rows and steps. A step visits several blocks, each of any row of the group and for all kv
heads: one alone is too small for the overhead of a step. They are copied to the core's memory while those of the step before are
computed. Blocks without keys to attend to are not visited. The state of the online softmax stays in the core's memory until the
last step of a group.

Around the kernels, queries and partial results have an entry per slot. The kernel of a shared cache copies the queries of a row's
rollouts from their slots, and its results to them: in plain XLA, the gathers and changes of layout took more memory traffic than
the keys of a small policy.

Keys lie along axis 1 of the scores, along the lanes of a register, because a rollout has only a few queries. In packed_mosaic.py
they lie along axis 0. The queries of a slot and kv head are padded to T, as many as fill registers.
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
    CacheReads,
    CacheSizes,
    attended_entries,
    group_size,
    live_slots,
)
from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.packed_kernels import Softmax, add_keys, masked_scores, merge
from rpt_jax.model.tpu import fill_lanes, fill_sublanes

_KEYS_AXIS = 1
_FLOAT_BYTES = 4
# Blocks that a step copies: about as many bytes as take longer to read than a step's overhead, in a limited number of copies.
_STEP_BYTES = 2**20
_MAX_STEP_VISITS = 16
# Rows of the array of statistics: the peak and the total.
_STATISTICS = 2


class _Visits(NamedTuple):
    """The layer and the arrays of `CacheRanges`, which a kernel has before it starts, or refs of them.

    They have one axis: in the memory for scalars, rows of two axes would be filled up to 128 numbers.
    """

    layer: Any
    begin_N: Any
    visits_G: Any
    visit_GV: Any
    length_NW: Any

    @classmethod
    def of(cls, layer: jax.Array, ranges: CacheRanges) -> _Visits:
        """Return the arrays."""
        return cls(
            layer=layer,
            begin_N=ranges.begin_N,
            visits_G=ranges.visits_G,
            visit_GV=ranges.visit_GxV.reshape(-1),
            length_NW=ranges.length_NxW.reshape(-1),
        )

    def row_and_block(self, group: Any, visit: Any, num_blocks: int) -> tuple[jax.Array, jax.Array]:
        """Return the row and the block of a visit of a group."""
        most_visits = self.visit_GV.shape[0] // self.visits_G.shape[0]
        index = self.visit_GV[group * most_visits + visit]
        return jax.lax.div(index, num_blocks), jax.lax.rem(index, num_blocks)


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


class _Partial(NamedTuple):
    """What a shared cache adds to the softmax of each slot; not set for idle slots.

    Attributes:
      out_MxKxTxC: float32, sum of exp(score - peak) · value.
      statistics_MxKx2xT: float32, the largest score, and the sum of exp(score - peak).
    """

    out_MxKxTxC: Any
    statistics_MxKx2xT: Any


def attend_token_mosaic(
    q_MxKxRxC: jax.Array,
    k_MxKxC: jax.Array,
    v_MxKxC: jax.Array,
    shared: tuple[CacheReads, ...],
    own: CacheReads,
    layer: jax.Array | int,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Compute on a TPU what `attend_token` does; the caches are joined.

    Args:
      q_MxKxRxC, k_MxKxC, v_MxKxC, shared, own, layer: as there.
      interpret: run the kernels in interpret mode, without a TPU.
    """
    slots, kv_heads, heads_per_kv, head_size = q_MxKxRxC.shape
    sizes = CacheSizes(heads_per_kv, own.blocks.block_size, kv_heads, head_size, own.blocks.k.dtype.itemsize)
    padding = (fill_sublanes(heads_per_kv) - heads_per_kv, sizes.query_size - head_size)
    q = jnp.pad(q_MxKxRxC, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])))
    layer = jnp.asarray(layer, jnp.int32)[None]
    partials = []
    for reads in shared:
        with jax.named_scope("shared_cache_blocks"):
            partials.append(_attend_shared(q, reads.blocks, reads.ranges, reads.slot_NW, layer, interpret))
    with jax.named_scope("own_cache_blocks"):
        kv_MxKx1xD = jnp.concatenate([k_MxKxC, v_MxKxC], axis=-1)[:, :, None]
        # Only live slots have results of the shared caches.
        is_live_M = live_slots(shared, slots)
        out = _attend_own(q, kv_MxKx1xD, partials, own.blocks, own.ranges, is_live_M, layer, interpret)
    return out[:, :, :heads_per_kv, -head_size:]


# --- the kernels ---


def _shared_kernel(*refs: Any, num_blocks: int, step_visits: int, width: int) -> None:
    """Add the keys of a shared cache's rows for all of their rollouts."""
    visits = _Visits(*refs[:5])
    slot_NW, q_MxKxTxC = refs[5:7]
    blocks = refs[7 : 7 + step_visits]
    partial = _Partial(*refs[7 + step_visits :][:2])
    q_NxKxQxC, length_NxQx1, *state, tiles_NxWxKxTxC, statistics_NxWxKx2xT, done = refs[9 + step_visits :]
    state = _State(*state)
    rows, kv_heads, _, _ = q_NxKxQxC.shape
    num_queries = q_MxKxTxC.shape[2]
    first = pl.program_id(0) * rows
    last_entry = slot_NW.shape[0] - 1

    def for_rollouts(act: Any) -> None:
        """Call act(row, w, entry, slot) for the rollouts of the group's rows, for which there are slots."""

        @pl.loop(0, rows)
        def _(row: jax.Array) -> None:
            @pl.loop(0, width)
            def _(w: jax.Array) -> None:
                entry = (first + row) * width + w
                slot = slot_NW[jnp.minimum(entry, last_entry)]

                @pl.when((entry <= last_entry) & (slot >= 0))
                def _() -> None:
                    act(row, w, entry, slot)

    def queries(w: jax.Array) -> Any:
        return pl.ds(pl.multiple_of(w * num_queries, num_queries), num_queries)

    def copy_in(row: Any, w: Any, entry: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(q_MxKxTxC.at[slot], tiles_NxWxKxTxC.at[row, w], done)

    def copies_out(row: Any, w: Any, slot: Any) -> Any:
        return (
            pltpu.make_async_copy(state.out_NxKxQxC.at[row, :, queries(w)], partial.out_MxKxTxC.at[slot], done),
            pltpu.make_async_copy(statistics_NxWxKx2xT.at[row, w], partial.statistics_MxKx2xT.at[slot], done),
        )

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for_rollouts(lambda *rollout: copy_in(*rollout).start())
        for ref, value in zip((*state, length_NxQx1), (MASKED_SCORE, 0, 0, 0), strict=True):
            ref[...] = jnp.full_like(ref, value)
        # All copies have one semaphore, and any of them may be done first.
        for_rollouts(lambda *rollout: copy_in(*rollout).wait())

        @for_rollouts
        def _(row: Any, w: Any, entry: Any, slot: Any) -> None:
            length_NxQx1[row, queries(w)] = jnp.full((num_queries, 1), visits.length_NW[entry], jnp.int32)
            for head in range(kv_heads):
                q_NxKxQxC[row, head, queries(w)] = tiles_NxWxKxTxC[row, w, head].astype(jnp.float32)

    _add_blocks(visits, q_NxKxQxC, length_NxQx1, blocks, state, num_blocks)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        @for_rollouts
        def _(row: Any, w: Any, entry: Any, slot: Any) -> None:
            for head in range(kv_heads):
                for index, ref in enumerate((state.peak_NxKxQx1, state.total_NxKxQx1)):
                    statistics_NxWxKx2xT[row, w, head, index : index + 1] = _turn(ref[row, head, queries(w)], axis=0)
            for copy in copies_out(row, w, slot):
                copy.start()

        @for_rollouts
        def _(row: Any, w: Any, entry: Any, slot: Any) -> None:
            for copy in copies_out(row, w, slot):
                copy.wait()


def _own_kernel(*refs: Any, num_blocks: int, step_visits: int, shared_caches: int) -> None:
    """Attend to the new token, add what the shared caches have, and the rollouts' own tokens."""
    visits = _Visits(*refs[:5])
    is_live_M, q_MxKxTxC, kv_MxKx1xD = refs[5:8]
    partials = [_Partial(*refs[8 + 2 * index :][:2]) for index in range(shared_caches)]
    blocks = refs[8 + 2 * shared_caches :][:step_visits]
    result_MxKxTxC, length_MxTx1, *state = refs[8 + 2 * shared_caches + step_visits :]
    state = _State(*state)
    rows, kv_heads, num_queries, query_size = q_MxKxTxC.shape
    first = pl.program_id(0) * rows

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        @pl.loop(0, rows)
        def _(row: jax.Array) -> None:
            slot = jnp.minimum(first + row, is_live_M.shape[0] - 1)
            length_MxTx1[row] = jnp.full((num_queries, 1), visits.length_NW[slot], jnp.int32)
            for head in range(kv_heads):
                k_1xC, v_1xC = _split(kv_MxKx1xD[row, head].astype(jnp.float32), query_size)
                score = (q_MxKxTxC[row, head].astype(jnp.float32) * k_1xC).sum(axis=1, keepdims=True)
                value = jnp.broadcast_to(v_1xC, (num_queries, query_size))
                softmax = Softmax(peak=score, total=jnp.ones_like(score), out=value)
                for partial in partials:
                    softmax = merge(softmax, _load(partial, row, head, is_live_M[slot] > 0))
                state.store(row, head, softmax)

    _add_blocks(visits, q_MxKxTxC, length_MxTx1, blocks, state, num_blocks)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        result_MxKxTxC[...] = (state.out_NxKxQxC[...] / state.total_NxKxQx1[...]).astype(result_MxKxTxC.dtype)


def _add_blocks(
    visits: _Visits, q_NxKxQxC: Any, length_NxQx1: Any, blocks: Any, state: _State, num_blocks: int
) -> None:
    """Add the blocks of a step to the online softmax."""
    rows, kv_heads, num_queries, query_size = q_NxKxQxC.shape
    _, size, _ = blocks[0].shape
    group, step = pl.program_id(0), pl.program_id(1)
    for index, kv_KxBxD in enumerate(blocks):
        visit = step * len(blocks) + index

        @pl.when(visit < visits.visits_G[group])
        def _(visit: jax.Array = visit, kv_KxBxD: Any = kv_KxBxD) -> None:
            cache_row, block = visits.row_and_block(group, visit, num_blocks)
            row = cache_row - group * rows
            entry = block * size + jax.lax.broadcasted_iota(jnp.int32, (num_queries, size), 1)
            attended = attended_entries(visits.begin_N[cache_row], length_NxQx1[row], entry, num_blocks * size)
            for head in range(kv_heads):
                k_BxC, v_BxC = _split(kv_KxBxD[head], query_size)
                q_QxC = q_NxKxQxC[row, head].astype(k_BxC.dtype)
                scores = masked_scores(q_QxC, k_BxC, attended, _KEYS_AXIS)
                state.store(row, head, add_keys(state.load(row, head), scores, v_BxC, _KEYS_AXIS))


def _split(kv_BxD: jax.Array, query_size: int) -> tuple[jax.Array, jax.Array]:
    """Return keys and values. Queries as long as both, with zeros for the value, save separating them."""
    if query_size == kv_BxD.shape[1]:
        return kv_BxD, kv_BxD
    return kv_BxD[:, :query_size], kv_BxD[:, query_size:]


def _load(partial: _Partial, row: Any, head: int, is_set: jax.Array) -> Softmax:
    """Return what a shared cache has for a slot: nothing if it is not set."""
    peak, total = (
        _turn(partial.statistics_MxKx2xT[row, head, index : index + 1], axis=1) for index in range(_STATISTICS)
    )
    values = (peak, MASKED_SCORE), (total, 0.0), (partial.out_MxKxTxC[row, head], 0.0)
    return Softmax(*(jnp.where(is_set, value, empty) for value, empty in values))


def _turn(vector: jax.Array, axis: int) -> jax.Array:
    """Turn a row [1, T] into a column (`axis` 1) or a column [T, 1] into a row (0).

    In memory, a column takes a register for every eight numbers, a row for every 128.
    """
    queries = vector.size
    index, other = (jax.lax.broadcasted_iota(jnp.int32, (queries, queries), side) for side in (0, 1))
    return jnp.where(index == other, vector, 0).sum(axis, keepdims=True)


# --- their calls ---


class _Grid(NamedTuple):
    """Grid of a kernel, and the specs of the blocks that a step visits."""

    groups: int
    group_rows: int
    steps: jax.Array
    blocks: list[pl.BlockSpec]

    def of_group(self, *dims: int) -> pl.BlockSpec:
        """Return the spec of a group's rows of an array."""
        return pl.BlockSpec((self.group_rows, *dims), lambda group, *_: (group, *(0 for _ in dims)))

    def spec(self, in_specs: Any, out_specs: Any, scratch_shapes: Any) -> pltpu.PrefetchScalarGridSpec:
        """Return the spec of the whole call."""
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(_Visits._fields) + 1,  # The last one is about the slots.
            grid=(self.groups, self.steps),
            in_specs=(*in_specs, *self.blocks),
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        )


def _grid(cache: BlockedCache, ranges: CacheRanges, parts: int = 1) -> _Grid:
    """Return the grid of a kernel over a cache.

    Args:
      cache, ranges: as in `CacheReads`.
      parts: rows of the ranges for each row of the cache.
    """
    assert cache.order == "joined"
    _, num_blocks, _, kv_heads, size, width = cache.k.shape
    groups, most_visits = ranges.visit_GxV.shape
    block_bytes = kv_heads * size * fill_lanes(width) * cache.k.dtype.itemsize
    step_visits = max(1, min(_STEP_BYTES // block_bytes, _MAX_STEP_VISITS, most_visits))

    def block_spec(index: int) -> pl.BlockSpec:
        """Return the spec of the blocks of the `index`-th visits of all steps."""

        def block(group: Any, step: Any, *refs: Any) -> tuple[Any, ...]:
            # After the last visit of a group the block stays the same, so that nothing is copied.
            visits = _Visits(*refs[:5])
            last_visit = jnp.maximum(visits.visits_G[group] - 1, 0)
            last_step = jax.lax.div(jnp.maximum(last_visit - index, 0), step_visits)
            visit = jnp.minimum(jnp.minimum(step, last_step) * step_visits + index, last_visit)
            row, block = visits.row_and_block(group, visit, num_blocks)
            return visits.layer[0], block, jax.lax.div(row, parts), 0, 0, 0

        return pl.BlockSpec((None, None, None, kv_heads, size, width), block)

    return _Grid(
        groups=groups,
        group_rows=group_size(len(ranges.begin_N), groups),
        steps=jnp.maximum(pl.cdiv(ranges.visits_G.max(), step_visits), 1),
        blocks=[block_spec(index) for index in range(step_visits)],
    )


def _state_shapes(rows: int, kv_heads: int, num_queries: int, query_size: int) -> list[Any]:
    """Return the shapes of the lengths of the queries, and of the online softmax."""
    sides = (1, 1, query_size)
    return [
        pltpu.VMEM((rows, num_queries, 1), jnp.int32),
        *(pltpu.VMEM((rows, kv_heads, num_queries, side), jnp.float32) for side in sides),
    ]


_COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def _attend_shared(
    q_MxKxTxC: jax.Array,
    cache: BlockedCache,
    ranges: CacheRanges,
    slot_NW: jax.Array,
    layer: jax.Array,
    interpret: bool | pltpu.InterpretParams,
) -> _Partial:
    """Return what a shared cache adds for each slot.

    Args:
      q_MxKxTxC: padded queries.
      cache, ranges, layer: as in `attend_token_mosaic`.
      slot_NW: int32 slot of each of the rollouts that share the rows; -1 for those without one.
      interpret: run the kernel in interpret mode.
    """
    slots, kv_heads, num_queries, query_size = q_MxKxTxC.shape
    parts, more_rows = divmod(len(ranges.begin_N), cache.k.shape[2])
    assert not more_rows
    grid = _grid(cache, ranges, parts)
    rows = grid.group_rows
    width = ranges.length_NxW.shape[1]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return _Partial(
        *pl.pallas_call(
            functools.partial(_shared_kernel, num_blocks=cache.num_blocks, step_visits=len(grid.blocks), width=width),
            out_shape=(
                jax.ShapeDtypeStruct(q_MxKxTxC.shape, jnp.float32),
                jax.ShapeDtypeStruct((slots, kv_heads, _STATISTICS, num_queries), jnp.float32),
            ),
            grid_spec=grid.spec(
                in_specs=(anywhere,),
                out_specs=(anywhere, anywhere),
                scratch_shapes=[
                    pltpu.VMEM((rows, kv_heads, width * num_queries, query_size), jnp.float32),
                    *_state_shapes(rows, kv_heads, width * num_queries, query_size),
                    pltpu.VMEM((rows, width, *q_MxKxTxC.shape[1:]), q_MxKxTxC.dtype),
                    pltpu.VMEM((rows, width, kv_heads, _STATISTICS, num_queries), jnp.float32),
                    pltpu.SemaphoreType.DMA,
                ],
            ),
            compiler_params=_COMPILER_PARAMS,
            name="attend_shared_cache",
            interpret=interpret,
        )(*_Visits.of(layer, ranges), slot_NW, q_MxKxTxC, *[cache.k] * len(grid.blocks))
    )


def _attend_own(
    q_MxKxTxC: jax.Array,
    kv_MxKx1xD: jax.Array,
    partials: list[_Partial],
    cache: BlockedCache,
    ranges: CacheRanges,
    is_live_M: jax.Array,
    layer: jax.Array,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Return attention of the padded queries over all parts, [M, K, T, C] in their dtype.

    Args:
      q_MxKxTxC: padded queries.
      kv_MxKx1xD: joined key and value of the new token.
      partials: what the shared caches add.
      cache, ranges, layer: as in `attend_token_mosaic`.
      is_live_M: int32, 0 for slots without results of the shared caches.
      interpret: run the kernel in interpret mode.
    """
    grid = _grid(cache, ranges)
    arrays = [q_MxKxTxC, kv_MxKx1xD, *(x for partial in partials for x in partial)]
    return pl.pallas_call(
        functools.partial(
            _own_kernel, num_blocks=cache.num_blocks, step_visits=len(grid.blocks), shared_caches=len(partials)
        ),
        out_shape=jax.ShapeDtypeStruct(q_MxKxTxC.shape, q_MxKxTxC.dtype),
        grid_spec=grid.spec(
            in_specs=[grid.of_group(*x.shape[1:]) for x in arrays],
            out_specs=grid.of_group(*q_MxKxTxC.shape[1:]),
            scratch_shapes=_state_shapes(grid.group_rows, *q_MxKxTxC.shape[1:]),
        ),
        compiler_params=_COMPILER_PARAMS,
        name="attend_own_cache",
        interpret=interpret,
    )(*_Visits.of(layer, ranges), is_live_M, *arrays, *[cache.k] * len(grid.blocks))


# --- what they read and write; the last axis of an array takes whole registers ---


def shared_cache_bytes(sizes: CacheSizes, *, rollouts: float, visits: float) -> float:
    """Return the bytes that the kernel of a shared cache reads and writes.

    Where a group has fewer visits than a step, it copies its last block several times, which is not counted.

    Args:
      sizes: of the device's part, with the queries of one rollout.
      rollouts: live rollouts.
      visits: visits of all rows.
    """
    return visits * sizes.block_bytes + rollouts * (_query_bytes(sizes) + _partial_bytes(sizes))


def own_cache_bytes(sizes: CacheSizes, *, slots: int, visits: float, shared_caches: int) -> float:
    """Return the bytes that the kernel of the rollouts' own tokens reads and writes.

    Args:
      sizes: of the device's part, with the queries of one rollout.
      slots: number of slots.
      visits: visits of all slots.
      shared_caches: number of caches that rollouts share.
    """
    new = sizes.kv_heads * fill_lanes(2 * sizes.head_size) * _FLOAT_BYTES  # In bfloat16, it takes two rows.
    slot = 2 * _query_bytes(sizes) + new + shared_caches * _partial_bytes(sizes)
    return visits * sizes.block_bytes + slots * slot


def _query_bytes(sizes: CacheSizes) -> int:
    """Return the bytes of a slot's padded queries, or of their result."""
    return sizes.kv_heads * fill_sublanes(sizes.num_queries) * fill_lanes(sizes.query_size) * sizes.itemsize


def _partial_bytes(sizes: CacheSizes) -> int:
    """Return the bytes of a slot's `_Partial`."""
    queries = fill_sublanes(sizes.num_queries)
    numbers = queries * fill_lanes(sizes.query_size) + _STATISTICS * fill_lanes(queries)
    return sizes.kv_heads * numbers * _FLOAT_BYTES
