"""The two passes of sampling over the logits on a TPU (Pallas, Mosaic).

XLA takes a pass for the largest logits, one for the sums and one to read the blocks that were drawn, and often copies the logits
to another layout in between. Here the first two are one pass, because the sums are relative to the largest logit of their block.

Letters in shape suffixes: M rows, V tokens of the vocabulary or of a shard of it, in B blocks of W = 128 tokens, as many as a
register has lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rpt_jax.model.tpu import LANES, SUBLANES

# What a step of the grid reads: logits that take longer to read than a step's overhead. The results of its blocks fill registers.
_MAX_STEP_ROWS = 4 * SUBLANES
_STEP_BLOCKS = LANES
_STEP_TOKENS = _STEP_BLOCKS * LANES
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
    result = pl.BlockSpec((_step_rows(rows), _STEP_BLOCKS), lambda row, step: (row, step))
    return pl.pallas_call(
        functools.partial(_sum_kernel, vocab=vocab),
        out_shape=(jax.ShapeDtypeStruct((rows, blocks), jnp.float32),) * 2,
        grid=_grid(rows, vocab),
        in_specs=(_logits_spec(rows),),
        out_specs=(result, result),
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
    step_rows = _step_rows(rows)
    return pl.pallas_call(
        functools.partial(_read_kernel, vocab=vocab),
        out_shape=jax.ShapeDtypeStruct((rows, LANES), jnp.float32),
        grid=_grid(rows, vocab),
        in_specs=(pl.BlockSpec((step_rows, 1), lambda row, _: (row, 0)), _logits_spec(rows)),
        out_specs=pl.BlockSpec((step_rows, LANES), lambda row, _: (row, 0)),
        name="read_blocks",
        interpret=interpret,
    )(block_M[:, None], logits_MxV)


def _step_rows(rows: int) -> int:
    return min(_MAX_STEP_ROWS, pl.cdiv(rows, SUBLANES) * SUBLANES)


def _grid(rows: int, vocab: int) -> tuple[int, int]:
    return pl.cdiv(rows, _step_rows(rows)), pl.cdiv(vocab, _STEP_TOKENS)


def _logits_spec(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((_step_rows(rows), _STEP_TOKENS), lambda row, step: (row, step))


def _sum_kernel(logits_mxt: Any, peak_mxb: Any, sum_mxb: Any, *, vocab: int) -> None:
    lane = jax.lax.broadcasted_iota(jnp.int32, peak_mxb.shape, 1)

    def add(
        index: jax.Array, logits_mxW: jax.Array, results: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        peak = jnp.maximum(logits_mxW.max(axis=1, keepdims=True), _LOWEST)
        total = jnp.exp(logits_mxW - peak).sum(axis=1, keepdims=True)
        peaks, totals = results
        return jnp.where(lane == index, peak, peaks), jnp.where(lane == index, total, totals)

    zeros = jnp.zeros(peak_mxb.shape, jnp.float32)
    peak_mxb[...], sum_mxb[...] = _fold_blocks(logits_mxt, vocab, add, (zeros, zeros))


def _read_kernel(block_mx1: Any, logits_mxt: Any, out_mxW: Any, *, vocab: int) -> None:
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        out_mxW[...] = jnp.full_like(out_mxW, -jnp.inf)

    def add(index: jax.Array, logits_mxW: jax.Array, out: jax.Array) -> jax.Array:
        return jnp.where(block_mx1[...] == step * _STEP_BLOCKS + index, logits_mxW, out)

    out_mxW[...] = _fold_blocks(logits_mxt, vocab, add, out_mxW[...])


def _fold_blocks(logits_mxt: Any, vocab: int, add: Callable[[jax.Array, jax.Array, Any], Any], start: Any) -> Any:
    """Fold `add(index, logits, result)` over the blocks of a step; logits beyond the vocabulary are -inf."""
    first = pl.program_id(1) * _STEP_TOKENS
    lane = jax.lax.broadcasted_iota(jnp.int32, (logits_mxt.shape[0], LANES), 1)

    def fold(index: jax.Array, result: Any) -> Any:
        offset = index * LANES
        logits_mxW = logits_mxt[:, pl.ds(pl.multiple_of(offset, LANES), LANES)]
        return add(index, jnp.where(first + offset + lane < vocab, logits_mxW, -jnp.inf), result)

    return jax.lax.fori_loop(0, _STEP_BLOCKS, fold, start)
