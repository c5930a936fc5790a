"""Token sampling with noise that is a function of the token alone, independent of the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.sharding import PartitionSpec

from rpt_jax.distributed.mesh import DECODING, num_shards
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.tpu import LANES, fill_lanes
from rpt_jax.rollout.sampling_mosaic import read_blocks, sum_blocks


def uniform_noise(key: jax.Array, prompt_ids_P: jax.Array, samples: int, max_new_tokens: int) -> jax.Array:
    """Return one uniform number in [0, 1) for every possible token of R = P·G rollouts, float32 [R, T].

    It is a function of the step's key, the prompt id, and the indices of the sample and the token only. All numbers are
    generated at once: generating one per rollout in every decode step would run the generator's two loops of small
    operations each time.
    """

    def one(prompt_id: jax.Array, sample: jax.Array, token: jax.Array) -> jax.Array:
        token_key = functools.reduce(jax.random.fold_in, (prompt_id, sample, token), key)
        return jax.random.uniform(token_key, dtype=jnp.float32)

    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        one = jax.vmap(one, in_axes=axes)
    return one(prompt_ids_P, jnp.arange(samples), jnp.arange(max_new_tokens)).reshape(-1, max_new_tokens)


def truncate(logits_MxV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Restrict logits to the `top_k` most likely tokens and to the smallest set of these with probability mass `top_p`.

    Ties with the last token that is kept are kept too. As in other implementations, `top_p` (nucleus sampling, arXiv
    1904.09751) is relative to the mass that `top_k` leaves.

    Args:
      logits_MxV: float32.
      top_k: number of tokens; 0 for all.
      top_p: probability mass in (0, 1].
    """
    if top_k == 0 and top_p == 1.0:
        return logits_MxV
    sorted_MxV = jnp.sort(logits_MxV, axis=-1, descending=True)
    threshold = sorted_MxV[:, -1:] if top_k == 0 else sorted_MxV[:, min(top_k, logits_MxV.shape[-1]) - 1, None]
    if top_p < 1.0:
        probs_MxV = jax.nn.softmax(jnp.where(sorted_MxV >= threshold, sorted_MxV, -jnp.inf), axis=-1)
        # A token is kept if the more likely ones have less than the mass `top_p`. So the first one always is.
        kept_MxV = jnp.cumsum(probs_MxV, axis=-1) - probs_MxV < top_p
        lowest_Mx1 = jnp.min(jnp.where(kept_MxV, sorted_MxV, jnp.inf), axis=-1, keepdims=True)
        threshold = jnp.maximum(threshold, lowest_Mx1)
    return jnp.where(logits_MxV >= threshold, logits_MxV, jnp.finfo(jnp.float32).min)


class _Blocks(NamedTuple):
    """What sampling reads of the logits, with the vocabulary in B blocks of W tokens.

    Attributes:
      largest_M: largest logit of each row.
      sums_MxB: sums of exp(logit - largest) over each block.
      read: returns, for the index of a block in each row, its logits [M, W], -inf where it has no token, and the id of its first
        entry [M].
    """

    largest_M: jax.Array
    sums_MxB: jax.Array
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@jax.named_scope("sample_tokens")
def sample_tokens(logits_MxV: jax.Array, uniform_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row from softmax(logits) by inverse transform sampling.

    It takes one random number per token instead of V for Gumbel noise. The inversion has two levels, first a block of
    tokens and then a token of it, so no cumulative sum over the whole vocabulary is formed. The sums of blocks also
    normalize the log-probability.

    Args:
      logits_MxV: float32.
      uniform_M: float32 uniform numbers in [0, 1).

    Returns: tokens, int32 [M], and their log-probabilities, float32 [M].
    """
    blocks = _tile_blocks(logits_MxV) if target_platform() == "tpu" else _row_blocks(logits_MxV)
    largest_M = blocks.largest_M
    sums_MxB = blocks.sums_MxB

    # First level: the block. Only blocks with a positive weight qualify, since a cumulative sum that is computed as a
    # tree may increase by rounding where nothing is added, and the end of the interval would fall into the padding.
    ends_MxB = jnp.cumsum(sums_MxB, axis=-1)
    positive_ends_MxB = jnp.where(sums_MxB > 0, ends_MxB, 0.0)
    total_M = positive_ends_MxB.max(axis=-1)
    target_M = uniform_M * total_M
    block_M = jnp.argmax(positive_ends_MxB > target_M[:, None], axis=-1)

    # Second level: the token in the block. The two levels round differently; if no token passes the target, the last
    # one with a positive weight is taken.
    before_M = jnp.where(block_M > 0, jnp.take_along_axis(ends_MxB, block_M[:, None] - 1, axis=1)[:, 0], 0.0)
    logits_MxW, start_M = blocks.read(block_M)
    weights_MxW = jnp.exp(logits_MxW - largest_M[:, None])
    ends_MxW = jnp.cumsum(weights_MxW, axis=-1)
    passed_MxW = (ends_MxW > (target_M - before_M)[:, None]) & (weights_MxW > 0)
    last_M = weights_MxW.shape[1] - 1 - jnp.argmax(weights_MxW[:, ::-1] > 0, axis=-1)
    index_M = jnp.where(passed_MxW.any(axis=-1), jnp.argmax(passed_MxW, axis=-1), last_M)
    chosen_M = jnp.take_along_axis(logits_MxW, index_M[:, None], axis=1)[:, 0]
    return (start_M + index_M).astype(jnp.int32), chosen_M - largest_M - jnp.log(total_M)


def _row_blocks(logits_MxV: jax.Array) -> _Blocks:
    """Return blocks of about √V tokens, for a CPU or a GPU."""
    rows, vocab = logits_MxV.shape
    width = math.isqrt(vocab - 1) + 1
    if width > LANES:
        width = fill_lanes(width)
    count = -(-vocab // width)
    # Gathered over devices before padding. Padding a sharded vocabulary would shift its shards with a collective
    # permute, for which XLA's CPU backend waits for all replicas: their loops have different lengths, so this would
    # deadlock.
    logits_MxV = with_logical_constraint(logits_MxV, (None, None))
    largest_M = logits_MxV.max(axis=-1)
    padded = jnp.pad(logits_MxV, ((0, 0), (0, count * width - vocab)), constant_values=-jnp.inf)
    sums_MxB = jnp.exp(padded.reshape(rows, count, width) - largest_M[:, None, None]).sum(axis=-1)

    def read(block_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        start_M = jnp.minimum(block_M * width, vocab - width)  # The last block may overlap with the one before.
        logits_MxW = jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (width,)))(logits_MxV, start_M)
        is_in_block_MxW = start_M[:, None] + jnp.arange(width) >= block_M[:, None] * width
        return jnp.where(is_in_block_MxW, logits_MxW, -jnp.inf), start_M

    return _Blocks(largest_M=largest_M, sums_MxB=sums_MxB, read=read)


def _tile_blocks(logits_MxV: jax.Array) -> _Blocks:
    """Return blocks of 128 tokens, the width of a TPU's tiles; each device divides its own shard of the vocabulary.

    A device reads only the tiles of its own shard in which blocks were drawn.
    """
    vocab = logits_MxV.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else num_shards(mesh, DECODING["vocab"])
    if vocab % shards:
        shards = 1
    size = vocab // shards
    count = -(-size // LANES)
    axes = None if shards == 1 else DECODING["vocab"]

    def on_shards(fn: Callable[..., Any], *args: jax.Array, in_specs: Any, out_specs: Any) -> Any:
        if mesh.empty:
            return fn(*args)
        return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    def read_from_shard(logits_MxV: jax.Array, first: jax.Array, block_M: jax.Array) -> jax.Array:
        return read_blocks(logits_MxV, block_M - first)[:, None]

    by_shard = PartitionSpec(None, axes)

    def read(block_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        first_S = jnp.arange(shards, dtype=jnp.int32) * count
        in_specs = (by_shard, PartitionSpec(axes), PartitionSpec())
        logits_MxSxW = on_shards(read_from_shard, logits_MxV, first_S, block_M, in_specs=in_specs, out_specs=by_shard)
        return logits_MxSxW.max(axis=1), block_M // count * size + block_M % count * LANES

    blocks = on_shards(sum_blocks, logits_MxV, in_specs=by_shard, out_specs=by_shard)
    peak_MxB, sums_MxB = (with_logical_constraint(x, (None, None)) for x in blocks)
    largest_M = peak_MxB.max(axis=1)
    sums_MxB = sums_MxB * jnp.exp(peak_MxB - largest_M[:, None])
    return _Blocks(largest_M=largest_M, sums_MxB=sums_MxB, read=read)
