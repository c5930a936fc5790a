"""What live rollouts look at while they decode: keys and values in blocks, and attention of one new token over them.

Blocks of keys are [C, B] and blocks of values [B, C], as the two products want them: XLA's CPU backend would transpose whole
caches a token otherwise (3 times the time). Only blocks in which some live rollout sees something are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from rpt_jax.model.attention.blockwise import MASKED_SCORE
from rpt_jax.model.attention.dispatch import KeyValues

# Keys of a block. A core's cache holds what a block makes; an accelerator wants fewer and larger products.
_BLOCK = {"cpu": 64, "gpu": 128, "tpu": 128}
# Of a root: more rollouts share its keys, and products are larger as it is (on a CPU 64 took a tenth longer for 32 of them; 128
# for what fewer share, a third longer).
ROOT_BLOCK = 128
_AXES = (None, None, "prompt", "kv_heads", None, None)

# Attention of one new token in one layer: (layer, q_MxKx1xRx1xC, its own KeyValues [M, K, 1, 1, C]) -> like q.
Look = Callable[[jax.Array | int, jax.Array, KeyValues], jax.Array]


class Blocks(NamedTuple):
    """Keys and values of S = blocks · B tokens for N rows.

    Attributes: k [L, blocks, N, K, C, B], v [L, blocks, N, K, B, C].
    """

    k: jax.Array
    v: jax.Array

    @property
    def size(self) -> int:
        """Keys of a block, B."""
        return self.k.shape[-1]

    def take(self, rows: jax.Array) -> Blocks:
        """Return the rows `rows` of it."""
        return Blocks(self.k[:, :, rows], self.v[:, :, rows])

    def block(self, layer: jax.Array | int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [N, K, C, B] and values [N, K, B, C] of one block."""
        k, v = (jax.lax.dynamic_slice(x, (layer, index, 0, 0, 0, 0), (1, 1, *x.shape[2:]))[0, 0] for x in self)
        return k, v

    def write(self, new: KeyValues, step: jax.Array) -> Blocks:
        """Put the keys of one token a row, [L, M, K, 1, 1, C], where step number `step` of the ring belongs."""
        index, inside = (step // self.size) % self.k.shape[1], step % self.size
        k = jax.lax.dynamic_update_slice(self.k, new.k.transpose(0, 3, 1, 2, 5, 4), (0, index, 0, 0, 0, inside))
        v = jax.lax.dynamic_update_slice(self.v, new.v.transpose(0, 3, 1, 2, 4, 5), (0, index, 0, 0, inside, 0))
        return Blocks(k, v)


def block_size(platform: str, keys: int) -> int:
    """Keys of a block for sequences of at most `keys`."""
    return min(_BLOCK[platform], max(keys, 1))


def in_blocks(kv: KeyValues, size: int) -> Blocks:
    """Lay keys and values [L, N, K, J, S, C] out for decoding; each of the N·J becomes a row."""
    layers, n, kv_heads, branches, length, c = kv.k.shape
    padding = [(0, 0)] * 4 + [(0, -length % size), (0, 0)]
    k, v = (
        jnp.pad(x, padding)
        .transpose(0, 4, 1, 3, 2, 5)
        .reshape(layers, -1, size, n * branches, kv_heads, c)
        .transpose(0, 1, 3, 4, 2, 5)
        for x in kv
    )
    return Blocks(*(nn.with_logical_constraint(x, _AXES) for x in (k.swapaxes(-1, -2), v)))


def empty_ring(keys: KeyValues, rows: int, length: int, size: int) -> Blocks:
    """Room for the last `length` tokens or more of `rows` rollouts, of the kind of `keys` [L, N, K, J, S, C]."""
    layers, _, kv_heads, *_, c = keys.k.shape
    dims = (layers, -(-length // size), rows, kv_heads)
    k, v = jnp.zeros((*dims, c, size), keys.k.dtype), jnp.zeros((*dims, size, c), keys.k.dtype)
    return Blocks(*(nn.with_logical_constraint(x, _AXES) for x in (k, v)))


class Shared(NamedTuple):
    """Keys of N rows that up to W rollouts each share: those of a prompt, of a root or of a tail.

    Attributes:
      blocks: of the N rows.
      end_NxW: int32, how many of its row's keys each rollout sees.
      place_R: int32 index n·W + w of each of all rollouts.
    """

    blocks: Blocks
    end_NxW: jax.Array
    place_R: jax.Array

    def spread(self, places_M: jax.Array) -> Shared:
        """Return a row of its own for each of the rollouts at `places_M`: cheaper than the grid, once few are left."""
        width = self.end_NxW.shape[1]
        return self._replace(
            blocks=self.blocks.take(places_M // width), end_NxW=self.end_NxW.reshape(-1)[places_M][:, None]
        )


class _Running(NamedTuple):
    """Softmax over the keys so far, [N, K, Q, 1 or C] in float32."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array

    def add(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> _Running:
        """Go over one block: queries [N, K, Q, C], keys [N, K, C, B], values [N, K, B, C], seen [N, 1, Q or 1, B]."""
        scores = jnp.einsum("nkqc,nkcb->nkqb", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores, MASKED_SCORE)
        peak = jnp.maximum(self.peak, scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp(scores - peak), jnp.exp(self.peak - peak)
        out = jnp.einsum("nkqb,nkbc->nkqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return _Running(peak, self.total * shrink + weights.sum(-1, keepdims=True), self.out * shrink + out)

    def merge(self, other: _Running) -> _Running:
        """Softmax over the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        a, b = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return _Running(peak, self.total * a + other.total * b, self.out * a + other.out * b)


def look_at(
    shared: tuple[Shared, ...], rollout_M: jax.Array | None, own: Blocks, step: jax.Array, counts_M: jax.Array
) -> Look:
    """Attention of each live rollout's new token over what it shares, its own last tokens, and itself.

    Args:
      shared: what several rollouts look at, a part each.
      rollout_M: int32, which of all rollouts is in each slot; out of range where a slot is idle. None: every slot has a row
        of its own in each part, in their order.
      own: a ring over decode steps, the same for all rollouts whenever they began: writing it takes no scatter.
      step: the number of this decode step, whose keys are not written yet.
      counts_M: int32, how many of the last steps belong to each rollout.
    """
    levels = [(level, *_places(level, rollout_M)) for level in shared]

    def look(layer: jax.Array | int, q_MxKx1xRx1xC: jax.Array, new: KeyValues) -> jax.Array:
        q = q_MxKx1xRx1xC[:, :, 0, :, 0]
        q = q * q.shape[-1] ** -0.5
        itself = jnp.einsum("mkrc,mkc->mkr", q, new.k[:, :, 0, 0], preferred_element_type=jnp.float32)[..., None]
        value = jnp.broadcast_to(new.v[:, :, 0].astype(jnp.float32), q.shape)
        running = _over_own(_Running(itself, jnp.ones_like(itself), value), q, own, layer, step, counts_M)
        for level, places_M, grid in levels:
            running = running.merge(_over_shared(q, level, layer, places_M, grid))
        return (running.out / running.total).astype(q.dtype)[:, :, None, :, None]

    return look


def _places(
    shared: Shared, rollout_M: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]] | tuple[None, None]:
    """The place of each slot in the grid; and of each place the slot that is there, and how many keys it sees, 0 without one."""
    if rollout_M is None:
        return None, None
    n, width = shared.end_NxW.shape
    places_M = shared.place_R.at[rollout_M].get(mode="fill", fill_value=n * width)
    slots = jnp.zeros(n * width, jnp.int32).at[places_M].set(jnp.arange(len(places_M)), mode="drop")
    taken = jnp.zeros(n * width, bool).at[places_M].set(True, mode="drop")
    return places_M, (slots, jnp.where(taken.reshape(n, width), shared.end_NxW, 0))


@jax.named_scope("own_cache_blocks")
def _over_own(
    running: _Running, q: jax.Array, own: Blocks, layer: jax.Array | int, step: jax.Array, counts_M: jax.Array
) -> _Running:
    blocks, size = own.k.shape[1], own.size

    def add(i: jax.Array, running: _Running) -> _Running:
        index = i % blocks
        age_B = (step - 1 - index * size - jnp.arange(size)) % (blocks * size)
        seen_MxB = age_B < counts_M[:, None]
        return running.add(q, *own.block(layer, index), seen_MxB[:, None, None])

    if blocks == 1:  # A loop costs more than what it may save.
        return add(jnp.int32(0), running)
    first, last = (step - counts_M.max()) // size, -(-step // size)
    # The oldest and the newest keys may lie in the same block, which is gone over once.
    return jax.lax.fori_loop(first, jnp.minimum(last, first + blocks), add, running)


@jax.named_scope("shared_cache_blocks")
def _over_shared(
    q: jax.Array,
    shared: Shared,
    layer: jax.Array | int,
    places_M: jax.Array | None,
    grid: tuple[jax.Array, jax.Array] | None,
) -> _Running:
    """Go over each row's keys once for all of its rollouts."""
    slots, end_NxW = grid or (None, shared.end_NxW)
    (n, width), (_, kv_heads, group, c), keys = end_NxW.shape, q.shape, shared.blocks
    rows = q if slots is None else q[slots]
    rows = rows.reshape(n, width, kv_heads, group, c).transpose(0, 2, 1, 3, 4).reshape(n, kv_heads, -1, c)
    end_NxQ = jnp.repeat(end_NxW, group, axis=1)[:, None, :, None]

    def add(i: jax.Array, running: _Running) -> _Running:
        seen = i * keys.size + jnp.arange(keys.size) < end_NxQ
        return running.add(rows, *keys.block(layer, i), seen)

    peak = jnp.full((*rows.shape[:-1], 1), MASKED_SCORE, jnp.float32)
    running = _Running(peak, jnp.zeros_like(peak), jnp.zeros(rows.shape, jnp.float32))
    running = jax.lax.fori_loop(0, -(-end_NxW.max() // keys.size), add, running)

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(n, kv_heads, width, group, -1).transpose(0, 2, 1, 3, 4).reshape(n * width, kv_heads, group, -1)
        return x if places_M is None else x.at[places_M].get(mode="clip")

    return jax.tree.map(back, running)
