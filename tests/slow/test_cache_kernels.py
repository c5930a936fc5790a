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

from tests.helpers.cached_rows import INTERPRETED, ORDERS, CacheShape, check_kernel
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, with_devices

pytestmark = pytest.mark.slow

# Every size takes its smallest value and others; compiling one takes seconds, an example of it milliseconds.
SHAPES = [
    CacheShape(layers, blocks, rows, kv_heads, block, head_size, queries, dtype)
    for layers, blocks, rows, kv_heads, block, head_size, queries, dtype in (
        (1, 1, 1, 1, 16, 16, 1, "float32"),
        (3, 7, 5, 1, 16, 16, 2, "float32"),
        (1, 4, 16, 2, 32, 64, 7, "bfloat16"),
        (2, 2, 3, 3, 64, 32, 40, "float32"),
        (1, 5, 12, 1, 16, 128, 4, "bfloat16"),
        (2, 3, 1, 2, 128, 16, 70, "float32"),
        (1, 8, 6, 2, 16, 64, 129, "bfloat16"),
        (4, 2, 24, 1, 64, 16, 1, "float32"),
        (1, 1, 9, 4, 32, 32, 9, "bfloat16"),
        (2, 6, 7, 2, 16, 16, 16, "float32"),
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
    """A rollout's own tokens and a prompt that eight rollouts share, for three policies; and a prime number of rows."""
    shapes = (
        "30x4x64x3x128x64x3xbfloat16",
        "24x4x64x2x128x64x7xbfloat16",
        "24x2x8x2x512x64x56xbfloat16",
        "48x4x64x2x128x128x5xbfloat16",
        "48x4x16x2x512x128x40xfloat32",
        "2x1x3x1x64x64x1xfloat32",
        "2x4x239x1x128x128x6xbfloat16",
    )
    child = [sys.executable, "-m", "tests.helpers.tpu_cache_child", topology, *shapes]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(child, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(shapes, 1)
