"""Log-probabilities of given tokens: one definition for the sampler and for the trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from rpt_jax.model.transformer import Head

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
    outputs = over_row_chunks(fn, chunk, None, *(x[None] for x in arrays))
    return jax.tree.map(lambda y: y[0], outputs)


def over_row_chunks(fn: Callable[..., Output], chunk: int, filled_N: jax.Array | None, *arrays: jax.Array) -> Output:
    """`over_token_chunks` for `arrays` [N, W, …], rows that devices share: a chunk is some columns, so all have their part in it.

    `filled_N` tells how many tokens at the beginning of each row count (None: all). Chunks in which none does are not run:
    there the outputs are zeros.
    """
    rows, size = arrays[0].shape[:2]
    width = min(max(1, chunk // rows), size)
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

    # Recomputed around the condition, not in it: what `fn` reads (the head) would be kept once for every chunk.
    outputs = jax.lax.map(jax.checkpoint(run), (jnp.arange(chunks) * width, *(split(x) for x in arrays)))

    def glue(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y.reshape(chunks, rows, width, *y.shape[2:]), 0, 1)
        return y.reshape(rows, chunks * width, *y.shape[3:])[:, :size]

    return jax.tree.map(glue, outputs)


def token_logprobs(head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, temperature: float, chunk: int) -> jax.Array:
    """Log-probability of each token at `temperature`, float32 [M]; [M, V] is never in memory.

    Args:
      head: of the policy.
      hidden_MxD: the states that predict the tokens; any leading axes flattened into M.
      tokens_M: int32 ids.
      temperature: of the sampler; 1 for next-token cross-entropy.
      chunk: tokens whose logits exist at one time.
    """
    score = functools.partial(scores, head, temperature=temperature)
    return over_token_chunks(score, chunk, hidden_MxD, tokens_M)[0]


def scores(
    head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, *, temperature: float, entropies: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of each token and, where asked, the entropy in nats of what it was drawn from, float32 [M] each."""
    logits_MxV = scaled_logits(head, hidden_MxD, temperature)
    logprobs_M = chosen_logprobs(logits_MxV, tokens_M)
    if not entropies:
        return logprobs_M, None
    probs_MxV = jax.nn.softmax(logits_MxV, axis=-1)
    # Where a logit is -inf its probability is zero, and zero times it would be no number.
    mean_M = jnp.sum(probs_MxV * jnp.where(probs_MxV > 0, logits_MxV, 0.0), axis=-1)
    return logprobs_M, jax.nn.logsumexp(logits_MxV, axis=-1) - mean_M
