"""The kernels for packed rows: many shapes in interpret mode, sharded rows, and compiled for TPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.attention.key_ranges import make_key_ranges
from rpt_jax.model.attention.packed import attend_packed
from tests.helpers.packed_rows import RowShape, check_kernels, make_example
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, with_devices

pytestmark = pytest.mark.slow

# Every size takes its smallest value and others; compiling one takes seconds, an example of it milliseconds.
SHAPES = [
    RowShape(rows, kv_heads, heads, blocks, block, ranges, head_size, dtype)
    for rows, kv_heads, heads, blocks, block, ranges, head_size, dtype in (
        (1, 1, 1, 1, 16, 1, 16, "float32"),
        (1, 1, 1, 7, 4, 3, 8, "float32"),
        (2, 2, 1, 4, 8, 1, 16, "bfloat16"),
        (1, 2, 3, 5, 16, 2, 24, "float32"),
        (3, 1, 2, 3, 8, 4, 64, "bfloat16"),
        (2, 1, 5, 2, 32, 3, 16, "float32"),
        (1, 3, 2, 8, 2, 2, 4, "float32"),
        (4, 1, 1, 2, 1, 1, 2, "float32"),
        (1, 1, 4, 3, 64, 3, 128, "bfloat16"),
        (2, 2, 2, 6, 8, 5, 32, "bfloat16"),
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mosaic", "triton"])
@settings(max_examples=16, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_kernels_equal_the_reference(name, shape, seed):
    check_kernels(name, shape, seed)


def test_plain_xla_equals_the_reference_for_rows_of_parts_of_panels():
    """A panel of 32 blocks on a CPU does not divide the 36 blocks of a row."""
    shape = RowShape(rows=1, kv_heads=1, heads=1, blocks=36, block=16, ranges=2, head_size=16, dtype="float32")
    example = make_example(shape, seed=0)
    # Padding attends to itself, as in packed batches.
    padding_Nx1xW = ~example.real_NxW[:, None]
    index_W = np.arange(example.real_NxW.shape[1], dtype=np.int32)
    begin = np.where(padding_Nx1xW, index_W, example.begin_NxMxW)
    key_ranges = make_key_ranges(begin, np.where(padding_Nx1xW, index_W + 1, example.end_NxMxW), shape.block)
    q, k, v, dout = (np.expand_dims(example.arrays[name], 2) for name in ("q", "k", "v", "dout"))

    def gradients(name: str) -> Any:
        return jax.grad(lambda *x: (attend_packed(*x, key_ranges, name) * dout).sum(), argnums=(0, 1, 2))(q, k, v)

    for ours, expected in zip(gradients("blockwise"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_sharded_rows_equal_unsharded_ones():
    """Rows and kv heads over eight simulated devices, each of which visits the blocks of its own rows."""
    environment = with_devices(8) | {"JAX_PLATFORMS": "cpu"}
    child = [sys.executable, "-m", "tests.helpers.sharded_rows_child"]
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout)
    assert set(differences) == {"gpu_kernels", "tpu_kernels"}
    assert all(difference < 1e-6 for difference in differences.values()), differences


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernels_compile_for_a_tpu(topology: str, tmp_path: Path):
    """Heads of 64 and 128, one and several query heads for a kv head, a short row, both dtypes."""
    shapes = "2x1x128x64xbfloat16", "1x5x1024x128xbfloat16", "1x2x512x128xfloat32"
    child = [sys.executable, "-m", "tests.helpers.tpu_rows_child", topology, *shapes]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    # Forward, gradients of queries, gradients of keys and values.
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(shapes, 3)
