"""The passes of sampling over the logits on a TPU: against NumPy in interpret mode, and lowered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.rollout.sampling_mosaic import read_blocks, sum_blocks
from tests.helpers.parameters import mostly_slow

SHAPES = [(3, 300), (1, 1), (8, 128), (33, 129), (40, 16_384), (5, 16_400), (70, 40_000)]
QUICK = (3, 300)


def make_logits(rows: int, vocab: int) -> np.ndarray:
    """Draw logits; many are -inf or the lowest finite number, as excluded tokens are, and some blocks have no others."""
    rng = np.random.default_rng(rows + vocab)
    logits = rng.normal(0, 30, (rows, vocab)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.2] = -np.inf
    logits[rng.random(logits.shape) < 0.2] = np.finfo(np.float32).min
    logits[:, :128][rng.random(rows) < 0.5] = -np.inf
    return logits


@pytest.mark.parametrize(("rows", "vocab"), mostly_slow(SHAPES, QUICK))
def test_blocks_are_summed_relative_to_their_peak(rows, vocab):
    logits = make_logits(rows, vocab)
    peak, total = sum_blocks(jnp.asarray(logits), interpret=True)
    padding = -vocab % 128
    blocks = np.pad(logits, ((0, 0), (0, padding)), constant_values=-np.inf).reshape(rows, -1, 128)
    expected_peak = np.maximum(blocks.max(axis=-1), np.finfo(np.float32).min)
    np.testing.assert_array_equal(peak, expected_peak)
    expected = np.exp(blocks.astype(np.float64) - expected_peak[..., None]).sum(axis=-1)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize(("rows", "vocab"), mostly_slow(SHAPES, QUICK))
def test_a_block_of_each_row_is_read(rows, vocab):
    logits = make_logits(rows, vocab)
    count = -(-vocab // 128)
    # Any block, among them the last one, and some out of range on either side.
    block = np.random.default_rng(0).integers(-1, count + 1, rows).astype(np.int32)
    block[0] = count - 1
    read = np.asarray(read_blocks(jnp.asarray(logits), jnp.asarray(block), interpret=True))
    for row, index in enumerate(block):
        expected = np.full(128, -np.inf, np.float32)
        if 0 <= index < count:
            tokens = logits[row, index * 128 : (index + 1) * 128]
            expected[: len(tokens)] = tokens
        np.testing.assert_array_equal(read[row], expected)


def test_the_kernels_lower_for_a_tpu():
    logits = jax.ShapeDtypeStruct((237, 75_968), jnp.float32)
    block = jax.ShapeDtypeStruct((237,), jnp.int32)
    for traced in (jax.jit(sum_blocks).trace(logits), jax.jit(read_blocks).trace(logits, block)):
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 1
