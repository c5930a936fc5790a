"""Kernels for attention over packed rows on TPUs (Pallas, Mosaic).

The grid runs over rows, kv heads and visits of a pair of blocks. `BlockPairs`, read ahead of the kernel, says which blocks a
visit needs: they are copied while the visit before is computed, and pairs without attention are not visited. The query heads of
a kv head are computed in the same visit, which copies the keys and computes the mask once for all of them.

Keys lie along axis 0 of the scores: everything known of a query, such as its key ranges, is then a row of vector registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
from rpt_jax.model.tpu import fill_lanes

_KEYS_AXIS = 0


class _Queries(NamedTuple):
    """Refs of a block of queries of one kv head, and of what belongs to them."""

    begin_Mxq: Any
    end_Mxq: Any
    q_RxqxC: Any


class _Keys(NamedTuple):
    """Refs of a block of keys and values of one kv head."""

    k_sxC: Any
    v_sxC: Any


class _Output(NamedTuple):
    """Refs of what the backward pass needs of a block of queries."""

    dout_RxqxC: Any
    log_total_Rxq: Any
    dout_dot_out_Rxq: Any


class _SoftmaxRefs(NamedTuple):
    """Refs of the online softmax of a block of queries, one for each query head."""

    peak_Rxq: Any
    total_Rxq: Any
    out_RxCxq: Any

    def load(self, head: int) -> Softmax:
        """Return the state of a query head."""
        row = slice(head, head + 1)
        return Softmax(peak=self.peak_Rxq[row], total=self.total_Rxq[row], out=self.out_RxCxq[head])

    def store(self, head: int, softmax: Softmax) -> None:
        """Set the state of a query head."""
        row = slice(head, head + 1)
        self.peak_Rxq[row] = softmax.peak
        self.total_Rxq[row] = softmax.total
        self.out_RxCxq[head] = softmax.out


class _Visit(NamedTuple):
    """A visit of a pair of blocks.

    Attributes:
      first, last: whether it is the first or last one of its own block.
      live: whether there is attention between the blocks.
      own, other: indices of the blocks.
    """

    first: jax.Array
    last: jax.Array
    live: jax.Array
    own: jax.Array
    other: jax.Array


def _this_visit(pairs: BlockPairs) -> _Visit:
    row = pl.program_id(0)
    index = pl.program_id(2)
    visits = pairs.visits_N[row]
    own = pairs.own_NxT[row, index]
    before = pairs.own_NxT[row, jnp.maximum(index - 1, 0)]
    after = pairs.own_NxT[row, jnp.minimum(index + 1, visits - 1)]
    # Rows with fewer visits than others have nothing left to do.
    inside = index < visits
    return _Visit(
        first=inside & ((index == 0) | (before != own)),
        last=inside & ((index == visits - 1) | (after != own)),
        live=inside & (pairs.counts_NxB[row, own] > 0),
        own=own,
        other=pairs.other_NxT[row, index],
    )


def _attended(queries: _Queries, key_block: jax.Array, keys: int) -> jax.Array:
    ranges = [(queries.begin_Mxq[m], queries.end_Mxq[m]) for m in range(queries.begin_Mxq.shape[0])]
    return attended_keys(ranges, key_block * keys, keys, _KEYS_AXIS)


def _forward_kernel(
    pairs: BlockPairs,
    queries: _Queries,
    keys: _Keys,
    out_RxqxC: Any,
    log_total_Rxq: Any,
    *scratch: Any,
) -> None:
    visit = _this_visit(pairs)
    state = _SoftmaxRefs(*scratch)
    heads, size, head_size = queries.q_RxqxC.shape

    @pl.when(visit.first)
    def _() -> None:
        for r in range(heads):
            state.store(r, start_softmax(size, head_size, _KEYS_AXIS))

    @pl.when(visit.live)
    def _() -> None:
        attended = _attended(queries, visit.other, keys.k_sxC.shape[0])
        k_sxC = keys.k_sxC[...]
        v_sxC = keys.v_sxC[...]
        for r in range(heads):
            scores = masked_scores(queries.q_RxqxC[r], k_sxC, attended, _KEYS_AXIS)
            state.store(r, add_keys(state.load(r), scores, v_sxC, _KEYS_AXIS))

    @pl.when(visit.last)
    def _() -> None:
        for r in range(heads):
            out_Cxq, log_total_1xq = finish_softmax(state.load(r))
            out_RxqxC[r] = out_Cxq.T.astype(out_RxqxC.dtype)
            log_total_Rxq[r : r + 1] = log_total_1xq


def _query_gradient_kernel(
    pairs: BlockPairs, queries: _Queries, keys: _Keys, output: _Output, dq_RxqxC: Any, sums_RxCxq: Any
) -> None:
    visit = _this_visit(pairs)
    heads = queries.q_RxqxC.shape[0]

    @pl.when(visit.first)
    def _() -> None:
        sums_RxCxq[...] = jnp.zeros_like(sums_RxCxq)

    @pl.when(visit.live)
    def _() -> None:
        attended = _attended(queries, visit.other, keys.k_sxC.shape[0])
        k_sxC = keys.k_sxC[...]
        for r in range(heads):
            _, dscores = _score_gradients(queries, keys, output, attended, r)
            sums_RxCxq[r] += sum_over_keys(dscores, k_sxC, _KEYS_AXIS)

    @pl.when(visit.last)
    def _() -> None:
        for r in range(heads):
            dq_RxqxC[r] = sums_RxCxq[r].T.astype(dq_RxqxC.dtype)


def _key_gradients_kernel(
    pairs: BlockPairs,
    queries: _Queries,
    keys: _Keys,
    output: _Output,
    dk_sxC: Any,
    dv_sxC: Any,
    dk_sum_sxC: Any,
    dv_sum_sxC: Any,
) -> None:
    visit = _this_visit(pairs)
    heads = queries.q_RxqxC.shape[0]

    @pl.when(visit.first)
    def _() -> None:
        dk_sum_sxC[...] = jnp.zeros_like(dk_sum_sxC)
        dv_sum_sxC[...] = jnp.zeros_like(dv_sum_sxC)

    @pl.when(visit.live)
    def _() -> None:
        attended = _attended(queries, visit.own, keys.k_sxC.shape[0])
        for r in range(heads):
            weights, dscores = _score_gradients(queries, keys, output, attended, r)
            dk_sum_sxC[...] += sum_over_queries(dscores, queries.q_RxqxC[r])
            dv_sum_sxC[...] += sum_over_queries(weights, output.dout_RxqxC[r])

    @pl.when(visit.last)
    def _() -> None:
        dk_sxC[...] = dk_sum_sxC[...].astype(dk_sxC.dtype)
        dv_sxC[...] = dv_sum_sxC[...].astype(dv_sxC.dtype)


def _score_gradients(
    queries: _Queries, keys: _Keys, output: _Output, attended: jax.Array, head: int
) -> tuple[jax.Array, jax.Array]:
    """Return the attention weights of query head `head` and the gradient of its scores, both [s, q]."""
    return score_gradients(
        masked_scores(queries.q_RxqxC[head], keys.k_sxC[...], attended, _KEYS_AXIS),
        log_total=output.log_total_Rxq[head : head + 1],
        dout_qxC=output.dout_RxqxC[head],
        dout_dot_out=output.dout_dot_out_Rxq[head : head + 1],
        v_sxC=keys.v_sxC[...],
        keys_axis=_KEYS_AXIS,
    )


class _Specs(NamedTuple):
    """Block specs of the arrays of a call.

    Attributes:
      ranges: of [N, M, W].
      heads: of queries and what is shaped as they are, [N, K, R, W, C].
      statistics: of a number per query, [N, K, R, W].
      keys: of [N, K, W, C].
    """

    ranges: pl.BlockSpec
    heads: pl.BlockSpec
    statistics: pl.BlockSpec
    keys: pl.BlockSpec


def _block_size(key_ranges: KeyRanges) -> int:
    return key_ranges.begin_NxMxW.shape[2] // key_ranges.counts_NxB.shape[1]


def _specs(q: jax.Array, key_ranges: KeyRanges, own: str) -> _Specs:
    """Return the block specs of a call whose own blocks are "queries" or "keys"."""
    _, _, heads, _, head_size = q.shape
    block = _block_size(key_ranges)
    num_ranges = key_ranges.begin_NxMxW.shape[1]

    def index_of(is_own: bool) -> Callable[[Any, Any, BlockPairs], Any]:
        def index(row: Any, visit: Any, pairs: BlockPairs) -> Any:
            blocks_NxT = pairs.own_NxT if is_own else pairs.other_NxT
            return blocks_NxT[row, jnp.minimum(visit, pairs.visits_N[row] - 1)]

        return index

    query_block = index_of(own == "queries")
    key_block = index_of(own == "keys")
    return _Specs(
        ranges=pl.BlockSpec((None, num_ranges, block), lambda n, k, t, pairs: (n, 0, query_block(n, t, pairs))),
        heads=pl.BlockSpec(
            (None, None, heads, block, head_size), lambda n, k, t, pairs: (n, k, 0, query_block(n, t, pairs), 0)
        ),
        statistics=pl.BlockSpec((None, None, heads, block), lambda n, k, t, pairs: (n, k, 0, query_block(n, t, pairs))),
        keys=pl.BlockSpec((None, None, block, head_size), lambda n, k, t, pairs: (n, k, key_block(n, t, pairs), 0)),
    )


def _query_specs(specs: _Specs) -> tuple[Any, ...]:
    return (
        _Queries(begin_Mxq=specs.ranges, end_Mxq=specs.ranges, q_RxqxC=specs.heads),
        _Keys(k_sxC=specs.keys, v_sxC=specs.keys),
    )


def _output_specs(specs: _Specs) -> _Output:
    return _Output(dout_RxqxC=specs.heads, log_total_Rxq=specs.statistics, dout_dot_out_Rxq=specs.statistics)


def _call(
    kernel: Callable[..., None],
    name: str,
    pairs: BlockPairs,
    arrays: tuple[Any, ...],
    in_specs: tuple[Any, ...],
    out_specs: tuple[Any, ...],
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    scratch: tuple[tuple[int, ...], ...],
    interpret: bool,
) -> Any:
    """Run a kernel over all rows, kv heads and visits; `scratch` has the shapes of its float32 scratch arrays."""
    rows, kv_heads = out_shape[0].shape[:2]
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, kv_heads, pairs.visits_N.max()),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(dims, jnp.float32) for dims in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
        interpret=interpret,
    )(pairs, *arrays)


def _inputs(q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges) -> tuple[_Queries, _Keys]:
    queries = _Queries(begin_Mxq=key_ranges.begin_NxMxW, end_Mxq=key_ranges.end_NxMxW, q_RxqxC=q)
    return queries, _Keys(k_sxC=k, v_sxC=v)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, key_ranges: KeyRanges, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    specs = _specs(q, key_ranges, own="queries")
    _, _, heads, _, head_size = q.shape
    block = _block_size(key_ranges)
    return _call(
        _forward_kernel,
        name="packed_attention_forward",
        pairs=key_ranges.by_query,
        arrays=_inputs(q, k, v, key_ranges),
        in_specs=_query_specs(specs),
        out_specs=(specs.heads, specs.statistics),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)),
        scratch=((heads, block), (heads, block), (heads, head_size, block)),
        interpret=interpret,
    )


def _query_gradient(
    q: jax.Array, k: jax.Array, v: jax.Array, output: OutputGradient, key_ranges: KeyRanges, *, interpret: bool
) -> jax.Array:
    specs = _specs(q, key_ranges, own="queries")
    _, _, heads, _, head_size = q.shape
    block = _block_size(key_ranges)
    (dq,) = _call(
        _query_gradient_kernel,
        name="packed_attention_query_gradient",
        pairs=key_ranges.by_query,
        arrays=(*_inputs(q, k, v, key_ranges), _Output(*output)),
        in_specs=(*_query_specs(specs), _output_specs(specs)),
        out_specs=(specs.heads,),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch=((heads, head_size, block),),
        interpret=interpret,
    )
    return dq


def _key_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, output: OutputGradient, key_ranges: KeyRanges, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    specs = _specs(q, key_ranges, own="keys")
    block = _block_size(key_ranges)
    head_size = q.shape[-1]
    return _call(
        _key_gradients_kernel,
        name="packed_attention_key_gradients",
        pairs=key_ranges.by_key,
        arrays=(*_inputs(q, k, v, key_ranges), _Output(*output)),
        in_specs=(*_query_specs(specs), _output_specs(specs)),
        out_specs=(specs.keys, specs.keys),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=((block, head_size), (block, head_size)),
        interpret=interpret,
    )


def packed_attention_bytes(
    key_ranges: KeyRanges, *, heads_per_kv: int, head_size: int, itemsize: int
) -> dict[str, float]:
    """Return the bytes that each kernel, by its name, reads and writes for one row and one kv head.

    A block is copied when a visit needs another one than the visit before: an own block once, other blocks at almost every
    visit. The last axis of an array takes whole registers.

    Args:
      key_ranges: concrete key ranges of one row.
      heads_per_kv: query heads of a kv head.
      head_size: size of a head.
      itemsize: bytes of a query's, key's or value's number.
    """
    num_ranges = key_ranges.begin_NxMxW.shape[1]
    num_blocks = key_ranges.counts_NxB.shape[1]
    block = _block_size(key_ranges)
    keys = block * fill_lanes(head_size) * itemsize
    heads = heads_per_kv * keys
    statistics = heads_per_kv * fill_lanes(block) * jnp.dtype(jnp.float32).itemsize
    ranges = 2 * num_ranges * fill_lanes(block) * jnp.dtype(jnp.int32).itemsize

    def copies(pairs: BlockPairs) -> int:
        other_T = np.asarray(pairs.other_NxT)[0, : int(pairs.visits_N[0])]
        return 1 + int(np.count_nonzero(np.diff(other_T)))

    # Own blocks: queries, output and gradients, or keys, values and their gradients. Other blocks: keys and values, or queries,
    # the output's gradient and what belongs to them.
    return {
        "packed_attention_forward": num_blocks * (2 * heads + statistics + ranges)
        + copies(key_ranges.by_query) * 2 * keys,
        "packed_attention_query_gradient": num_blocks * (3 * heads + 2 * statistics + ranges)
        + copies(key_ranges.by_query) * 2 * keys,
        "packed_attention_key_gradients": num_blocks * 4 * keys
        + copies(key_ranges.by_key) * (2 * heads + 2 * statistics + ranges),
    }


@functools.cache
def _kernels(interpret: bool) -> RowKernels:
    return RowKernels(
        forward=functools.partial(_forward, interpret=interpret),
        query_gradient=functools.partial(_query_gradient, interpret=interpret),
        key_gradients=functools.partial(_key_gradients, interpret=interpret),
    )


def attend_mosaic(
    q_NxKxRxWxC: jax.Array,
    k_NxKxWxC: jax.Array,
    v_NxKxWxC: jax.Array,
    key_ranges: KeyRanges,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attend_by_kernels` on a TPU; `interpret` runs the kernels in interpret mode, without a TPU."""
    return attend_by_kernels(_kernels(interpret), q_NxKxRxWxC, k_NxKxWxC, v_NxKxWxC, key_ranges)
