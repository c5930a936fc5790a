"""The KV caches of rollouts, and attention of one new token per rollout over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from rpt_jax.distributed.mesh import DECODING, num_shards
from rpt_jax.model.attention.blocked_cache import (
    BlockedCache,
    CacheOrder,
    CacheReads,
    CacheSizes,
    SlotGrid,
    make_cache_ranges,
)
from rpt_jax.model.attention.dispatch import CacheKernel, KeyValues
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.gpu import fill_side
from rpt_jax.model.tpu import fill_lanes


class CacheLayout(NamedTuple):
    """How the caches of a platform are stored.

    Attributes:
      own_block: most keys per block of a rollout's own tokens.
      own_block_bytes: most bytes of such a block, of which half are read in vain in a rollout's last block; None for any number.
      prompt_block: keys per block of a prompt.
      root_block: keys per block of a root, which more rollouts share than a prompt.
      fit_block: returns the keys of the smallest block that holds so many keys and that the kernels can read.
      order: how keys and values are stored.
    """

    own_block: int
    own_block_bytes: int | None
    prompt_block: int
    root_block: int
    fit_block: Callable[[int], int]
    order: CacheOrder

    def block_size(self, most: int, keys: int) -> int:
        """Return the keys per block of rows of `keys` keys: `most`, or fewer if one smaller block holds all of them."""
        return min(most, self.fit_block(keys))


def _as_many(keys: int) -> int:
    return keys


def _whole_tiles(keys: int) -> int:
    """Return whole tiles of a TPU's memory, which have 16 keys in bfloat16."""
    return -(-keys // 16) * 16


# On a CPU, the products of a block should stay in a core's cache. A larger block of a root makes larger products: 64 took 10 %
# longer for a root with 32 rollouts, and 128 took 33 % longer for caches with few rollouts. Two blocks of keys and values have
# to fit in a GPU core's shared memory. A TPU needs larger copies to outweigh the overhead of a visit.
CACHE_LAYOUTS = {
    "cpu": CacheLayout(
        own_block=64,
        own_block_bytes=None,
        prompt_block=64,
        root_block=128,
        fit_block=_as_many,
        order="transposed_keys",
    ),
    "gpu": CacheLayout(
        own_block=64,
        own_block_bytes=None,
        prompt_block=64,
        root_block=64,
        fit_block=fill_side,
        order="separate",
    ),
    "tpu": CacheLayout(
        own_block=128,
        own_block_bytes=2**16,
        prompt_block=512,
        root_block=512,
        fit_block=_whole_tiles,
        order="joined",
    ),
}
_LEAST_OWN_KEYS = 32  # A TPU's memory has tiles of 8 keys, or of 16 in bfloat16.
_Tree = TypeVar("_Tree")
_LOGICAL_AXES = (None, None, "prompt", "kv_heads", None, None)

# Attention of one new token in one layer: (layer, q_MxKx1xRx1xC, KeyValues of the token [M, K, 1, 1, C]) -> output like
# q.
AttentionFn = Callable[[jax.Array | int, jax.Array, KeyValues], jax.Array]


def cache_layout() -> CacheLayout:
    """Return the layout of the platform that programs are compiled for."""
    return CACHE_LAYOUTS[target_platform()]


def own_block_size(layout: CacheLayout, keys: int, *, kv_heads: int, head_size: int, itemsize: int) -> int:
    """Return the keys per block of a rollout's own tokens: fewer than the layout's most if that takes too many bytes.

    Args:
      layout: of the platform.
      keys: of a rollout.
      kv_heads: the device's kv heads.
      head_size: size of a head.
      itemsize: bytes of a number.
    """
    most = layout.own_block
    if layout.own_block_bytes is not None:
        key_bytes = kv_heads * fill_lanes(2 * head_size) * itemsize
        while most > _LEAST_OWN_KEYS and most * key_bytes > layout.own_block_bytes:
            most //= 2
    return layout.block_size(most, keys)


def to_blocks(kv: KeyValues, block: int, order: CacheOrder) -> BlockedCache:
    """Convert keys and values [L, N, K, J, S, C] to a cache. Each of the N·J sequences becomes a row.

    Args:
      kv: keys and values.
      block: keys per block.
      order: how the cache stores them.
    """
    layers, n, kv_heads, branches, length, c = kv.k.shape
    padding = [(0, 0)] * 4 + [(0, -length % block), (0, 0)]

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, padding).transpose(0, 4, 1, 3, 2, 5)
        return x.reshape(layers, -1, block, n * branches, kv_heads, c).transpose(0, 1, 3, 4, 2, 5)

    return _constrain(BlockedCache.of(split(kv.k), split(kv.v), order))


def empty_ring(like: KeyValues, rows: int, length: int, block: int, order: CacheOrder) -> BlockedCache:
    """Return an empty ring buffer for at least the last `length` tokens of `rows` rollouts.

    Args:
      like: keys and values [L, N, K, J, S, C] whose layers, heads and dtype it has.
      rows: number of rollouts.
      length: number of tokens, at least 1.
      block: keys per block.
      order: how the buffer stores keys and values.
    """
    layers, _, kv_heads, *_, c = like.k.shape
    zeros = jnp.zeros((layers, -(-length // block), rows, kv_heads, block, c), like.k.dtype)
    return _constrain(BlockedCache.of(zeros, zeros, order))


def write_token(ring: BlockedCache, new: KeyValues, step: jax.Array) -> BlockedCache:
    """Write one token per row, [L, M, K, 1, 1, C], to the entry of decode step `step` in the ring buffer."""
    block = (step // ring.block_size) % ring.num_blocks
    offset = step % ring.block_size
    entry = (0, block, 0, 0, offset, 0)
    entry_k = (0, block, 0, 0, 0, offset) if ring.order == "transposed_keys" else entry
    k, v = (x.transpose(0, 3, 1, 2, 4, 5) for x in new)
    token = BlockedCache.of(k, v, ring.order)
    return dataclasses.replace(
        ring,
        k=jax.lax.dynamic_update_slice(ring.k, token.k, entry_k),
        v=jax.lax.dynamic_update_slice(ring.v, token.v, entry) if ring.v is not None and token.v is not None else None,
    )


def _constrain(cache: BlockedCache) -> BlockedCache:
    return jax.tree.map(lambda x: with_logical_constraint(x, _LOGICAL_AXES), cache)


def _replicate(tree: _Tree) -> _Tree:
    """Keep small arrays on every device. XLA would split them over devices, and gather them in every layer again."""
    return jax.tree.map(lambda x: with_logical_constraint(x, (None,) * x.ndim), tree)


class SharedCache(NamedTuple):
    """Cache of N rows, each shared by up to W rollouts: those of a prompt, or of all prompts with the same root.

    Attributes:
      blocks: keys and values of the N rows.
      end_NxW: int32 number of its row's keys that each rollout attends to.
      index_R: int32 index n·W + w of each of all R rollouts.
    """

    blocks: BlockedCache
    end_NxW: jax.Array
    index_R: jax.Array

    def unshare(self, index_M: jax.Array) -> SharedCache:
        """Return a cache with a separate row for each of the rollouts at `index_M`.

        This copies rows, but once few rollouts are left it is cheaper than attention over the whole grid.
        """
        width = self.end_NxW.shape[1]
        return self._replace(
            blocks=self.blocks.take(index_M // width), end_NxW=self.end_NxW.reshape(-1)[index_M][:, None]
        )


def shared_reads(cache: SharedCache, rollout_M: jax.Array | None, heads_per_kv: int, kernel: CacheKernel) -> CacheReads:
    """Return what the rollouts in the slots attend to in a shared cache, until other rollouts take the slots.

    Args:
      cache: the cache.
      rollout_M: int32 rollout in each slot, out of range for an idle slot. None if the cache has a row per slot.
      heads_per_kv: query heads per kv head.
      kernel: what computes attention over the caches.
    """
    sizes = _sizes(cache.blocks, heads_per_kv)
    end_NxW = cache.end_NxW
    grid = None
    if rollout_M is not None:
        index_M = cache.index_R.at[rollout_M].get(mode="fill", fill_value=end_NxW.size)
        index_M, end_NxW = _split_rows(index_M, end_NxW, kernel.row_parts(sizes, end_NxW.shape[1]))
        grid = SlotGrid.of(index_M, *end_NxW.shape)
        end_NxW = jnp.where(grid.slot_NxW >= 0, end_NxW, 0)
    rows, width = end_NxW.shape
    begin_N = jnp.zeros(rows, jnp.int32)
    ranges = make_cache_ranges(begin_N, end_NxW, cache.blocks, kernel.max_shared_rows(sizes, width))
    return CacheReads(blocks=cache.blocks, grid=_replicate(grid), ranges=_replicate(ranges))


def cached_attention(
    shared: tuple[CacheReads, ...],
    own: BlockedCache,
    step: jax.Array,
    counts_M: jax.Array,
    heads_per_kv: int,
    kernel: CacheKernel,
) -> AttentionFn:
    """Return the attention of each live rollout's new token over its shared caches, its own last tokens, and itself.

    Args:
      shared: what the rollouts attend to in each of the caches that they share.
      own: ring buffer indexed by decode step. All rollouts use the same index, whenever they started, so that writing
        takes no scatter.
      step: number of this decode step, whose keys are not written yet.
      counts_M: int32 number of the last steps that belong to each rollout.
      heads_per_kv: query heads per kv head.
      kernel: what computes attention over the caches.
    """
    begin_M = (step - counts_M) % (own.num_blocks * own.block_size)
    max_group_rows = kernel.max_own_rows(_sizes(own, heads_per_kv))
    own_ranges = make_cache_ranges(begin_M, counts_M[:, None], own, max_group_rows)
    own_reads = CacheReads(blocks=own, grid=None, ranges=_replicate(own_ranges))

    def attend(layer: jax.Array | int, q_MxKx1xRx1xC: jax.Array, new: KeyValues) -> jax.Array:
        q_MxKxRxC = q_MxKx1xRx1xC[:, :, 0, :, 0] * q_MxKx1xRx1xC.shape[-1] ** -0.5
        k_MxKxC, v_MxKxC = (x[:, :, 0, 0] for x in new)
        out_MxKxRxC = kernel.attend(q_MxKxRxC, k_MxKxC, v_MxKxC, shared, own_reads, layer)
        return out_MxKxRxC[:, :, None, :, None]

    return attend


def _split_rows(index_M: jax.Array, end_NxW: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Divide the rollouts of each row into equal parts, which read the keys of the row separately.

    Args:
      index_M: int32 entry n·W + w of each slot, or N·W.
      end_NxW: number of keys that each rollout attends to.
      parts: number of parts of a row.

    Returns: both arguments, with the parts as rows.
    """
    rows, width = end_NxW.shape
    padded_NxW = jnp.pad(end_NxW, ((0, 0), (0, -width % parts)))
    padded_width = padded_NxW.shape[1]
    return index_M // width * padded_width + index_M % width, padded_NxW.reshape(rows * parts, -1)


def _sizes(cache: BlockedCache, heads_per_kv: int) -> CacheSizes:
    """Return the sizes of attention on a device."""
    return CacheSizes(
        num_queries=heads_per_kv,
        block=cache.block_size,
        kv_heads=device_kv_heads(cache.kv_heads),
        head_size=cache.head_size,
        itemsize=cache.k.dtype.itemsize,
    )


def device_kv_heads(kv_heads: int) -> int:
    """Return how many of the kv heads a device of the current mesh has while it decodes."""
    mesh = jax.sharding.get_abstract_mesh()
    return kv_heads if mesh.empty else -(-kv_heads // num_shards(mesh, DECODING["kv_heads"]))
