"""Attention over a KV cache by the kernels: many shapes in interpret mode, whole rollouts, and compiled for TPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.cached_rows import INTERPRETED, ORDERS, CacheShape, Shared, check_kernel
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, with_devices

pytestmark = pytest.mark.slow

# Every size takes its smallest value and others; compiling one takes seconds, an example of it milliseconds.
SHAPES = [
    CacheShape(layers, slots, kv_heads, heads_per_kv, head_size, blocks, block, shared, dtype)
    for layers, slots, kv_heads, heads_per_kv, head_size, blocks, block, shared, dtype in (
        (1, 1, 1, 1, 16, 1, 16, (), "float32"),
        (3, 5, 1, 2, 16, 7, 16, (Shared(2, 3, 1, 16),), "float32"),
        (1, 16, 2, 7, 64, 4, 32, (Shared(3, 8, 2, 64),), "bfloat16"),
        (2, 3, 3, 4, 32, 2, 64, (Shared(3, 1, 5, 16),), "float32"),
        (1, 12, 1, 4, 128, 5, 16, (Shared(1, 12, 3, 32), Shared(4, 4, 1, 16)), "bfloat16"),
        (2, 1, 2, 9, 16, 3, 128, (Shared(1, 1, 2, 32),), "float32"),
        (1, 6, 2, 8, 64, 8, 16, (Shared(1, 17, 2, 16),), "bfloat16"),
        (4, 24, 1, 1, 16, 2, 64, (Shared(9, 5, 4, 16),), "float32"),
        (1, 9, 4, 9, 32, 1, 32, (Shared(3, 4, 2, 16), Shared(9, 1, 2, 16)), "bfloat16"),
        (2, 7, 2, 16, 16, 6, 16, (Shared(2, 4, 2, 32),), "float32"),
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INTERPRETED)
@settings(max_examples=16, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_kernels_equal_numpy(name, shape, seed):
    check_kernel(INTERPRETED[name], shape, seed, ORDERS[name])


def test_rollouts_by_the_kernels_equal_those_in_plain_xla():
    """With slots that are refilled, shared prefixes and shrinking batches; on one device and on eight simulated ones."""
    environment = with_devices(8) | {"JAX_PLATFORMS": "cpu"}
    child = [sys.executable, "-m", "tests.helpers.cache_rollouts_child"]
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_a_tpu(topology: str):
    """Prompts that eight rollouts share, for three policies; a prime number of slots, and many; roots that many share."""
    shapes = (
        "30x128x3x3x64x4x64x16x8x1x320xbfloat16",
        "24x64x2x7x64x4x128x8x8x2x512xbfloat16",
        "48x64x2x5x128x4x128x8x8x2x512xbfloat16",
        "48x16x2x5x128x4x128x2x8x2x512xfloat32",
        "2x3x1x1x64x1x64x3x1x1x64xfloat32",
        "2x239x1x6x128x4x128x30x8x2x512xbfloat16",
        "2x64x8x4x128x4x64x2x500x2x512xfloat32",
        "1x2048x8x16x128x4x32x2048x1x1x512xfloat32",
    )
    child = [sys.executable, "-m", "tests.helpers.tpu_cache_child", topology, *shapes]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(shapes, 2)
