"""Attention of a decode step over the KV caches on GPUs (Pallas, Triton).

One kernel reads a cache that rollouts share, and one reads the rollouts' own tokens, adds the new token itself, and merges all
parts. A program computes a tile of a row's queries of one kv head, and loops over the blocks in which the row has keys to attend
to. All rollouts that share a row are queries of the same tiles, so that its keys are read once for all of them. Around the
kernels, queries and partial results have an entry per slot: gathers in plain XLA would be kernels of their own in every layer.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rpt_jax.model.attention.blocked_cache import BlockedCache, CacheReads, attended_entries, live_slots
from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.packed_kernels import Softmax, add_keys, masked_scores, merge, start_softmax
from rpt_jax.model.gpu import fill_side

# Queries per tile. More of them would share a read of the keys, but not fit in registers.
_LARGEST_TILE = 64


class _Keys(NamedTuple):
    """Refs of the keys of a row and a kv head, and of which of them are visited; or the specs or the arrays of these refs."""

    layer: Any
    begin: Any
    visits: Any
    visit_J: Any
    k_LxJxBxC: Any
    v_LxJxBxC: Any

    def add_to(self, softmax: Softmax, q_qxC: jax.Array, length_qx1: jax.Array) -> Softmax:
        """Add the keys that queries attend to."""
        _, num_blocks, size, _ = self.k_LxJxBxC.shape

        def fold(visit: jax.Array, softmax: Softmax) -> Softmax:
            block = jax.lax.rem(self.visit_J[visit], num_blocks)
            entry_1xB = block * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            attended = attended_entries(self.begin[0], length_qx1, entry_1xB, num_blocks * size)
            scores = masked_scores(q_qxC, self.k_LxJxBxC[self.layer[0], block], attended, keys_axis=1)
            return add_keys(softmax, scores, self.v_LxJxBxC[self.layer[0], block], keys_axis=1)

        return jax.lax.fori_loop(0, self.visits[0], fold, softmax)


class _Slots(NamedTuple):
    """Which entries of arrays [M, K, R, …] the queries of a tile are; those that are masked have none.

    Attributes:
      slot_qx1, head, index_qx1: indices on the first three axes.
      mask_qx1: bool.
    """

    slot_qx1: jax.Array
    head: Any
    index_qx1: jax.Array
    mask_qx1: jax.Array

    def load(self, ref: Any, other: float) -> jax.Array:
        """Return the entries of an array [M, K, R] or [M, K, R, C], [q, 1] or [q, C]."""
        at, mask = self._at(ref)
        return plgpu.load(at, mask=mask, other=other)

    def store(self, ref: Any, value: jax.Array) -> None:
        """Set the entries of such an array."""
        at, mask = self._at(ref)
        plgpu.store(at, value.astype(ref.dtype), mask=mask)

    def load_softmax(self, refs: tuple[Any, ...]) -> Softmax:
        """Return the state of the queries; that without keys for masked ones."""
        return Softmax(*(self.load(ref, other) for ref, other in zip(refs, (MASKED_SCORE, 0.0, 0.0), strict=True)))

    def _at(self, ref: Any) -> tuple[Any, jax.Array]:
        indices = self.slot_qx1, self.head, self.index_qx1
        if len(ref.shape) == 3:
            return ref.at[indices], self.mask_qx1
        size = ref.shape[3]
        column_1xC = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        return ref.at[(*indices, column_1xC)], jnp.broadcast_to(self.mask_qx1, (len(self.mask_qx1), size))


def _shared_kernel(*refs: Any, width: int) -> None:
    """Attend over a row of a shared cache, for a tile of the queries of its rollouts."""
    keys = _Keys(*refs[:6])
    length_NW, slot_NW, q_MxKxRxC, *softmax = refs[6:]
    slots, _, heads_per_kv, head_size = q_MxKxRxC.shape
    tile = _tile(width * heads_per_kv)
    query_qx1 = pl.program_id(0) * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    rollout_qx1, index_qx1 = jax.lax.div(query_qx1, heads_per_kv), jax.lax.rem(query_qx1, heads_per_kv)
    entry_qx1 = pl.program_id(2) * width + rollout_qx1
    in_row_qx1 = rollout_qx1 < width
    slot_qx1 = plgpu.load(slot_NW.at[entry_qx1], mask=in_row_qx1, other=-1)
    length_qx1 = plgpu.load(length_NW.at[entry_qx1], mask=in_row_qx1, other=0)
    mask_qx1 = slot_qx1 >= 0
    entries = _Slots(jnp.where(mask_qx1, slot_qx1, slots), pl.program_id(1), index_qx1, mask_qx1)

    start = start_softmax(tile, head_size, keys_axis=1)
    result = keys.add_to(start, entries.load(q_MxKxRxC, 0.0), length_qx1)
    for ref, value in zip(softmax, result, strict=True):
        entries.store(ref, value)


def _own_kernel(*refs: Any, shared_caches: int) -> None:
    """Attend to the new token of a slot, add what the shared caches have, and the rollout's own tokens."""
    keys = _Keys(*refs[:6])
    length, is_live, q_MxKxRxC, new_k_C, new_v_C = refs[6:11]
    partials = [refs[11 + 3 * index :][:3] for index in range(shared_caches)]
    out_MxKxRxC = refs[11 + 3 * shared_caches]
    heads_per_kv = q_MxKxRxC.shape[2]
    tile = fill_side(heads_per_kv)
    index_qx1 = jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    mask_qx1 = index_qx1 < heads_per_kv
    slot = pl.program_id(1)
    entries = _Slots(jnp.full((tile, 1), slot), pl.program_id(0), index_qx1, mask_qx1)

    q_qxC = entries.load(q_MxKxRxC, 0.0)
    score = (q_qxC.astype(jnp.float32) * new_k_C[...].astype(jnp.float32)[None]).sum(axis=1, keepdims=True)
    value = jnp.broadcast_to(new_v_C[...].astype(jnp.float32)[None], q_qxC.shape)
    softmax = Softmax(peak=score, total=jnp.ones_like(score), out=value)
    with_results = entries._replace(mask_qx1=mask_qx1 & (is_live[0] > 0))
    for partial in partials:
        softmax = merge(softmax, with_results.load_softmax(tuple(partial)))
    softmax = keys.add_to(softmax, q_qxC, jnp.full((tile, 1), length[0]))
    entries.store(out_MxKxRxC, softmax.out / softmax.total)


def _tile(queries: int) -> int:
    """Return the queries of a tile of the shared kernel."""
    return min(_LARGEST_TILE, fill_side(queries))


def attend_token_triton(
    q_MxKxRxC: jax.Array,
    k_MxKxC: jax.Array,
    v_MxKxC: jax.Array,
    shared: tuple[CacheReads, ...],
    own: CacheReads,
    layer: jax.Array | int,
    interpret: bool = False,
) -> jax.Array:
    """Compute on a GPU what `attend_token` does; the caches have separate keys and values, and groups of one row.

    Args:
      q_MxKxRxC, k_MxKxC, v_MxKxC, shared, own, layer: as there.
      interpret: run the kernels in interpret mode, without a GPU.
    """
    slots, kv_heads, heads_per_kv, head_size = q_MxKxRxC.shape
    padding = own.blocks.head_size - head_size
    q = jnp.pad(q_MxKxRxC, [(0, 0)] * 3 + [(0, padding)])
    k, v = (jnp.pad(x, [(0, 0)] * 2 + [(0, padding)]) for x in (k_MxKxC, v_MxKxC))
    whole = pl.BlockSpec()
    options: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=2),
        "interpret": interpret,
    }

    partials = []
    statistic = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    for reads in shared:
        rows, width = reads.ranges.length_NxW.shape
        with jax.named_scope("shared_cache_blocks"):
            partials += pl.pallas_call(
                functools.partial(_shared_kernel, width=width),
                grid=(pl.cdiv(width * heads_per_kv, _tile(width * heads_per_kv)), kv_heads, rows),
                in_specs=(*_key_specs(reads.blocks, head_axis=1, row_axis=2), whole, whole, whole),
                out_specs=(whole, whole, whole),
                out_shape=(statistic, statistic, jax.ShapeDtypeStruct(q.shape, jnp.float32)),
                name="attend_shared_cache",
                **options,
            )(*_keys(reads, layer), reads.ranges.length_NxW.reshape(-1), reads.slot_NW, q)

    with jax.named_scope("own_cache_blocks"):
        of_slot = pl.BlockSpec((1,), lambda head, slot: (slot,))
        of_head = pl.BlockSpec((None, None, own.blocks.head_size), lambda head, slot: (slot, head, 0))
        out = pl.pallas_call(
            functools.partial(_own_kernel, shared_caches=len(shared)),
            grid=(kv_heads, slots),
            in_specs=(
                *_key_specs(own.blocks, head_axis=0, row_axis=1),
                of_slot,
                of_slot,
                whole,
                of_head,
                of_head,
                *[whole] * len(partials),
            ),
            out_specs=whole,
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            name="attend_own_cache",
            **options,
        )(*_keys(own, layer), own.ranges.length_NxW.reshape(-1), live_slots(shared, slots), q, k, v, *partials)
    return out[..., :head_size]


def _keys(reads: CacheReads, layer: jax.Array | int) -> _Keys:
    """Return the arrays of which `_key_specs` are the specs."""
    ranges = reads.ranges
    layer = jnp.asarray(layer, jnp.int32)[None]
    return _Keys(layer, ranges.begin_N, ranges.visits_G, ranges.visit_GxV, reads.blocks.k, reads.blocks.v)


def _key_specs(cache: BlockedCache, head_axis: int, row_axis: int) -> _Keys:
    """Return the specs of the keys of a program's row and kv head, which are the given axes of the grid."""
    assert cache.order == "separate"
    layers, num_blocks, _, _, size, head_size = cache.k.shape
    of_row = pl.BlockSpec((1,), lambda *ids: (ids[row_axis],))
    keys = pl.BlockSpec(
        (layers, num_blocks, None, None, size, head_size), lambda *ids: (0, 0, ids[row_axis], ids[head_axis], 0, 0)
    )
    return _Keys(
        layer=pl.BlockSpec((1,), lambda *_: (0,)),
        begin=of_row,
        visits=of_row,
        visit_J=pl.BlockSpec((None, num_blocks), lambda *ids: (ids[row_axis], 0)),
        k_LxJxBxC=keys,
        v_LxJxBxC=keys,
    )
