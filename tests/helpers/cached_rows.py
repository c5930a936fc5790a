"""Random KV caches, and attention over them by the kernels in interpret mode against NumPy."""

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
    PartialSoftmax,
    attend_cache_blockwise,
    make_cache_ranges,
)
from rpt_jax.model.attention.cache_mosaic import attend_cache_mosaic
from rpt_jax.model.attention.cache_triton import attend_cache_triton
from rpt_jax.model.attention.dispatch import KERNELS, CacheKernel

INTERPRETED = {
    "gpu_kernels": KERNELS["gpu_kernels"].cache._replace(attend=functools.partial(attend_cache_triton, interpret=True)),
    "tpu_kernels": KERNELS["tpu_kernels"].cache._replace(attend=functools.partial(attend_cache_mosaic, interpret=True)),
}
ORDERS: dict[str, CacheOrder] = {"gpu_kernels": "separate", "tpu_kernels": "joined"}
BLOCKWISE = CacheKernel(attend_cache_blockwise, dtypes=("bfloat16", "float32"), max_group_bytes=None)
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2}


class CacheShape(NamedTuple):
    """Sizes of an example."""

    layers: int
    blocks: int
    rows: int
    kv_heads: int
    block: int
    head_size: int
    queries: int
    dtype: str

    @property
    def size(self) -> int:
        """Keys per row."""
        return self.blocks * self.block


class Example(NamedTuple):
    """Scaled queries, keys and values without blocks, and which keys each query attends to."""

    q_NxKxQxC: np.ndarray
    k_LxNxKxSxC: np.ndarray
    v_LxNxKxSxC: np.ndarray
    begin_N: np.ndarray
    length_NxQ: np.ndarray


def make_example(shape: CacheShape, seed: int) -> Example:
    """Draw ranges of any length, many of them empty, full, or at a block's boundary; some rows have none at all."""
    rng = np.random.default_rng(seed)
    queries = (shape.rows, shape.kv_heads, shape.queries, shape.head_size)
    keys = (shape.layers, shape.rows, shape.kv_heads, shape.size, shape.head_size)

    def normal(dims: tuple[int, ...]) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.standard_normal(dims), shape.dtype), np.float32)

    length = rng.integers(0, rng.integers(0, shape.size + 1, (shape.rows, 1)) + 1, (shape.rows, shape.queries))
    length[rng.random(shape.rows) < 0.2] = 0
    length[rng.random(shape.rows) < 0.2] = shape.size
    begin = rng.integers(0, shape.size, shape.rows)
    begin = np.where(rng.random(shape.rows) < 0.3, begin // shape.block * shape.block, begin)
    return Example(normal(queries), normal(keys), normal(keys), begin.astype(np.int32), length.astype(np.int32))


def attended_keys(example: Example, size: int) -> np.ndarray:
    """Return which of its row's keys each query attends to, bool [N, Q, S]."""
    after_begin_NxS = (np.arange(size) - example.begin_N[:, None]) % size
    return after_begin_NxS[:, None] < example.length_NxQ[..., None]


def to_cache(k_LxNxKxSxC: Any, v_LxNxKxSxC: Any, block: int, dtype: str, order: CacheOrder) -> BlockedCache:
    """Divide keys and values into blocks."""

    def split(x: Any) -> jax.Array:
        layers, n, kv_heads, _, c = x.shape
        return jnp.asarray(x, dtype).reshape(layers, n, kv_heads, -1, block, c).transpose(0, 3, 1, 2, 4, 5)

    return BlockedCache.of(split(k_LxNxKxSxC), split(v_LxNxKxSxC), order)


@functools.cache
def attention(
    kernel: CacheKernel, shape: CacheShape, order: CacheOrder, max_group_rows: int | None
) -> Callable[..., PartialSoftmax]:
    """Return the compiled function from the arrays of an example and a layer to the result."""

    def run(example: Example, layer: jax.Array) -> PartialSoftmax:
        cache = to_cache(example.k_LxNxKxSxC, example.v_LxNxKxSxC, shape.block, shape.dtype, order)
        ranges = make_cache_ranges(example.begin_N, example.length_NxQ, cache, max_group_rows)
        return kernel.attend(jnp.asarray(example.q_NxKxQxC, shape.dtype), cache, layer, ranges)

    return jax.jit(run)


def check_kernel(kernel: CacheKernel, shape: CacheShape, seed: int, order: CacheOrder) -> None:
    """Assert that the result equals NumPy's, with NaN in all blocks that no row attends to, and in two more rows."""
    example = make_example(shape, seed)
    layer = seed % shape.layers
    attended_NxQxS = attended_keys(example, shape.size)

    # Poison other layers, and blocks that are not read.
    unread_J = ~attended_NxQxS.any(axis=(0, 1)).reshape(shape.blocks, shape.block).any(axis=1)
    poison_LxS = (np.arange(shape.layers) != layer)[:, None] | np.repeat(unread_J, shape.block)
    k, v = (np.where(poison_LxS[:, None, None, :, None], np.nan, x) for x in example[1:3])
    k, v = (np.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0), (0, 0)), constant_values=np.nan) for x in (k, v))
    max_group_rows = {None: None, 0: 1}.get(kernel.max_group_bytes, 1 + seed % 4)
    ours = attention(kernel, shape, order, max_group_rows)(example._replace(k_LxNxKxSxC=k, v_LxNxKxSxC=v), layer)
    assert all(x.dtype == jnp.float32 for x in ours)

    # The definition, in float64.
    q, k, v = (
        x.astype(np.float64) for x in (example.q_NxKxQxC, example.k_LxNxKxSxC[layer], example.v_LxNxKxSxC[layer])
    )
    scores = np.where(attended_NxQxS[:, None], np.einsum("nkqc,nksc->nkqs", q, k), -np.inf)
    has_keys = np.broadcast_to((example.length_NxQ > 0)[:, None], scores.shape[:-1])
    peak = np.where(has_keys, scores.max(axis=-1), 0)[..., None]
    weights = np.exp(scores - peak)
    total = np.where(has_keys[..., None], weights.sum(axis=-1, keepdims=True), 1)
    out = np.einsum("nkqs,nksc->nkqc", weights, v) / total

    tolerance = TOLERANCES[shape.dtype]
    ours_peak, ours_total, ours_out = (np.asarray(x, np.float64) for x in ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalized = ours_out / ours_total
        log_total = ours_peak + np.log(ours_total)
    np.testing.assert_allclose(normalized[has_keys], out[has_keys], atol=tolerance * max(1, np.abs(out).max()))
    np.testing.assert_allclose(log_total[has_keys], (peak + np.log(total))[has_keys], atol=tolerance * 10)
    # Merging with any other result leaves nothing of queries without keys.
    assert (ours_peak[~has_keys] < -1e29).all() and np.isfinite(ours_out[~has_keys]).all()
