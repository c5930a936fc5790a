"""Attention over a KV cache: the kernels and plain XLA against NumPy, lowered for their platforms, and what they read."""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from rpt_jax.model.attention.blocked_cache import CacheOrder, CacheSizes, make_cache_ranges
from rpt_jax.model.attention.cache_mosaic import attend_token_mosaic, own_cache_bytes, shared_cache_bytes
from rpt_jax.model.attention.dispatch import KERNELS, KeyValues
from rpt_jax.rollout.kv_cache import SharedCache, cached_attention, shared_reads
from tests.helpers.cached_rows import (
    BLOCKWISE,
    INTERPRETED,
    ORDERS,
    CacheShape,
    Shared,
    attended_keys,
    attention,
    check_kernel,
    make_example,
    to_cache,
)
from tests.helpers.pallas_blocks import copied_bytes
from tests.helpers.parameters import mostly_slow

SMALL = CacheShape(
    layers=2,
    slots=5,
    kv_heads=2,
    heads_per_kv=3,
    head_size=16,
    blocks=2,
    block=16,
    shared=(Shared(rows=4, width=3, blocks=2, block=32),),
    dtype="float32",
)
# Without a shared cache, with one that has a row for each slot, and with roots and prompts.
CACHES = {
    "prompts": SMALL,
    "none": SMALL._replace(shared=()),
    "row per slot": SMALL._replace(shared=(Shared(rows=5, width=1, blocks=2, block=32),)),
    "roots and prompts": SMALL._replace(
        shared=(Shared(rows=1, width=6, blocks=2, block=16), Shared(rows=3, width=2, blocks=2, block=16))
    ),
}
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("shared", mostly_slow(CACHES, "roots and prompts"))
@pytest.mark.parametrize("name", INTERPRETED)
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_the_kernels_equal_numpy(name, shared, seed):
    """More shapes in tests/slow/test_cache_kernels.py."""
    check_kernel(INTERPRETED[name], CACHES[shared], seed, ORDERS[name])


@settings(max_examples=2, deadline=None)
@given(seed=SEEDS)
def test_the_tpu_kernel_equals_numpy_if_keys_fill_registers(seed):
    """Then keys and values are separated in the kernel."""
    check_kernel(INTERPRETED["tpu_kernels"], SMALL._replace(head_size=128), seed, "joined")


@pytest.mark.parametrize("cores", mostly_slow([1, 2], 1))
def test_the_tpu_kernels_wait_for_their_copies_and_stay_within_arrays(cores, capfd):
    """With a copy done as late as it may be, NaN in memory that was not written, and the groups split over cores."""
    simulated = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=cores
    )
    attend = functools.partial(attend_token_mosaic, interpret=simulated)
    kernel = INTERPRETED["tpu_kernels"]._replace(attend=attend)
    for seed in (0, 1):  # Groups of one row and of two rows.
        check_kernel(kernel, CACHES["roots and prompts"], seed, "joined")
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.parametrize("shared", CACHES)
@pytest.mark.parametrize("order", typing.get_args(CacheOrder))
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_plain_xla_equals_numpy(order, shared, seed):
    check_kernel(BLOCKWISE, CACHES[shared], seed, order)


@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_a_row_that_many_rollouts_share_is_read_in_parts(seed):
    rows, width, keys = 2, 5, 32
    example = make_example(SMALL._replace(shared=(Shared(rows, width, 1, keys),)), seed)
    new = KeyValues(example.k_MxKxC[:, :, None, None], example.v_MxKxC[:, :, None, None])
    q = example.q_MxKxRxC[:, :, None, :, None]
    own = to_cache(example.own, SMALL.block, "float32", "joined")
    shared = to_cache(example.shared[0], keys, "float32", "joined")
    cache = SharedCache(shared, example.shared[0].length_NxW, jnp.arange(rows * width))

    def attend(kernel):
        reads = shared_reads(cache, example.index_M[0], SMALL.heads_per_kv, kernel)
        counts_M = example.own.length_NxW[:, 0]
        attention = cached_attention((reads,), own, jnp.int32(7), counts_M, SMALL.heads_per_kv, kernel)
        return reads.ranges.length_NxW.shape, attention(1, q, new)

    # Queries and results of a rollout take 8 KiB for each of two kv heads.
    whole, expected = attend(BLOCKWISE)
    parts, ours = attend(INTERPRETED["tpu_kernels"]._replace(shared_group_bytes=2 * 2**14))
    assert whole == (2, 5) and parts == (6, 2)
    live = example.index_M[0] < rows * width
    np.testing.assert_allclose(ours[live], expected[live], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("max_group_rows", "group_rows"), [(9, 5), (1, 1), (2, 2), (4, 3), (None, None)])
@pytest.mark.parametrize("seed", range(5))
def test_a_group_visits_the_blocks_that_its_rows_attend_to(seed, max_group_rows, group_rows):
    row = make_example(SMALL, seed).own
    cache = to_cache(row, SMALL.block, "float32", "separate")
    ranges = make_cache_ranges(row.begin_N, row.length_NxW, cache, max_group_rows)
    attended_NxJ = attended_keys(row).any(axis=1).reshape(SMALL.slots, SMALL.blocks, -1).any(axis=-1)
    if group_rows is None:
        attended_NxJ = attended_NxJ.any(axis=0, keepdims=True)
    first_rows = range(0, len(attended_NxJ), group_rows or 1)
    for first, visit_V, visits in zip(first_rows, ranges.visit_GxV, ranges.visits_G, strict=True):
        rows, blocks = np.nonzero(attended_NxJ[first : first + (group_rows or 1)])
        assert list(visit_V[:visits]) == list((first + rows) * SMALL.blocks + blocks)


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float32"], "bfloat16"))
@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [("tpu_kernels", "tpu", "tpu_custom_call"), ("gpu_kernels", "cuda", "__gpu$xla.gpu.triton")],
)
def test_the_kernels_lower_for_their_platform(name, platform, call, dtype):
    shape = CacheShape(3, 6, 2, 7, 64, 4, 128, (Shared(rows=4, width=3, blocks=2, block=128),), dtype)
    kernel = KERNELS[name].cache
    example = jax.tree.map(jnp.asarray, make_example(shape, 0))
    attend = attention(kernel, shape, ORDERS[name], max_group_rows=1)

    # Without a GPU, jax 0.12 lowers Triton kernels for the device of the mesh only.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = attend.trace(example, jax.ShapeDtypeStruct((), jnp.int32))
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) == 2


@pytest.mark.parametrize("max_group_rows", [1, 2])
@pytest.mark.parametrize(("first", "end"), [(0, 6), (0, 3), (2, 4), (3, 5), (4, 6)])
@pytest.mark.parametrize(("head_size", "block"), [(16, 1024), (64, 1024), (128, 512)])
def test_what_the_tpu_kernels_move_is_what_their_block_specs_say(head_size, block, first, end, max_group_rows):
    """Rows outside of a range have no keys to attend to."""
    # A step has at most two visits, because a block has 512 KiB.
    slots = 6
    shared = Shared(rows=slots, width=1, blocks=4, block=block)
    shape = SMALL._replace(slots=slots, blocks=4, kv_heads=1, block=block, head_size=head_size, shared=(shared,))
    example = make_example(shape, 1)
    for row in (example.own, *example.shared):
        row.length_NxW[:first] = 0
        row.length_NxW[end:] = 0
    run = attention(INTERPRETED["tpu_kernels"], shape, "joined", max_group_rows)
    calls = [
        e for e in jax.make_jaxpr(run)(example, 1).eqns[0].params["jaxpr"].eqns if e.primitive.name == "pallas_call"
    ]
    sizes = CacheSizes(shape.heads_per_kv, block, kv_heads=1, head_size=head_size, itemsize=4)

    for kernel, row in zip(calls, (example.shared[0], example.own), strict=True):
        cache = to_cache(row, block, "float32", "joined")
        ranges = make_cache_ranges(row.begin_N, row.length_NxW, cache, max_group_rows)
        slot_M = jnp.arange(slots)
        lengths = jnp.asarray(row.length_NxW.reshape(-1))
        scalars = (jnp.array([1]), ranges.begin_N, ranges.visits_G, ranges.visit_GxV.reshape(-1), lengths, slot_M)
        grid = range(len(ranges.visits_G)), range(max(1, -(-int(ranges.visits_G.max()) // 2)))
        moved = copied_bytes(kernel, grid, scalars)
        visits = int(ranges.visits_G.sum())
        # A group with fewer visits than a step copies a block for all visits of the step.
        moved -= int(np.maximum(2 - ranges.visits_G, 0).sum()) * sizes.block_bytes
        if row is example.own:
            expected = own_cache_bytes(sizes, slots=slots, visits=visits, shared_caches=1)
        else:
            # The specs stand for whole arrays, of which the kernel copies each slot's part itself.
            expected = shared_cache_bytes(sizes, rollouts=slots, visits=visits)
        assert moved == pytest.approx(expected)
