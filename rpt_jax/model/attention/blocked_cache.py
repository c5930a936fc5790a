"""KV caches in blocks, and attention of the new tokens of a decode step over them.

The kernels in cache_triton.py and cache_mosaic.py compute what `attend_token` does.

Letters in shape suffixes: M slots have a new token each, with R queries for each kv head. A cache has L layers and N rows, each
of J blocks of B keys (S = J·B) for K kv heads of size C. Up to W rollouts share a row, which then has Q = W·R queries for each
kv head. Rows form G groups.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.packed_kernels import Softmax, merge
from rpt_jax.model.gpu import fill_side
from rpt_jax.model.tpu import LANES, fill_lanes, fill_sublanes

# How a cache stores keys and values:
#   separate          as two arrays, with heads padded to the sizes that a GPU's kernel can have
#   transposed_keys   as two arrays, keys [C, B]. XLA's CPU backend would otherwise transpose whole caches for every token, which
#                     takes three times as long.
#   joined            as one array, each value behind its key. A TPU stores whole registers of 128 numbers: the keys of heads of
#                     size 64 would take twice their size alone. Blocks also take half as many copies.
CacheOrder = Literal["separate", "transposed_keys", "joined"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("order",))
@dataclasses.dataclass(frozen=True)
class BlockedCache:
    """Keys and values of S = J·B tokens for N rows.

    Attributes:
      k: [L, J, N, K, B, C]; [L, J, N, K, C, B] with transposed keys; [L, J, N, K, B, 2·C] if joined.
      v: [L, J, N, K, B, C]; None if joined.
      order: how keys and values are stored; C includes padding.
    """

    k: jax.Array
    v: jax.Array | None
    order: CacheOrder

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, order: CacheOrder) -> BlockedCache:
        """Return a cache of keys and values [L, J, N, K, B, C]."""
        if order == "joined":
            return cls(k=jnp.concatenate([k, v], axis=-1), v=None, order=order)
        if order == "separate":
            padding = [(0, 0)] * 5 + [(0, fill_side(k.shape[-1]) - k.shape[-1])]
            return cls(k=jnp.pad(k, padding), v=jnp.pad(v, padding), order=order)
        return cls(k=k.swapaxes(-1, -2) if order == "transposed_keys" else k, v=v, order=order)

    @property
    def num_blocks(self) -> int:
        """Blocks per row, J."""
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        """Kv heads, K."""
        return self.k.shape[3]

    @property
    def block_size(self) -> int:
        """Keys per block, B."""
        return self.k.shape[5 if self.order == "transposed_keys" else 4]

    @property
    def head_size(self) -> int:
        """Size of a head with its padding, C."""
        size = self.k.shape[4 if self.order == "transposed_keys" else 5]
        return size // 2 if self.order == "joined" else size

    def take(self, rows: jax.Array) -> BlockedCache:
        """Return a copy of the given rows."""
        return jax.tree.map(lambda x: x[:, :, rows], self)

    def move_to_front(self, rows: jax.Array) -> BlockedCache:
        """Move the given rows, in ascending order, to the front. They overwrite the rows that are there.

        XLA does this in place, row by row, so that there is no second cache.
        """

        def move(index: jax.Array, cache: BlockedCache) -> BlockedCache:
            def move_row(x: jax.Array) -> jax.Array:
                row = jax.lax.dynamic_slice_in_dim(x, rows[index], 1, axis=2)
                return jax.lax.dynamic_update_slice_in_dim(x, row, index, axis=2)

            return jax.tree.map(move_row, cache)

        return jax.lax.fori_loop(0, len(rows), move, self)


class CacheRanges(NamedTuple):
    """Which keys of its row each rollout attends to; the same in every layer.

    Attributes:
      begin_N: int32, the first key that the rollouts of a row attend to.
      length_NxW: int32, how many keys a rollout attends to from there on. After the last key of a row comes its first one, as in
        a ring buffer.
      visit_GxV: int32, row·J + block of each visit of a group. The blocks with keys to attend to come first. If all rows visit
        blocks together, the row is 0.
      visits_G: int32, the number of blocks with keys to attend to.
    """

    begin_N: jax.Array
    length_NxW: jax.Array
    visit_GxV: jax.Array
    visits_G: jax.Array


def make_cache_ranges(
    begin_N: jax.Array, length_NxW: jax.Array, cache: BlockedCache, max_group_rows: int | None
) -> CacheRanges:
    """List the blocks with keys to attend to.

    Args:
      begin_N, length_NxW: as in `CacheRanges`.
      cache: the cache.
      max_group_rows: limit of the rows per group, of which each visits blocks of its own; None for one group of all rows, which
        visit the blocks together in which any of them has keys to attend to.
    """
    # A range has keys in a block if it contains the first key of the block, or begins within the block.
    size = cache.block_size
    first_J = jnp.arange(cache.num_blocks, dtype=jnp.int32) * size
    longest_Nx1 = length_NxW.max(axis=1, keepdims=True)
    contains_NxJ = (first_J - begin_N[:, None]) % (cache.num_blocks * size) < longest_Nx1
    begins_within_NxJ = begin_N[:, None] // size == first_J // size
    attended_NxJ = contains_NxJ | (begins_within_NxJ & (longest_Nx1 > 0))

    if max_group_rows is None:
        attended_NxJ = attended_NxJ.any(axis=0, keepdims=True)
        max_group_rows = 1
    rows = len(attended_NxJ)
    groups = -(-rows // max_group_rows)
    group_rows = group_size(rows, groups)
    padding = groups * group_rows - rows
    attended_GxV = jnp.pad(attended_NxJ, ((0, padding), (0, 0))).reshape(groups, -1)
    order_GxV = jnp.argsort(~attended_GxV, axis=-1, stable=True).astype(jnp.int32)
    first_visit_Gx1 = jnp.arange(groups, dtype=jnp.int32)[:, None] * (group_rows * cache.num_blocks)
    return CacheRanges(
        begin_N=begin_N,
        length_NxW=length_NxW,
        visit_GxV=first_visit_Gx1 + order_GxV,
        visits_G=attended_GxV.sum(axis=-1, dtype=jnp.int32),
    )


def group_size(rows: int, groups: int) -> int:
    """Return the rows per group; the last group may have fewer."""
    return -(-rows // groups)


class CacheSizes(NamedTuple):
    """Sizes of attention over a cache on one device.

    Attributes:
      num_queries: queries of a rollout and kv head.
      block: keys per block.
      kv_heads: the device's kv heads.
      head_size: size of a head.
      itemsize: bytes of a query's, key's or value's number.
    """

    num_queries: int
    block: int
    kv_heads: int
    head_size: int
    itemsize: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of joined keys and values of all kv heads in a TPU's memory."""
        return self.kv_heads * self.block * fill_lanes(2 * self.head_size) * self.itemsize

    @property
    def query_size(self) -> int:
        """Size of a query and of its result in the TPU kernel: a head's, or twice that if a key does not fill registers."""
        return self.head_size if self.head_size % LANES == 0 else 2 * self.head_size

    @property
    def rollout_bytes(self) -> int:
        """Bytes of a rollout's queries and of their results, float32, in a TPU's memory."""
        numbers = self.kv_heads * fill_sublanes(self.num_queries) * fill_lanes(self.query_size)
        return numbers * (self.itemsize + jnp.dtype(jnp.float32).itemsize)


class SlotGrid(NamedTuple):
    """How the M slots map to the N·W entries of a shared cache.

    Attributes:
      index_M: int32 entry n·W + w of each slot; out of range for an idle slot.
      is_live_M: int32, 0 for an idle slot and 1 for others.
      slot_NxW: int32 slot of each entry; -1 for an entry without one.
    """

    index_M: jax.Array
    is_live_M: jax.Array
    slot_NxW: jax.Array

    @classmethod
    def of(cls, index_M: jax.Array, rows: int, width: int) -> SlotGrid:
        """Return the grid of slots with the entries `index_M` of a cache of `rows` rows that `width` rollouts share."""
        slot_NW = jnp.full(rows * width, -1, jnp.int32).at[index_M].set(jnp.arange(len(index_M)), mode="drop")
        is_live_M = (index_M < rows * width).astype(jnp.int32)
        return cls(index_M=index_M, is_live_M=is_live_M, slot_NxW=slot_NW.reshape(rows, width))

    def to_rows(self, q_MxKxRxC: jax.Array) -> jax.Array:
        """Return the queries of the rollouts of a row on one axis, [N, K, W·R, C]."""
        n, width = self.slot_NxW.shape
        _, kv_heads, group, c = q_MxKxRxC.shape
        return q_MxKxRxC[self.slot_NxW].transpose(0, 2, 1, 3, 4).reshape(n, kv_heads, width * group, c)

    def to_slots(self, rows: PartialSoftmax) -> PartialSoftmax:
        """Return the results [N, K, W·R, …] of the queries of `to_rows` for each slot, [M, K, R, …]."""
        n, width = self.slot_NxW.shape

        def convert(x: jax.Array) -> jax.Array:
            _, kv_heads, queries, c = x.shape
            x = x.reshape(n, kv_heads, width, queries // width, c).transpose(0, 2, 1, 3, 4)
            return x.reshape(n * width, kv_heads, -1, c).at[self.index_M].get(mode="clip")

        return jax.tree.map(convert, rows)


class CacheReads(NamedTuple):
    """Which keys of a cache the rollouts in the slots attend to.

    Attributes:
      blocks: the cache.
      grid: which slot each entry of the cache is for; None if it has a row per slot.
      ranges: which keys of its row each rollout attends to.
    """

    blocks: BlockedCache
    grid: SlotGrid | None
    ranges: CacheRanges

    @property
    def slot_NW(self) -> jax.Array:
        """Slot of each entry, int32 [N·W]; -1 for entries without one."""
        if self.grid is None:
            return jnp.arange(self.ranges.length_NxW.size, dtype=jnp.int32)
        return self.grid.slot_NxW.reshape(-1)


def live_slots(shared: tuple[CacheReads, ...], slots: int) -> jax.Array:
    """Return which of the slots have an entry in every shared cache, int32 [M]: 0 for idle ones."""
    grids = [reads.grid for reads in shared if reads.grid is not None]
    return grids[0].is_live_M if grids else jnp.ones(slots, jnp.int32)


def attended_entries(begin: jax.Array, length: jax.Array, entry: jax.Array, size: int) -> jax.Array:
    """Return whether queries attend to entries of their row; the arguments broadcast against each other.

    Args:
      begin, length: of the queries, as in `CacheRanges`.
      entry: int32 indices of keys in their row.
      size: number of keys of a row, S.
    """
    after_begin = entry - begin
    return jnp.where(after_begin < 0, after_begin + size, after_begin) < length


class PartialSoftmax(NamedTuple):
    """Weighted sum of values over some of the keys, not normalized yet, float32.

    Attributes:
      peak: largest score, [N, K, Q, 1]; `MASKED_SCORE` without keys.
      total: sum of exp(score - peak), [N, K, Q, 1].
      out: sum of exp(score - peak) · value, [N, K, Q, C].
    """

    peak: jax.Array
    total: jax.Array
    out: jax.Array

    def add(self, scores_NxKxQxB: jax.Array, v_NxKxBxC: jax.Array) -> PartialSoftmax:
        """Add a block of keys."""
        peak = jnp.maximum(self.peak, scores_NxKxQxB.max(-1, keepdims=True))
        weights = jnp.exp(scores_NxKxQxB - peak)
        rescale = jnp.exp(self.peak - peak)
        out = jnp.einsum(
            "nkqb,nkbc->nkqc", weights.astype(v_NxKxBxC.dtype), v_NxKxBxC, preferred_element_type=jnp.float32
        )
        return PartialSoftmax(
            peak=peak, total=self.total * rescale + weights.sum(-1, keepdims=True), out=self.out * rescale + out
        )

    def merge(self, other: PartialSoftmax) -> PartialSoftmax:
        """Combine with the result over other keys."""
        return PartialSoftmax(*merge(Softmax(*self), Softmax(*other)))


def attend_cache_blockwise(
    q_NxKxQxC: jax.Array, cache: BlockedCache, layer: jax.Array | int, ranges: CacheRanges
) -> PartialSoftmax:
    """Attend over the rows of a KV cache in plain XLA, block by block.

    Args:
      q_NxKxQxC: scaled queries, for the first N rows of the cache.
      cache: keys and values of all layers.
      layer: index of the layer.
      ranges: which keys each query attends to; all rows visit blocks together.
    """
    size = cache.block_size
    rows, _, num_queries, _ = q_NxKxQxC.shape
    length_NxQ = jnp.repeat(ranges.length_NxW, num_queries // ranges.length_NxW.shape[1], axis=1)

    def block(x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (layer, index, 0, 0, 0, 0), (1, 1, rows, *x.shape[3:]))[0, 0]

    def add(visit: jax.Array | int, softmax: PartialSoftmax) -> PartialSoftmax:
        index = ranges.visit_GxV[0, visit]
        entry_B = index * size + jnp.arange(size)
        attended_NxQxB = attended_entries(
            ranges.begin_N[:, None, None], length_NxQ[..., None], entry_B, cache.num_blocks * size
        )
        k = block(cache.k, index)
        if cache.v is None:
            k, v = jnp.split(k, 2, axis=-1)
        else:
            v = block(cache.v, index)
        equation = "nkqc,nkcb->nkqb" if cache.order == "transposed_keys" else "nkqc,nkbc->nkqb"
        scores = jnp.einsum(equation, q_NxKxQxC, k, preferred_element_type=jnp.float32)
        return softmax.add(jnp.where(attended_NxQxB[:, None], scores, MASKED_SCORE), v)

    peak = jnp.full((*q_NxKxQxC.shape[:-1], 1), MASKED_SCORE, jnp.float32)
    start = PartialSoftmax(peak=peak, total=jnp.zeros_like(peak), out=jnp.zeros(q_NxKxQxC.shape, jnp.float32))
    if cache.num_blocks == 1:  # A loop costs more than it can save.
        return add(0, start)
    return jax.lax.fori_loop(0, ranges.visits_G[0], add, start)


def attend_token(
    q_MxKxRxC: jax.Array,
    k_MxKxC: jax.Array,
    v_MxKxC: jax.Array,
    shared: tuple[CacheReads, ...],
    own: CacheReads,
    layer: jax.Array | int,
) -> jax.Array:
    """Attend with each slot's new token over the token itself, its rollout's own last tokens, and what rollouts share.

    This is plain XLA. In the caches it goes through the blocks with `attend_cache_blockwise`.

    Args:
      q_MxKxRxC: scaled queries.
      k_MxKxC, v_MxKxC: keys and values of the new tokens.
      shared: what the rollouts attend to in each of the caches that they share.
      own: what they attend to in the cache of their own tokens.
      layer: index of the layer.

    Returns: as the queries; arbitrary finite numbers for idle slots.
    """
    head_size = q_MxKxRxC.shape[-1]
    padding = own.blocks.head_size - head_size
    q = jnp.pad(q_MxKxRxC, [(0, 0)] * 3 + [(0, padding)])
    # The token itself.
    k, v = (jnp.pad(x, [(0, 0)] * 2 + [(0, padding)]) for x in (k_MxKxC, v_MxKxC))
    scores = jnp.einsum("mkrc,mkc->mkr", q, k, preferred_element_type=jnp.float32)[..., None]
    value = jnp.broadcast_to(v[:, :, None].astype(jnp.float32), q.shape)
    softmax = PartialSoftmax(peak=scores, total=jnp.ones_like(scores), out=value)
    # Its own last tokens, then what it shares.
    with jax.named_scope("own_cache_blocks"):
        softmax = softmax.merge(attend_cache_blockwise(q, own.blocks, layer, own.ranges))
    for blocks, grid, ranges in shared:
        with jax.named_scope("shared_cache_blocks"):
            rows = q if grid is None else grid.to_rows(q)
            part = attend_cache_blockwise(rows, blocks, layer, ranges)
            softmax = softmax.merge(part if grid is None else grid.to_slots(part))
    return (softmax.out / softmax.total)[..., :head_size].astype(q.dtype)
