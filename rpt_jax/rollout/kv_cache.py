"""Blocked KV cache, and attention of one new token per rollout over it.

Blocks of keys are [C, B] and blocks of values [B, C], which is the layout that their products need: XLA's CPU backend
would otherwise transpose whole caches for every token (three times as slow). Only blocks with a visible key are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.dispatch import KeyValues

# Keys per block. On a CPU, the products of a block should stay in a core's cache; accelerators need fewer and larger
# products.
_BLOCK_SIZE = {"cpu": 64, "gpu": 128, "tpu": 128}
# Keys per block of a root, which more rollouts share, so that products are larger. On a CPU, 64 took 10 % longer for a
# root with 32 rollouts, and 128 took 33 % longer for caches with few rollouts.
ROOT_BLOCK = 128
_LOGICAL_AXES = (None, None, "prompt", "kv_heads", None, None)

# Attention of one new token in one layer: (layer, q_MxKx1xRx1xC, KeyValues of the token [M, K, 1, 1, C]) -> output like
# q.
AttentionFn = Callable[[jax.Array | int, jax.Array, KeyValues], jax.Array]


class BlockedCache(NamedTuple):
    """Keys and values of S = blocks · B tokens for N rows.

    Attributes:
      k: [L, blocks, N, K, C, B].
      v: [L, blocks, N, K, B, C].
    """

    k: jax.Array
    v: jax.Array

    @property
    def block_size(self) -> int:
        """Keys per block, B."""
        return self.k.shape[-1]

    def take(self, rows: jax.Array) -> BlockedCache:
        """Return the given rows."""
        return BlockedCache(k=self.k[:, :, rows], v=self.v[:, :, rows])

    def block(self, layer: jax.Array | int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys [N, K, C, B] and the values [N, K, B, C] of one block."""

        def one(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, (layer, index, 0, 0, 0, 0), (1, 1, *x.shape[2:]))[0, 0]

        return one(self.k), one(self.v)

    def write(self, new: KeyValues, step: jax.Array) -> BlockedCache:
        """Write one token per row, [L, M, K, 1, 1, C], to the entry of decode step `step` in the ring buffer."""
        block = (step // self.block_size) % self.k.shape[1]
        offset = step % self.block_size
        k = jax.lax.dynamic_update_slice(self.k, new.k.transpose(0, 3, 1, 2, 5, 4), (0, block, 0, 0, 0, offset))
        v = jax.lax.dynamic_update_slice(self.v, new.v.transpose(0, 3, 1, 2, 4, 5), (0, block, 0, 0, offset, 0))
        return BlockedCache(k=k, v=v)


def block_size(platform: str, keys: int) -> int:
    """Return the keys per block for sequences of at most `keys` tokens."""
    return min(_BLOCK_SIZE[platform], max(keys, 1))


def to_blocks(kv: KeyValues, size: int) -> BlockedCache:
    """Convert keys and values [L, N, K, J, S, C] to blocks of `size` keys. Each of the N·J sequences becomes a row."""
    layers, n, kv_heads, branches, length, c = kv.k.shape
    padding = [(0, 0)] * 4 + [(0, -length % size), (0, 0)]

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, padding).transpose(0, 4, 1, 3, 2, 5)
        return x.reshape(layers, -1, size, n * branches, kv_heads, c).transpose(0, 1, 3, 4, 2, 5)

    return _constrain(BlockedCache(k=split(kv.k).swapaxes(-1, -2), v=split(kv.v)))


def empty_ring(like: KeyValues, rows: int, length: int, size: int) -> BlockedCache:
    """Return an empty ring buffer for at least the last `length` tokens of `rows` rollouts, in blocks of `size` keys.

    Args:
      like: keys and values [L, N, K, J, S, C] whose layers, heads and dtype it has.
    """
    layers, _, kv_heads, *_, c = like.k.shape
    dims = (layers, -(-length // size), rows, kv_heads)
    k = jnp.zeros((*dims, c, size), like.k.dtype)
    v = jnp.zeros((*dims, size, c), like.k.dtype)
    return _constrain(BlockedCache(k=k, v=v))


def _constrain(cache: BlockedCache) -> BlockedCache:
    return jax.tree.map(lambda x: with_logical_constraint(x, _LOGICAL_AXES), cache)


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


def cached_attention(
    shared: tuple[SharedCache, ...],
    rollout_M: jax.Array | None,
    own: BlockedCache,
    step: jax.Array,
    counts_M: jax.Array,
) -> AttentionFn:
    """Return the attention of each live rollout's new token over its shared caches, its own last tokens, and itself.

    Args:
      shared: caches that several rollouts share.
      rollout_M: int32 rollout in each slot, out of range for an idle slot. None if the shared caches have a row per
        slot.
      own: ring buffer indexed by decode step. All rollouts use the same index, whenever they started, so that writing
        takes no scatter.
      step: number of this decode step, whose keys are not written yet.
      counts_M: int32 number of the last steps that belong to each rollout.
    """
    grids = [None if rollout_M is None else _slot_grid(cache, rollout_M) for cache in shared]

    def attend(layer: jax.Array | int, q_MxKx1xRx1xC: jax.Array, new: KeyValues) -> jax.Array:
        q = q_MxKx1xRx1xC[:, :, 0, :, 0]
        q = q * q.shape[-1] ** -0.5
        # The token itself.
        scores = jnp.einsum("mkrc,mkc->mkr", q, new.k[:, :, 0, 0], preferred_element_type=jnp.float32)[..., None]
        value = jnp.broadcast_to(new.v[:, :, 0].astype(jnp.float32), q.shape)
        softmax = _OnlineSoftmax(peak=scores, total=jnp.ones_like(scores), out=value)
        # Its own last tokens, then what it shares.
        softmax = _attend_own(softmax, q, own, layer, step, counts_M)
        for cache, grid in zip(shared, grids, strict=True):
            softmax = softmax.merge(_attend_shared(q, cache, layer, grid))
        return (softmax.out / softmax.total).astype(q.dtype)[:, :, None, :, None]

    return attend


class _OnlineSoftmax(NamedTuple):
    """Softmax-weighted sum over the keys processed so far, float32.

    Attributes:
      peak: largest score, [N, K, Q, 1].
      total: sum of exp(score - peak), [N, K, Q, 1].
      out: sum of exp(score - peak) · value, [N, K, Q, C].
    """

    peak: jax.Array
    total: jax.Array
    out: jax.Array

    def add(self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> _OnlineSoftmax:
        """Add a block: queries [N, K, Q, C], keys [N, K, C, B], values [N, K, B, C], visible [N, 1, Q or 1, B]."""
        scores = jnp.einsum("nkqc,nkcb->nkqb", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores, MASKED_SCORE)
        peak = jnp.maximum(self.peak, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - peak)
        rescale = jnp.exp(self.peak - peak)
        out = jnp.einsum("nkqb,nkbc->nkqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return _OnlineSoftmax(
            peak=peak, total=self.total * rescale + weights.sum(-1, keepdims=True), out=self.out * rescale + out
        )

    def merge(self, other: _OnlineSoftmax) -> _OnlineSoftmax:
        """Combine with the result over other keys."""
        peak = jnp.maximum(self.peak, other.peak)
        a = jnp.exp(self.peak - peak)
        b = jnp.exp(other.peak - peak)
        return _OnlineSoftmax(peak=peak, total=self.total * a + other.total * b, out=self.out * a + other.out * b)


class _SlotGrid(NamedTuple):
    """How the M slots map to the N·W entries of a shared cache.

    Attributes:
      index_M: int32 entry n·W + w of each slot; out of range for an idle slot.
      slot_NW: int32 slot of each entry; arbitrary for an entry without one.
      end_NxW: int32 number of keys that each entry attends to; 0 for an entry without a slot.
    """

    index_M: jax.Array
    slot_NW: jax.Array
    end_NxW: jax.Array


def _slot_grid(shared: SharedCache, rollout_M: jax.Array) -> _SlotGrid:
    """Return the grid of a shared cache for slots that hold the rollouts `rollout_M`, which are out of range if idle."""
    n, width = shared.end_NxW.shape
    index_M = shared.index_R.at[rollout_M].get(mode="fill", fill_value=n * width)
    slot_NW = jnp.zeros(n * width, jnp.int32).at[index_M].set(jnp.arange(len(index_M)), mode="drop")
    used_NW = jnp.zeros(n * width, bool).at[index_M].set(True, mode="drop")
    end_NxW = jnp.where(used_NW.reshape(n, width), shared.end_NxW, 0)
    return _SlotGrid(index_M=index_M, slot_NW=slot_NW, end_NxW=end_NxW)


@jax.named_scope("own_cache_blocks")
def _attend_own(
    softmax: _OnlineSoftmax,
    q: jax.Array,
    own: BlockedCache,
    layer: jax.Array | int,
    step: jax.Array,
    counts_M: jax.Array,
) -> _OnlineSoftmax:
    """Add each rollout's own last tokens."""
    blocks = own.k.shape[1]
    size = own.block_size

    def add(i: jax.Array, softmax: _OnlineSoftmax) -> _OnlineSoftmax:
        index = i % blocks
        age_B = (step - 1 - index * size - jnp.arange(size)) % (blocks * size)
        visible_MxB = age_B < counts_M[:, None]
        k, v = own.block(layer, index)
        return softmax.add(q, k, v, visible_MxB[:, None, None])

    if blocks == 1:  # A loop costs more than it can save.
        return add(jnp.int32(0), softmax)
    first = (step - counts_M.max()) // size
    last = -(-step // size)
    # The oldest and the newest keys may be in the same block of the ring, which must be processed only once.
    return jax.lax.fori_loop(first, jnp.minimum(last, first + blocks), add, softmax)


@jax.named_scope("shared_cache_blocks")
def _attend_shared(q: jax.Array, shared: SharedCache, layer: jax.Array | int, grid: _SlotGrid | None) -> _OnlineSoftmax:
    """Process each row's keys once for all rollouts that share it; `grid` is None if each slot has its own row."""
    end_NxW = shared.end_NxW if grid is None else grid.end_NxW
    n, width = end_NxW.shape
    _, kv_heads, group, c = q.shape
    blocks = shared.blocks

    # Queries of the rollouts of a row become one axis: [N, K, W·R, C].
    rows = q if grid is None else q[grid.slot_NW]
    rows = rows.reshape(n, width, kv_heads, group, c).transpose(0, 2, 1, 3, 4).reshape(n, kv_heads, -1, c)
    end_NxQ = jnp.repeat(end_NxW, group, axis=1)[:, None, :, None]

    def add(i: jax.Array, softmax: _OnlineSoftmax) -> _OnlineSoftmax:
        visible = i * blocks.block_size + jnp.arange(blocks.block_size) < end_NxQ
        k, v = blocks.block(layer, i)
        return softmax.add(rows, k, v, visible)

    # Up to the last block that a rollout attends to.
    peak = jnp.full((*rows.shape[:-1], 1), MASKED_SCORE, jnp.float32)
    softmax = _OnlineSoftmax(peak=peak, total=jnp.zeros_like(peak), out=jnp.zeros(rows.shape, jnp.float32))
    softmax = jax.lax.fori_loop(0, -(-end_NxW.max() // blocks.block_size), add, softmax)

    # Back to one row per slot.
    def to_slots(x: jax.Array) -> jax.Array:
        x = x.reshape(n, kv_heads, width, group, -1).transpose(0, 2, 1, 3, 4).reshape(n * width, kv_heads, group, -1)
        return x if grid is None else x.at[grid.index_M].get(mode="clip")

    return jax.tree.map(to_slots, softmax)
