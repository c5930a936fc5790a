"""Kernels for attention over packed rows on GPUs (Pallas, Triton).

Each program computes one block of a row and loops over the blocks that it is paired with (`BlockPairs`); the loop runs inside the
kernel, because XLA would stop the host at every turn. Forward and for the gradient of the queries, a program has one query
head, and the query heads of a kv head share their keys through the cache. For the gradients of keys and values, it goes
through all query heads of a kv head.

The left operand of a product comes from registers, so keys lie along axis 1 of the scores where the weights are multiplied by
keys or values, and along axis 0 where they are multiplied by queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rpt_jax.model.attention.key_ranges import BlockPairs, KeyRanges
from rpt_jax.model.attention.packed_kernels import (
    OutputGradient,
    RowKernels,
    Softmax,
    add_keys,
    attend_by_kernels,
    attended_keys,
    finish_softmax,
    masked_scores,
    score_gradients,
    start_softmax,
    sum_over_keys,
    sum_over_queries,
)
from rpt_jax.model.gpu import fill_side


def _fold_others(pairs: BlockPairs, own: jax.Array, fold: Callable[[Any, jax.Array], Any], carry: Any) -> Any:
    """Fold `fold(carry, index of the other block)` over the blocks that block `own` is paired with."""
    first = pairs.first_NxB[own]
    last = first + pairs.counts_NxB[own]
    return jax.lax.fori_loop(first, last, lambda visit, carry: fold(carry, pairs.other_NxT[visit]), carry)


def _ranges(begin_MxW: Any, end_MxW: Any, tokens: Any) -> list[tuple[jax.Array, jax.Array]]:
    return [(begin_MxW[m, tokens], end_MxW[m, tokens]) for m in range(begin_MxW.shape[0])]


def _forward_kernel(
    pairs: BlockPairs, begin_Mxq: Any, end_Mxq: Any, q_qxC: Any, k_WxC: Any, v_WxC: Any, out_qxC: Any, log_total_q: Any
) -> None:
    size, head_size = q_qxC.shape
    queries = q_qxC[...]
    ranges = _ranges(begin_Mxq, end_Mxq, pl.ds(0, size))

    def fold(softmax: Softmax, block: jax.Array) -> Softmax:
        keys = pl.ds(block * size, size)
        attended = attended_keys(ranges, block * size, size, keys_axis=1)
        scores = masked_scores(queries, k_WxC[keys, :], attended, keys_axis=1)
        return add_keys(softmax, scores, v_WxC[keys, :], keys_axis=1)

    softmax = _fold_others(pairs, pl.program_id(0), fold, start_softmax(size, head_size, keys_axis=1))
    out, log_total = finish_softmax(softmax)
    out_qxC[...] = out.astype(out_qxC.dtype)
    log_total_q[...] = log_total.reshape(size)


def _query_gradient_kernel(
    pairs: BlockPairs,
    begin_Mxq: Any,
    end_Mxq: Any,
    q_qxC: Any,
    k_WxC: Any,
    v_WxC: Any,
    dout_qxC: Any,
    log_total_q: Any,
    dout_dot_out_q: Any,
    dq_qxC: Any,
) -> None:
    size = q_qxC.shape[0]
    queries = q_qxC[...]
    dout = dout_qxC[...]
    log_total = log_total_q[...][:, None]
    dout_dot_out = dout_dot_out_q[...][:, None]
    ranges = _ranges(begin_Mxq, end_Mxq, pl.ds(0, size))

    def fold(dq: jax.Array, block: jax.Array) -> jax.Array:
        keys = pl.ds(block * size, size)
        k_sxC = k_WxC[keys, :]
        attended = attended_keys(ranges, block * size, size, keys_axis=1)
        scores = masked_scores(queries, k_sxC, attended, keys_axis=1)
        _, dscores = score_gradients(scores, log_total, dout, dout_dot_out, v_WxC[keys, :], keys_axis=1)
        return dq + sum_over_keys(dscores, k_sxC, keys_axis=1)

    dq = _fold_others(pairs, pl.program_id(0), fold, jnp.zeros(q_qxC.shape, jnp.float32))
    dq_qxC[...] = dq.astype(dq_qxC.dtype)


def _key_gradients_kernel(
    pairs: BlockPairs,
    begin_MxW: Any,
    end_MxW: Any,
    q_RxWxC: Any,
    k_sxC: Any,
    v_sxC: Any,
    dout_RxWxC: Any,
    log_total_RxW: Any,
    dout_dot_out_RxW: Any,
    dk_sxC: Any,
    dv_sxC: Any,
) -> None:
    size = k_sxC.shape[0]
    own = pl.program_id(0)
    k = k_sxC[...]
    v = v_sxC[...]

    def add_head(head: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def fold(sums: tuple[jax.Array, jax.Array], block: jax.Array) -> tuple[jax.Array, jax.Array]:
            dk, dv = sums
            queries = pl.ds(block * size, size)
            q_qxC = q_RxWxC[head, queries, :]
            dout_qxC = dout_RxWxC[head, queries, :]
            attended = attended_keys(_ranges(begin_MxW, end_MxW, queries), own * size, size, keys_axis=0)
            weights, dscores = score_gradients(
                masked_scores(q_qxC, k, attended, keys_axis=0),
                log_total=log_total_RxW[head, queries][None, :],
                dout_qxC=dout_qxC,
                dout_dot_out=dout_dot_out_RxW[head, queries][None, :],
                v_sxC=v,
                keys_axis=0,
            )
            return dk + sum_over_queries(dscores, q_qxC), dv + sum_over_queries(weights, dout_qxC)

        return _fold_others(pairs, own, fold, sums)

    zeros = jnp.zeros(k_sxC.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_RxWxC.shape[0], add_head, (zeros, zeros))
    dk_sxC[...] = dk.astype(dk_sxC.dtype)
    dv_sxC[...] = dv.astype(dv_sxC.dtype)


def _whole_row(*dims: int) -> pl.BlockSpec:
    """Return the spec of a program's row of an array [N, *dims]."""
    return pl.BlockSpec((None, *dims), lambda block, head, row: (row, *(0 for _ in dims)))


def _pair_specs(pairs: BlockPairs) -> BlockPairs:
    """Return the block specs of the arrays of `pairs`, in their places."""
    num_blocks = pairs.counts_NxB.shape[1]
    visits = pairs.own_NxT.shape[1]
    specs: dict[str, Any] = {
        "own_NxT": _whole_row(visits),
        "other_NxT": _whole_row(visits),
        "first_NxB": _whole_row(num_blocks),
        "counts_NxB": _whole_row(num_blocks),
        "visits_N": pl.BlockSpec((1,), lambda block, head, row: (row,)),
    }
    return BlockPairs(**specs)


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    in_specs: tuple[Any, ...],
    out_specs: tuple[pl.BlockSpec, ...],
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    arrays: tuple[Any, ...],
    interpret: bool,
) -> Any:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
        interpret=interpret,
    )(*arrays)


def _by_query_specs(q: jax.Array, key_ranges: KeyRanges) -> tuple[tuple[Any, ...], pl.BlockSpec, pl.BlockSpec]:
    """Return the specs of pairs, ranges, q, k and v, the spec of a block as of q, and of a number for each of its queries."""
    _, _, heads, size, head_size = q.shape
    num_ranges = key_ranges.begin_NxMxW.shape[1]
    block = size // key_ranges.counts_NxB.shape[1]
    ranges = pl.BlockSpec((None, num_ranges, block), lambda i, h, n: (n, 0, i))
    queries = pl.BlockSpec((None, None, None, block, head_size), lambda i, h, n: (n, h // heads, h % heads, i, 0))
    statistics = pl.BlockSpec((None, None, None, block), lambda i, h, n: (n, h // heads, h % heads, i))
    keys = pl.BlockSpec((None, None, size, head_size), lambda i, h, n: (n, h // heads, 0, 0))
    return (_pair_specs(key_ranges.by_query), ranges, ranges, queries, keys, keys), queries, statistics


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    rows, kv_heads, heads, _, _ = q.shape
    in_specs, queries, statistics = _by_query_specs(q, key_ranges)
    return _call(
        _forward_kernel,
        name="packed_attention_forward",
        grid=(key_ranges.counts_NxB.shape[1], kv_heads * heads, rows),
        in_specs=in_specs,
        out_specs=(queries, statistics),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)),
        arrays=(key_ranges.by_query, key_ranges.begin_NxMxW, key_ranges.end_NxMxW, q, k, v),
        interpret=interpret,
    )


def _query_gradient(
    q: jax.Array, k: jax.Array, v: jax.Array, output: OutputGradient, key_ranges: KeyRanges, *, interpret: bool
) -> jax.Array:
    rows, kv_heads, heads, _, _ = q.shape
    in_specs, queries, statistics = _by_query_specs(q, key_ranges)
    (dq,) = _call(
        _query_gradient_kernel,
        name="packed_attention_query_gradient",
        grid=(key_ranges.counts_NxB.shape[1], kv_heads * heads, rows),
        in_specs=(*in_specs, queries, statistics, statistics),
        out_specs=(queries,),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        arrays=(key_ranges.by_query, key_ranges.begin_NxMxW, key_ranges.end_NxMxW, q, k, v, *output),
        interpret=interpret,
    )
    return dq


def _key_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, output: OutputGradient, key_ranges: KeyRanges, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    rows, kv_heads, heads, size, head_size = q.shape
    num_ranges = key_ranges.begin_NxMxW.shape[1]
    num_blocks = key_ranges.counts_NxB.shape[1]
    ranges = _whole_row(num_ranges, size)
    queries = pl.BlockSpec((None, None, heads, size, head_size), lambda j, h, n: (n, h, 0, 0, 0))
    statistics = pl.BlockSpec((None, None, heads, size), lambda j, h, n: (n, h, 0, 0))
    keys = pl.BlockSpec((None, None, size // num_blocks, head_size), lambda j, h, n: (n, h, j, 0))
    pairs = _pair_specs(key_ranges.by_key)
    return _call(
        _key_gradients_kernel,
        name="packed_attention_key_gradients",
        grid=(num_blocks, kv_heads, rows),
        in_specs=(pairs, ranges, ranges, queries, keys, keys, queries, statistics, statistics),
        out_specs=(keys, keys),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        arrays=(key_ranges.by_key, key_ranges.begin_NxMxW, key_ranges.end_NxMxW, q, k, v, *output),
        interpret=interpret,
    )


@functools.cache
def _kernels(interpret: bool) -> RowKernels:
    return RowKernels(
        forward=functools.partial(_forward, interpret=interpret),
        query_gradient=functools.partial(_query_gradient, interpret=interpret),
        key_gradients=functools.partial(_key_gradients, interpret=interpret),
    )


def attend_triton(
    q_NxKxRxWxC: jax.Array,
    k_NxKxWxC: jax.Array,
    v_NxKxWxC: jax.Array,
    key_ranges: KeyRanges,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attend_by_kernels` on a GPU; `interpret` runs the kernels in interpret mode, without a GPU."""
    # Zeros at the end of the heads change no product.
    head_size = q_NxKxRxWxC.shape[-1]
    padding = fill_side(head_size) - head_size
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]) for x in (q_NxKxRxWxC, k_NxKxWxC, v_NxKxWxC))
    out: jax.Array = attend_by_kernels(_kernels(interpret), q, k, v, key_ranges)
    return out[..., :head_size]
