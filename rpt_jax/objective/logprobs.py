"""Log-probabilities of given tokens: one definition for the sampler and for the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from rpt_jax.policy.transformer import Head

Output = TypeVar("Output")


def scaled_logits(head: Head, hidden_MxD: jax.Array, temperature: float) -> jax.Array:
    """Logits at the sampling temperature, float32 [M, V], whatever the dtype of the trunk.

    Everything that samples or scores goes through here: a head in lower precision, a temperature on one side only, or an id
    that only one side knows to stand for no token, makes "on-policy" silently false.
    """
    hidden_MxD = hidden_MxD.astype(jnp.float32)
    logits = jnp.einsum("md,vd->mv", hidden_MxD, head.matrix_VxD, preferred_element_type=jnp.float32) / temperature
    if head.absent_V is None:
        return logits
    # Of probability exactly zero. Not -inf, which is NaN times the zero of a mask, as where padding is scored.
    return jnp.where(head.absent_V, jnp.finfo(jnp.float32).min, logits)


def chosen_logprobs(logits_MxV: jax.Array, tokens_M: jax.Array) -> jax.Array:
    """log softmax(logits)[token], float32 [M]."""
    chosen_M = jnp.take_along_axis(logits_MxV, tokens_M[:, None], axis=-1)[:, 0]
    return chosen_M - jax.nn.logsumexp(logits_MxV, axis=-1)


def over_token_chunks(fn: Callable[..., Output], chunk: int, *arrays: jax.Array) -> Output:
    """Apply `fn` to `arrays` [M, …] in chunks of `chunk` tokens and glue its [chunk, …] outputs together again.

    The backward pass recomputes each chunk, so that what `fn` forms inside (logits) exists for one chunk at a time.
    M need not be a multiple of `chunk`; the last chunk is filled up with zeros, which are cut off again.
    """
    size = arrays[0].shape[0]
    chunk = min(chunk, size)
    chunks = -(-size // chunk)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, chunks * chunk - size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(chunks, chunk, *x.shape[1:])

    outputs = jax.lax.map(lambda xs: jax.checkpoint(fn)(*xs), tuple(split(x) for x in arrays))
    return jax.tree.map(lambda y: y.reshape(chunks * chunk, *y.shape[2:])[:size], outputs)


def token_logprobs(head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, temperature: float, chunk: int) -> jax.Array:
    """Log-probability of each token at `temperature`, float32 [M]; [M, V] is never in memory.

    Args:
      head: of the policy.
      hidden_MxD: the states that predict the tokens; any leading axes flattened into M.
      tokens_M: int32 ids.
      temperature: of the sampler; 1 for next-token cross-entropy.
      chunk: tokens whose logits exist at one time.
    """

    def score(hidden_MxD: jax.Array, tokens_M: jax.Array) -> jax.Array:
        return chosen_logprobs(scaled_logits(head, hidden_MxD, temperature), tokens_M)

    return over_token_chunks(score, chunk, hidden_MxD, tokens_M)


def token_logprobs_and_entropies(
    head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs`, and the entropy in nats of the distribution that each token was drawn from, float32 [M] each."""

    def score(hidden_MxD: jax.Array, tokens_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_MxV = scaled_logits(head, hidden_MxD, temperature)
        probs_MxV = jax.nn.softmax(logits_MxV, axis=-1)
        # Where a logit is -inf its probability is zero, and zero times it would be no number.
        mean_M = jnp.sum(probs_MxV * jnp.where(probs_MxV > 0, logits_MxV, 0.0), axis=-1)
        return chosen_logprobs(logits_MxV, tokens_M), jax.nn.logsumexp(logits_MxV, axis=-1) - mean_M

    return over_token_chunks(score, chunk, hidden_MxD, tokens_M)
