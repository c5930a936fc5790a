"""Log-probabilities of given tokens: one definition for the sampler and the trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from rpt_jax.model.precision import head_product
from rpt_jax.model.transformer import Head

Output = TypeVar("Output")


def scaled_logits(head: Head, hidden_MxD: jax.Array, temperature: float) -> jax.Array:
    """Return logits divided by the temperature, float32 [M, V], for hidden states of any dtype.

    All sampling and scoring uses this function. A precision, a temperature or excluded ids on one side only would
    silently make training off-policy.
    """
    logits = head_product(hidden_MxD, head.matrix_VxD, head.precision) / temperature
    if head.absent_V is None:
        return logits
    # The probability is exactly zero. -inf would turn masked padding into NaN (0 · -inf).
    return jnp.where(head.absent_V, jnp.finfo(jnp.float32).min, logits)


def chosen_logprobs(logits_MxV: jax.Array, tokens_M: jax.Array) -> jax.Array:
    """Return log softmax(logits)[token], float32 [M]."""
    chosen_M = jnp.take_along_axis(logits_MxV, tokens_M[:, None], axis=-1)[:, 0]
    return chosen_M - jax.nn.logsumexp(logits_MxV, axis=-1)


def over_token_chunks(fn: Callable[..., Output], logit_chunk_tokens: int, *arrays: jax.Array) -> Output:
    """Apply `fn` to `arrays` [M, …] in chunks of tokens and concatenate its outputs.

    The backward pass recomputes each chunk, so intermediate values of `fn` such as logits exist for one chunk at a
    time. M need not be a multiple of the chunk size: the last chunk is padded with zeros, and the padding is removed
    from the outputs.
    """
    outputs = over_row_chunks(fn, logit_chunk_tokens, None, *(x[None] for x in arrays))
    return jax.tree.map(lambda y: y[0], outputs)


def over_row_chunks(
    fn: Callable[..., Output], logit_chunk_tokens: int, filled_N: jax.Array | None, *arrays: jax.Array
) -> Output:
    """Apply `fn` to `arrays` [N, W, …] in chunks of columns and concatenate its outputs.

    Chunks of columns let devices that hold different rows, or different columns of them, work on every chunk.

    Args:
      fn: maps arrays [M, …] to a tree of arrays [M, …].
      logit_chunk_tokens: tokens per chunk, over all N rows.
      filled_N: number of tokens at the start of each row that are needed, or None for all. Chunks without a needed
        token are skipped, and their outputs are zeros.
      arrays: inputs of `fn` with the axes N and W in place of M.

    Raises: ValueError, if the chunk has no tokens.
    """
    if logit_chunk_tokens < 1:
        raise ValueError("training.logit_chunk_tokens has not been planned.")
    rows, size = arrays[0].shape[:2]
    width = min(max(1, logit_chunk_tokens // rows), size)
    chunks = -(-size // width)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * width - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, width, *x.shape[2:]), 1, 0)

    def run(inputs: tuple[jax.Array, ...]) -> Output:
        first, *xs = inputs
        flat = [x.reshape(rows * width, *x.shape[2:]) for x in xs]
        if filled_N is None:
            return fn(*flat)
        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(fn, *flat))
        return jax.lax.cond(first < filled_N.max(), fn, lambda *_: zeros, *flat)

    # The checkpoint is outside of the condition: inside, what `fn` captures (the head) would be saved once per chunk.
    outputs = jax.lax.map(jax.checkpoint(run), (jnp.arange(chunks) * width, *(split(x) for x in arrays)))

    def concatenate(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y.reshape(chunks, rows, width, *y.shape[2:]), 0, 1)
        return y.reshape(rows, chunks * width, *y.shape[3:])[:, :size]

    return jax.tree.map(concatenate, outputs)


@jax.named_scope("token_logprobs")
def token_logprobs(
    head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, temperature: float, logit_chunk_tokens: int
) -> jax.Array:
    """Return the log-probability of each token, float32 [M], without forming logits [M, V].

    Args:
      head: the policy's output head.
      hidden_MxD: hidden states that predict the tokens; leading axes flattened into M.
      tokens_M: int32 ids.
      temperature: sampling temperature; 1 for next-token cross-entropy.
      logit_chunk_tokens: tokens whose logits exist at once.
    """
    score = functools.partial(scores, head, temperature=temperature)
    return over_token_chunks(score, logit_chunk_tokens, hidden_MxD, tokens_M)[0]


def scores(
    head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, *, temperature: float, entropies: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Return the log-probability of each token and, if `entropies`, its entropy in nats, float32 [M] each."""
    logits_MxV = scaled_logits(head, hidden_MxD, temperature)
    logprobs_M = chosen_logprobs(logits_MxV, tokens_M)
    if not entropies:
        return logprobs_M, None
    probs_MxV = jax.nn.softmax(logits_MxV, axis=-1)
    # A logit of -inf has probability zero, and 0 · -inf would be NaN.
    mean_M = jnp.sum(probs_MxV * jnp.where(probs_MxV > 0, logits_MxV, 0.0), axis=-1)
    return logprobs_M, jax.nn.logsumexp(logits_MxV, axis=-1) - mean_M
