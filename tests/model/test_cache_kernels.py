"""Attention over a KV cache: the kernels and plain XLA against NumPy, lowered for their platforms, and what they read."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.attention.blocked_cache import BlockedCache, CacheOrder, CacheSizes, make_cache_ranges
from rpt_jax.model.attention.cache_mosaic import attend_cache_mosaic, cached_attention_bytes
from rpt_jax.model.attention.dispatch import KERNELS
from tests.helpers.cached_rows import (
    BLOCKWISE,
    INTERPRETED,
    ORDERS,
    CacheShape,
    attended_keys,
    check_kernel,
    make_example,
)
from tests.helpers.pallas_blocks import copied_bytes
from tests.helpers.parameters import mostly_slow

SMALL = CacheShape(layers=2, blocks=3, rows=5, kv_heads=2, block=16, head_size=16, queries=3, dtype="float32")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", INTERPRETED)
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_the_kernels_equal_numpy(name, seed):
    """More shapes in tests/slow/test_cache_kernels.py."""
    check_kernel(INTERPRETED[name], SMALL, seed, ORDERS[name])


@settings(max_examples=2, deadline=None)
@given(seed=SEEDS)
def test_the_tpu_kernel_equals_numpy_if_keys_fill_registers(seed):
    """Then keys and values are separated in the kernel."""
    check_kernel(INTERPRETED["tpu_kernels"], SMALL._replace(head_size=128), seed, "joined")


@pytest.mark.parametrize("order", typing.get_args(CacheOrder))
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_plain_xla_equals_numpy(order, seed):
    check_kernel(BLOCKWISE, SMALL, seed, order)


@pytest.mark.parametrize(("max_group_rows", "group_rows"), [(9, 5), (1, 1), (2, 2), (4, 3), (None, None)])
@pytest.mark.parametrize("seed", range(5))
def test_a_group_visits_the_blocks_that_its_rows_attend_to(seed, max_group_rows, group_rows):
    example = make_example(SMALL, seed)
    keys = np.zeros((1, SMALL.blocks, 1, 1, SMALL.block, 1))
    cache = BlockedCache(k=keys, v=keys, order="separate")
    ranges = make_cache_ranges(example.begin_N, example.length_NxQ, cache, max_group_rows)
    attended_NxJ = attended_keys(example, SMALL.size).any(axis=1).reshape(SMALL.rows, SMALL.blocks, -1).any(axis=-1)
    if group_rows is None:
        attended_NxJ = attended_NxJ.any(axis=0, keepdims=True)
    first_rows = range(0, len(attended_NxJ), group_rows or 1)
    groups = zip(first_rows, ranges.row_GxV, ranges.block_GxV, ranges.visits_G, strict=True)
    for first, row_V, block_V, visits in groups:
        rows, blocks = np.nonzero(attended_NxJ[first : first + (group_rows or 1)])
        assert list(row_V[:visits]) == list(first + rows)
        assert list(block_V[:visits]) == list(blocks)


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float32"], "bfloat16"))
@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [("tpu_kernels", "tpu", "tpu_custom_call"), ("gpu_kernels", "cuda", "__gpu$xla.gpu.triton")],
)
def test_the_kernels_lower_for_their_platform(name, platform, call, dtype):
    rows, kv_heads, num_queries, head_size = 6, 2, 7, 64
    kernel = KERNELS[name].cache
    keys = jax.ShapeDtypeStruct((3, 4, rows, kv_heads, 128, head_size), dtype)

    def attend(q, k, v, begin_N, length_NxQ, layer):
        cache = BlockedCache.of(k, v, ORDERS[name])
        ranges = make_cache_ranges(begin_N, length_NxQ, cache, max_group_rows=1)
        return kernel.attend(q, cache, layer, ranges)

    # Without a GPU, jax 0.12 lowers Triton kernels for the device of the mesh only.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(attend).trace(
            jax.ShapeDtypeStruct((rows, kv_heads, num_queries, head_size), dtype),
            keys,
            keys,
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows, num_queries), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) == 1


@pytest.mark.parametrize("max_group_rows", [1, 2])
@pytest.mark.parametrize(("first", "end"), [(0, 6), (0, 3), (2, 4), (3, 5), (4, 6)])
@pytest.mark.parametrize(("head_size", "block"), [(16, 1024), (64, 1024), (128, 512)])
def test_what_the_tpu_kernel_moves_is_what_its_block_specs_say(head_size, block, first, end, max_group_rows):
    """Rows outside of a range have no keys to attend to."""
    # A step has at most two visits, because a block has 512 KiB.
    shape = SMALL._replace(rows=6, blocks=4, kv_heads=1, block=block, head_size=head_size)
    example = make_example(shape, 1)
    example.length_NxQ[:first] = 0
    example.length_NxQ[end:] = 0
    keys = jnp.zeros((shape.layers, shape.blocks, shape.rows, shape.kv_heads, shape.block, shape.head_size))
    cache = BlockedCache.of(keys, keys, "joined")
    ranges = make_cache_ranges(example.begin_N, example.length_NxQ, cache, max_group_rows)
    jaxpr = jax.make_jaxpr(lambda q: attend_cache_mosaic(q, cache, 1, ranges))(example.q_NxKxQxC)
    [kernel] = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    steps = -(-int(ranges.visits_G.max()) // 2)
    grid = range(len(ranges.visits_G)), range(max(1, steps))
    moved = copied_bytes(
        kernel, grid, (jnp.array([1]), ranges.begin_N, ranges.visits_G, ranges.row_GxV, ranges.block_GxV)
    )
    sizes = CacheSizes(
        num_queries=shape.queries,
        block=shape.block,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        itemsize=4,
    )
    expected = cached_attention_bytes(sizes, rows=shape.rows, visits=int(ranges.visits_G.sum()))
    # A group with fewer visits than a step copies a block for all visits of the step.
    more = int(np.maximum(2 - ranges.visits_G, 0).sum()) * sizes.block_bytes
    assert moved == pytest.approx(expected + more)
