"""The kernels for packed rows: against the plain reference in interpret mode, lowered for their platforms, and what they read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.attention.key_ranges import ROW_BLOCK_SIZES, make_key_ranges, row_size
from rpt_jax.model.attention.packed import attend_packed
from rpt_jax.model.attention.packed_mosaic import attend_mosaic, packed_attention_bytes
from tests.helpers.packed_rows import RowShape, check_kernels, make_example
from tests.helpers.pallas_blocks import copied_bytes
from tests.helpers.parameters import mostly_slow

SMALL = RowShape(rows=2, kv_heads=1, heads=2, blocks=3, block=16, ranges=2, head_size=16, dtype="float32")


@pytest.mark.parametrize("name", ["mosaic", "triton"])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_kernels_equal_the_reference(name, seed):
    """Forward and backward; more shapes in tests/slow/test_packed_kernels.py."""
    check_kernels(name, SMALL, seed)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("tokens", [100, 5000, 18_432])
def test_a_row_has_whole_blocks_and_little_padding(platform, tokens):
    size = row_size(tokens, platform)
    assert size % min(size, ROW_BLOCK_SIZES[platform]) == 0
    assert tokens <= size < tokens + 512


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_blocks_are_visited_by_their_own_block(seed):
    example = make_example(SMALL, seed)
    index_W = np.arange(SMALL.size)
    ranges_NxMxW = zip(example.begin_NxMxW, example.end_NxMxW, strict=True)
    key_ranges = make_key_ranges(example.begin_NxMxW, example.end_NxMxW, SMALL.block)
    for n, (begin_MxW, end_MxW) in enumerate(ranges_NxMxW):
        attended_WxW = ((begin_MxW[..., None] <= index_W) & (index_W < end_MxW[..., None])).any(axis=0)
        paired_BxB = attended_WxW.reshape(SMALL.blocks, SMALL.block, SMALL.blocks, SMALL.block).any(axis=(1, 3))
        for pairs, expected_BxB in ((key_ranges.by_query, paired_BxB), (key_ranges.by_key, paired_BxB.T)):
            visits = range(pairs.visits_N[n])
            listed = [(int(pairs.own_NxT[n, t]), int(pairs.other_NxT[n, t])) for t in visits]
            assert [own for own, _ in listed] == sorted(own for own, _ in listed)
            # A block that is paired with none is visited all the same.
            empty = [own for own in range(SMALL.blocks) if not expected_BxB[own].any()]
            assert {own for own, _ in listed} == set(range(SMALL.blocks))
            assert [pair for pair in listed if pair[0] not in empty] == list(
                map(tuple, np.argwhere(expected_BxB).tolist())
            )
            assert pairs.counts_NxB[n].tolist() == expected_BxB.sum(axis=1).tolist()
            assert [listed[first][0] for first in pairs.first_NxB[n]] == list(range(SMALL.blocks))


@pytest.mark.parametrize("dtype", mostly_slow([jnp.bfloat16, jnp.float32], jnp.bfloat16))
@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [("tpu_kernels", "tpu", "tpu_custom_call"), ("gpu_kernels", "cuda", "__gpu$xla.gpu.triton")],
)
def test_the_kernels_lower_for_their_platform(name, platform, call, dtype):
    """Forward and both parts of the backward pass."""
    rows, kv_heads, heads, size, head_size = 2, 2, 3, 256, 96
    queries = jax.ShapeDtypeStruct((rows, kv_heads, 1, heads, size, head_size), dtype)
    keys = jax.ShapeDtypeStruct((rows, kv_heads, 1, size, head_size), dtype)
    ranges = jax.ShapeDtypeStruct((rows, 3, size), jnp.int32)

    def gradients(q, k, v, begin, end):
        key_ranges = make_key_ranges(begin, end, 128 if platform == "tpu" else 64)
        return jax.grad(lambda *x: attend_packed(*x, key_ranges, name).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            q, k, v
        )

    # Without a GPU, jax 0.12 lowers Triton kernels for the device of the mesh only.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients).trace(queries, keys, keys, ranges, ranges)
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) == 3


def test_what_the_kernels_move_is_what_their_block_specs_say():
    shape = SMALL._replace(rows=1, kv_heads=2)
    example = make_example(shape, 0)
    arrays = [example.arrays[name] for name in ("q", "k", "v")]
    key_ranges = make_key_ranges(example.begin_NxMxW, example.end_NxMxW, shape.block)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: attend_mosaic(*x, key_ranges).sum(), argnums=(0, 1, 2)))(*arrays)
    kernels = {str(e.params["name"]): e for e in jaxpr.eqns if e.primitive.name == "pallas_call"}
    expected = packed_attention_bytes(key_ranges, heads_per_kv=shape.heads, head_size=shape.head_size, itemsize=4)
    assert kernels.keys() == expected.keys()
    for name, kernel in kernels.items():
        pairs = key_ranges.by_key if name == "packed_attention_key_gradients" else key_ranges.by_query
        # Rows, kv heads and visits; the number of visits is data.
        visits = int(pairs.visits_N.max())
        grid = [range(x if isinstance(x, int) else visits) for x in kernel.params["grid_mapping"].grid]
        moved = copied_bytes(kernel, grid, jax.tree.leaves(pairs))
        assert moved == pytest.approx(shape.kv_heads * expected[name]), name
