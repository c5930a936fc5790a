"""Random KV caches, and attention of a decode step over them by each implementation against NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.model.attention.blocked_cache import (
    BlockedCache,
    CacheOrder,
    CacheReads,
    SlotGrid,
    make_cache_ranges,
)
from rpt_jax.model.attention.cache_mosaic import attend_token_mosaic
from rpt_jax.model.attention.cache_triton import attend_token_triton
from rpt_jax.model.attention.dispatch import KERNELS, CacheKernel, cache_kernel

INTERPRETED = {
    "gpu_kernels": KERNELS["gpu_kernels"].cache._replace(attend=functools.partial(attend_token_triton, interpret=True)),
    "tpu_kernels": KERNELS["tpu_kernels"].cache._replace(attend=functools.partial(attend_token_mosaic, interpret=True)),
}
ORDERS: dict[str, CacheOrder] = {"gpu_kernels": "separate", "tpu_kernels": "joined"}
BLOCKWISE = cache_kernel("blockwise", "float32")
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}


class Shared(NamedTuple):
    """Sizes of a cache that rollouts share."""

    rows: int
    width: int
    blocks: int
    block: int


class CacheShape(NamedTuple):
    """Sizes of an example."""

    layers: int
    slots: int
    kv_heads: int
    heads_per_kv: int
    head_size: int
    blocks: int
    block: int
    shared: tuple[Shared, ...]
    dtype: str


class PlainCache(NamedTuple):
    """Keys and values of a cache without blocks, [L, N, K, S, C], and which keys each rollout attends to."""

    k: Any
    v: Any
    begin_N: Any
    length_NxW: Any


class Example(NamedTuple):
    """Scaled queries, keys and values of the new tokens, and the caches. An idle slot has an index beyond every cache."""

    q_MxKxRxC: Any
    k_MxKxC: Any
    v_MxKxC: Any
    own: PlainCache
    shared: tuple[PlainCache, ...]
    index_M: tuple[Any, ...]


def make_example(shape: CacheShape, seed: int) -> Example:
    """Draw ranges of any length, many of them empty, full, or at a block's boundary; some slots are idle."""
    rng = np.random.default_rng(seed)

    def normal(*dims: int) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.standard_normal(dims), shape.dtype), np.float32)

    def row(rows: int, width: int, blocks: int, block: int, is_ring: bool) -> PlainCache:
        size = blocks * block
        length = rng.integers(0, rng.integers(0, size + 1, (rows, 1)) + 1, (rows, width))
        length[rng.random(rows) < 0.2] = 0
        length[rng.random(rows) < 0.2] = size
        begin = rng.integers(0, size if is_ring else 1, rows)
        begin = np.where(rng.random(rows) < 0.3, begin // block * block, begin)
        dims = (shape.layers, rows, shape.kv_heads, size, shape.head_size)
        return PlainCache(normal(*dims), normal(*dims), begin.astype(np.int32), length.astype(np.int32))

    own = row(shape.slots, 1, shape.blocks, shape.block, is_ring=True)
    shared = tuple(row(*sizes, is_ring=False) for sizes in shape.shared)
    idle = rng.random(shape.slots) < 0.3
    own.length_NxW[idle] = 0
    index_M = tuple(
        np.where(idle, 2**30, rng.permutation(s.rows * s.width)[: shape.slots]).astype(np.int32) for s in shape.shared
    )
    heads = shape.slots, shape.kv_heads
    q = normal(*heads, shape.heads_per_kv, shape.head_size)
    k, v = normal(*heads, shape.head_size), normal(*heads, shape.head_size)
    return Example(q, k, v, own, shared, index_M)


def attended_keys(row: PlainCache) -> np.ndarray:
    """Return which keys of its row each rollout attends to, bool [N, W, S]."""
    size = row.k.shape[3]
    after_begin_NxS = (np.arange(size) - row.begin_N[:, None]) % size
    return after_begin_NxS[:, None] < row.length_NxW[..., None]


def to_cache(row: PlainCache, block: int, dtype: str, order: CacheOrder) -> BlockedCache:
    """Divide keys and values into blocks."""

    def split(x: Any) -> jax.Array:
        layers, n, kv_heads, _, c = x.shape
        return jnp.asarray(x, dtype).reshape(layers, n, kv_heads, -1, block, c).transpose(0, 3, 1, 2, 4, 5)

    return BlockedCache.of(split(row.k), split(row.v), order)


@functools.cache
def attention(
    kernel: CacheKernel, shape: CacheShape, order: CacheOrder, max_group_rows: int | None
) -> Callable[[Example, jax.Array | int], jax.Array]:
    """Return the compiled function from an example and a layer to the result."""

    def reads(row: PlainCache, block: int, index_M: jax.Array | None) -> CacheReads:
        cache = to_cache(row, block, shape.dtype, order)
        length_NxW = row.length_NxW
        grid = None
        if index_M is not None:
            grid = SlotGrid.of(index_M, *length_NxW.shape)
            length_NxW = jnp.where(grid.slot_NxW >= 0, length_NxW, 0)
        return CacheReads(cache, grid, make_cache_ranges(row.begin_N, length_NxW, cache, max_group_rows))

    def run(example: Example, layer: jax.Array | int) -> jax.Array:
        q, k, v = (jnp.asarray(x, shape.dtype) for x in example[:3])
        shared = tuple(
            # A cache that has a row for each slot needs no grid.
            reads(row, sizes.block, None if sizes[:2] == (shape.slots, 1) else index_M)
            for row, sizes, index_M in zip(example.shared, shape.shared, example.index_M, strict=True)
        )
        return kernel.attend(q, k, v, shared, reads(example.own, shape.block, None), layer)

    return jax.jit(run)


def check_kernel(kernel: CacheKernel, shape: CacheShape, seed: int, order: CacheOrder) -> None:
    """Assert that the result equals NumPy's, with NaN in all blocks that no rollout attends to.

    The cache of the own tokens has two more rows of NaN, as it has after the live batch has shrunk.
    """
    example = make_example(shape, seed)
    layer = seed % shape.layers
    for sizes, index_M in zip(shape.shared, example.index_M, strict=True):
        if sizes[:2] == (shape.slots, 1):
            index_M[:] = np.arange(shape.slots)

    # Poison other layers, and blocks that are not read.
    def poison(row: PlainCache, block: int, more_rows: int) -> PlainCache:
        unread_J = ~attended_keys(row).any(axis=(0, 1)).reshape(-1, block).any(axis=1)
        poison_LxS = (np.arange(shape.layers) != layer)[:, None] | np.repeat(unread_J, block)
        k, v = (np.where(poison_LxS[:, None, None, :, None], np.nan, x) for x in row[:2])
        k, v = (np.pad(x, ((0, 0), (0, more_rows), (0, 0), (0, 0), (0, 0)), constant_values=np.nan) for x in (k, v))
        return row._replace(k=k, v=v)

    poisoned = example._replace(
        own=poison(example.own, shape.block, more_rows=2),
        shared=tuple(
            poison(row, sizes.block, more_rows=0) for row, sizes in zip(example.shared, shape.shared, strict=True)
        ),
    )
    max_group_rows = {None: None, 0: 1}.get(kernel.own_group_bytes, 1 + seed % 4)
    ours_MxKxRxC = attention(kernel, shape, order, max_group_rows)(poisoned, layer)
    assert ours_MxKxRxC.dtype == shape.dtype
    # Idle slots write their keys to the cache, where weights of zero have to remove them.
    ours_MxKxRxC = np.asarray(ours_MxKxRxC, np.float64)
    assert np.isfinite(ours_MxKxRxC).all()

    # The definition, in float64.
    attended_NxWxS = attended_keys(example.own), *(attended_keys(row) for row in example.shared)
    for slot in range(shape.slots):
        entries = [(slot, 0)]
        for sizes, index_M in zip(shape.shared, example.index_M, strict=True):
            entries.append(divmod(int(index_M[slot]), sizes.width))
        if any(n >= len(mask) for (n, _), mask in zip(entries, attended_NxWxS, strict=True)):
            continue  # The slot is idle.
        keys, values = [example.k_MxKxC[slot, :, None]], [example.v_MxKxC[slot, :, None]]
        for row, (n, w), mask in zip((example.own, *example.shared), entries, attended_NxWxS, strict=True):
            keys.append(row.k[layer, n][:, mask[n, w]])
            values.append(row.v[layer, n][:, mask[n, w]])
        k_KxSxC, v_KxSxC = (np.concatenate(x, axis=1).astype(np.float64) for x in (keys, values))
        scores_KxRxS = np.einsum("krc,ksc->krs", example.q_MxKxRxC[slot].astype(np.float64), k_KxSxC)
        weights = np.exp(scores_KxRxS - scores_KxRxS.max(-1, keepdims=True))
        expected = np.einsum("krs,ksc->krc", weights / weights.sum(-1, keepdims=True), v_KxSxC)
        np.testing.assert_allclose(
            ours_MxKxRxC[slot], expected, atol=TOLERANCES[shape.dtype] * max(1, np.abs(expected).max())
        )
