"""Drawing tokens, with noise that belongs to the token and not to the batch."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn


def uniform_noise(key: jax.Array, prompt_ids_P: jax.Array, samples: int, tokens: int) -> jax.Array:
    """One uniform number in [0, 1) for every token that there may be of R = P·G rollouts, float32 [R, T].

    A function of the step's key, the prompt's id, the sample's and the token's number alone. All at once: the generator's rounds
    are two loops of small operations, which every decoding step would go through for a number a rollout.
    """

    def one(prompt_id: jax.Array, sample: jax.Array, token: jax.Array) -> jax.Array:
        ours = functools.reduce(jax.random.fold_in, (prompt_id, sample, token), key)
        return jax.random.uniform(ours, dtype=jnp.float32)

    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        one = jax.vmap(one, in_axes=axes)
    return one(prompt_ids_P, jnp.arange(samples), jnp.arange(tokens)).reshape(-1, tokens)


def truncate(logits_MxV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits of what is left to draw from: the `top_k` likeliest tokens (0: all), and of those the fewest that hold `top_p`.

    Ties at the border stay in. As elsewhere, `top_p` (nucleus sampling, arXiv 1904.09751) is a share of what `top_k` left.
    """
    if top_k == 0 and top_p == 1.0:
        return logits_MxV
    sorted_MxV = jnp.sort(logits_MxV, axis=-1, descending=True)
    least = sorted_MxV[:, -1:] if top_k == 0 else sorted_MxV[:, min(top_k, logits_MxV.shape[-1]) - 1, None]
    if top_p < 1.0:
        share_MxV = jax.nn.softmax(jnp.where(sorted_MxV >= least, sorted_MxV, -jnp.inf), axis=-1)
        # A token is in as long as those before it hold less than asked for: the first one always.
        inside_MxV = jnp.cumsum(share_MxV, axis=-1) - share_MxV < top_p
        least = jnp.maximum(least, jnp.min(jnp.where(inside_MxV, sorted_MxV, jnp.inf), axis=-1, keepdims=True))
    return jnp.where(logits_MxV >= least, logits_MxV, jnp.finfo(jnp.float32).min)


def sample_tokens(logits_MxV: jax.Array, uniform_M: jax.Array) -> jax.Array:
    """Draw one token a row from softmax(logits) by inverting its distribution function, int32 [M].

    One random number a token instead of V of Gumbel noise. The inversion is in two levels, a block of about √V tokens and
    then a token of it, so that no running sum over the whole vocabulary is formed.
    """
    rows, vocab = logits_MxV.shape
    width = math.isqrt(vocab - 1) + 1
    blocks = -(-vocab // width)
    # Gathered before it is filled up: to shift the borders of a split vocabulary, XLA would move parts between devices by an
    # operation that its CPU backend lets all replicas wait for, whose loops are not equally long: they would wait for ever.
    weights = nn.with_logical_constraint(jnp.exp(logits_MxV - logits_MxV.max(axis=-1, keepdims=True)), (None, None))
    weights = jnp.pad(weights, ((0, 0), (0, blocks * width - vocab))).reshape(rows, blocks, width)
    sums_MxB = weights.sum(axis=-1)
    ends_MxB = jnp.cumsum(sums_MxB, axis=-1)
    # Blocks with some weight alone: running sums that are added up as trees may rise where nothing was added, and the end of
    # the interval would belong to the blocks that a vocabulary is padded with.
    weighty_MxB = jnp.where(sums_MxB > 0, ends_MxB, 0.0)
    target_M = uniform_M * weighty_MxB.max(axis=-1)
    block_M = jnp.argmax(weighty_MxB > target_M[:, None], axis=-1)
    before_M = jnp.where(block_M > 0, jnp.take_along_axis(ends_MxB, block_M[:, None] - 1, axis=1)[:, 0], 0.0)
    inside_MxW = jnp.take_along_axis(weights, block_M[:, None, None], axis=1)[:, 0]
    ends_MxW = jnp.cumsum(inside_MxW, axis=-1)
    passed = (ends_MxW > (target_M - before_M)[:, None]) & (inside_MxW > 0)
    # The two levels round apart: where none passes, the last token of the block that has any weight is meant.
    last_M = width - 1 - jnp.argmax(inside_MxW[:, ::-1] > 0, axis=-1)
    token_M = jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last_M)
    return (block_M * width + token_M).astype(jnp.int32)
