"""What sampling reads of the logits on a TPU (Pallas, Mosaic).

XLA takes a pass for the largest logits, one for the sums and one to read the blocks that were drawn, and often copies the logits
to another layout in between. Here the first two are one pass, because the sums are relative to the largest logit of their block,
and of a block that was drawn only its tile is read.

Letters in shape suffixes: M rows, V tokens of the vocabulary or of a shard of it, in B blocks of W = 128 tokens, as many as a
register has lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpt_jax.model.tpu import LANES, SUBLANES

# What a step of the grid reads: logits that take longer to read than a step's overhead. The results of its blocks fill registers.
_MAX_STEP_ROWS = 4 * SUBLANES
_STEP_BLOCKS = LANES
_STEP_TOKENS = _STEP_BLOCKS * LANES
# Rows of which a step reads the blocks that were drawn.
_READ_ROWS = 2 * SUBLANES
# The lowest finite logit, the peak of a block without tokens.
_LOWEST = float(jnp.finfo(jnp.float32).min)


def sum_blocks(logits_MxV: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return the peak of each block, its largest logit, and the sum of exp(logit - peak) over the block; float32 [M, B].

    Args:
      logits_MxV: float32.
      interpret: run the kernel in interpret mode, without a TPU.
    """
    rows, vocab = logits_MxV.shape
    blocks = pl.cdiv(vocab, LANES)
    step_rows = min(_MAX_STEP_ROWS, pl.cdiv(rows, SUBLANES) * SUBLANES)
    logits = pl.BlockSpec((step_rows, _STEP_TOKENS), lambda row, step: (row, step))
    result = pl.BlockSpec((step_rows, _STEP_BLOCKS), lambda row, step: (row, step))
    return pl.pallas_call(
        functools.partial(_sum_kernel, vocab=vocab),
        out_shape=(jax.ShapeDtypeStruct((rows, blocks), jnp.float32),) * 2,
        grid=(pl.cdiv(rows, step_rows), pl.cdiv(vocab, _STEP_TOKENS)),
        in_specs=(logits,),
        out_specs=(result, result),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="sum_blocks",
        interpret=interpret,
    )(logits_MxV)


def read_blocks(logits_MxV: jax.Array, block_M: jax.Array, interpret: bool = False) -> jax.Array:
    """Return the logits of one block of each row, float32 [M, W]; -inf beyond the vocabulary.

    Args:
      logits_MxV: float32.
      block_M: int32 index of the block; a row whose index is out of range gets -inf.
      interpret: run the kernel in interpret mode, without a TPU.
    """
    rows, vocab = logits_MxV.shape
    last_block = pl.cdiv(vocab, LANES) - 1

    def tile_of(index: int) -> pl.BlockSpec:
        """Return the spec of the tile with the block of the `index`-th row of a step."""

        def tile(step: Any, block_M: Any) -> tuple[Any, Any]:
            row = jnp.minimum(step * _READ_ROWS + index, rows - 1)
            return jax.lax.div(row, SUBLANES), jnp.clip(block_M[row], 0, last_block)

        return pl.BlockSpec((SUBLANES, LANES), tile)

    return pl.pallas_call(
        functools.partial(_read_kernel, rows=rows, vocab=vocab),
        out_shape=jax.ShapeDtypeStruct((rows, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(rows, _READ_ROWS),),
            in_specs=[tile_of(index) for index in range(_READ_ROWS)],
            out_specs=pl.BlockSpec((_READ_ROWS, LANES), lambda step, _: (step, 0)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="read_blocks",
        interpret=interpret,
    )(block_M, *[logits_MxV] * _READ_ROWS)


def read_blocks_bytes(rows: int) -> int:
    """Return the bytes that `read_blocks` reads and writes."""
    return rows * (SUBLANES + 1) * LANES * jnp.dtype(jnp.float32).itemsize


def _sum_kernel(logits_mxt: Any, peak_mxb: Any, sum_mxb: Any, *, vocab: int) -> None:
    first = pl.program_id(1) * _STEP_TOKENS
    lane = jax.lax.broadcasted_iota(jnp.int32, (logits_mxt.shape[0], LANES), 1)
    block = jax.lax.broadcasted_iota(jnp.int32, peak_mxb.shape, 1)

    def add(index: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        offset = index * LANES
        logits_mxW = logits_mxt[:, pl.ds(pl.multiple_of(offset, LANES), LANES)]
        logits_mxW = jnp.where(first + offset + lane < vocab, logits_mxW, -jnp.inf)
        peak = jnp.maximum(logits_mxW.max(axis=1, keepdims=True), _LOWEST)
        total = jnp.exp(logits_mxW - peak).sum(axis=1, keepdims=True)
        peaks, totals = results
        return jnp.where(block == index, peak, peaks), jnp.where(block == index, total, totals)

    zeros = jnp.zeros(peak_mxb.shape, jnp.float32)
    peak_mxb[...], sum_mxb[...] = jax.lax.fori_loop(0, _STEP_BLOCKS, add, (zeros, zeros))


def _read_kernel(block_M: Any, *refs: Any, rows: int, vocab: int) -> None:
    *tiles, out_rxW = refs
    first_row = pl.program_id(0) * _READ_ROWS
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for index, tile in enumerate(tiles):
        block = block_M[jnp.minimum(first_row + index, rows - 1)]
        is_token = (block >= 0) & (block * LANES + lane < vocab)
        row = index % SUBLANES
        out_rxW[index : index + 1] = jnp.where(is_token, tile[row : row + 1], -jnp.inf)
