"""Logits, one definition for the sampler and the trainer, and log-probabilities of given tokens with their gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from rpt_jax.model.precision import head_product
from rpt_jax.model.transformer import Head
from rpt_jax.objective.token_chunks import TokenChunks

Output = TypeVar("Output")

# Tokens per matrix product where all logits are kept: enough for it to be efficient, and chunks without a needed token are
# skipped.
_KEPT_CHUNK_TOKENS = 4096


class TokenScores(NamedTuple):
    """Scores of tokens, float32.

    Attributes:
      logprobs: log π(token).
      entropies: of the distribution that the token is from, in nats; None if they were not asked for.
    """

    logprobs: jax.Array
    entropies: jax.Array | None


class _Scoring(NamedTuple):
    """How tokens are scored; static.

    Attributes:
      temperature: logits are divided by it.
      entropies: whether entropies are computed.
      chunks: of the tokens.
      keep: whether the forward pass keeps all logits, or the backward pass computes them again, chunk by chunk.
    """

    temperature: float
    entropies: bool
    chunks: TokenChunks
    keep: bool


class _ChunkScores(NamedTuple):
    """What the forward pass computes for M tokens, and the backward pass needs.

    Attributes:
      scores: [M].
      totals_M: logsumexp of the logits.
      logits_MxV: float32, or None.
    """

    scores: TokenScores
    totals_M: jax.Array
    logits_MxV: jax.Array | None


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


def over_token_chunks(fn: Callable[..., Output], logit_chunk_tokens: int, *arrays: jax.Array) -> Output:
    """Apply `fn` to `arrays` [M, …] in chunks of tokens and concatenate its outputs.

    M need not be a multiple of the chunk size: the last chunk is padded with zeros, and the padding is removed from the
    outputs.
    """
    chunks = _chunks(1, len(arrays[0]), logit_chunk_tokens)
    inputs = chunks.split([x[None] for x in arrays])
    _, outputs = chunks.scan(lambda total, xs: (total, fn(*xs)), None, None, inputs, unroll=False)
    return jax.tree.map(lambda y: y[0], chunks.join(outputs))


@jax.named_scope("token_logprobs")
def token_logprobs(
    head: Head, hidden_MxD: jax.Array, tokens_M: jax.Array, temperature: float, logit_chunk_tokens: int
) -> jax.Array:
    """Return the log-probability of each token, float32 [M].

    Args:
      head: the policy's output head.
      hidden_MxD: hidden states that predict the tokens; leading axes flattened into M.
      tokens_M: int32 ids.
      temperature: sampling temperature; 1 for next-token cross-entropy.
      logit_chunk_tokens: tokens whose logits exist at once.
    """
    scores = token_scores(
        head, None, hidden_MxD[None], tokens_M[None], temperature=temperature, logit_chunk_tokens=logit_chunk_tokens
    )
    return scores.logprobs[0]


@jax.named_scope("token_logprobs")
def token_scores(
    head: Head,
    filled_N: jax.Array | None,
    hidden_NxWxD: jax.Array,
    tokens_NxW: jax.Array,
    *,
    temperature: float,
    logit_chunk_tokens: int,
    entropies: bool = False,
) -> TokenScores:
    """Return the log-probability of each token and, if `entropies`, the entropy of its distribution, [N, W] each.

    With logits z, p = softmax(z), a token y and the entropy H = -Σ p log p,

        log π(y) = z_y - log Σ exp z      d log π(y) / dz_v = [v = y] - p_v      dH / dz_v = -p_v (log p_v + H).

    Where the logits of all tokens may exist at once, they are kept for the backward pass, which then has two matrix
    products of the head. Otherwise it computes them again, chunk by chunk. The gradient of the head's matrix cannot be
    computed in the forward pass instead: it is a sum over tokens, weighted by derivatives of the loss that are not known yet.

    Args:
      head: the policy's output head.
      filled_N: number of tokens at the start of each row that are needed, or None for all. The scores of the others are
        undefined, and have no gradient.
      hidden_NxWxD: hidden states that predict the tokens.
      tokens_NxW: int32 ids.
      temperature: sampling temperature.
      logit_chunk_tokens: tokens whose logits exist at once.
      entropies: whether to compute entropies.

    Raises: ValueError, if `logit_chunk_tokens` is 0.
    """
    rows, size = tokens_NxW.shape
    keep = rows * size <= logit_chunk_tokens
    chunk_tokens = logit_chunk_tokens
    if keep:
        chunk_tokens = -(-rows * size // -(-rows * size // _KEPT_CHUNK_TOKENS))
    scoring = _Scoring(temperature, entropies, _chunks(rows, size, chunk_tokens), keep)
    return _scores(scoring, head, filled_N, hidden_NxWxD, tokens_NxW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    scoring: _Scoring, head: Head, filled_N: jax.Array | None, hidden_NxWxD: jax.Array, tokens_NxW: jax.Array
) -> TokenScores:
    results = _score_chunks(scoring._replace(keep=False), head, filled_N, hidden_NxWxD, tokens_NxW)
    return scoring.chunks.join(results.scores)


def _score_chunks(
    scoring: _Scoring, head: Head, filled_N: jax.Array | None, hidden_NxWxD: jax.Array, tokens_NxW: jax.Array
) -> _ChunkScores:
    """Return the scores of all chunks, stacked."""

    def score(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, _ChunkScores]:
        hidden_MxD, tokens_M = inputs
        logits_MxV = scaled_logits(head, hidden_MxD, scoring.temperature)
        totals_M = jax.nn.logsumexp(logits_MxV, axis=-1)
        entropies_M = _entropies(logits_MxV, totals_M) if scoring.entropies else None
        chosen_M = jnp.take_along_axis(logits_MxV, tokens_M[:, None], axis=-1)[:, 0]
        scores = TokenScores(chosen_M - totals_M, entropies_M)
        return None, _ChunkScores(scores, totals_M, logits_MxV if scoring.keep else None)

    chunks = scoring.chunks
    return chunks.scan(score, None, filled_N, chunks.split((hidden_NxWxD, tokens_NxW)), unroll=scoring.keep)[1]


def _scores_forward(
    scoring: _Scoring, head: Head, filled_N: jax.Array | None, hidden_NxWxD: jax.Array, tokens_NxW: jax.Array
) -> tuple[TokenScores, tuple[Any, ...]]:
    results = _score_chunks(scoring, head, filled_N, hidden_NxWxD, tokens_NxW)
    return scoring.chunks.join(results.scores), (head, filled_N, hidden_NxWxD, tokens_NxW, results)


def _scores_backward(scoring: _Scoring, saved: tuple[Any, ...], gradients: TokenScores) -> tuple[Any, ...]:
    head, filled_N, hidden_NxWxD, tokens_NxW, results = saved

    def differentiate(total_VxD: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_MxD, tokens_M, of_scores, forward = inputs

        def logits_of(matrix_VxD: jax.Array, hidden_MxD: jax.Array) -> jax.Array:
            return scaled_logits(dataclasses.replace(head, matrix_VxD=matrix_VxD), hidden_MxD, scoring.temperature)

        # The compiler drops this product if the logits were kept.
        logits_MxV, pull_back = jax.vjp(logits_of, head.matrix_VxD, hidden_MxD)
        logits_MxV = logits_MxV if forward.logits_MxV is None else forward.logits_MxV
        logprobs_MxV = logits_MxV - forward.totals_M[:, None]
        probs_MxV = jnp.exp(logprobs_MxV)
        is_token_MxV = jnp.arange(logits_MxV.shape[1]) == tokens_M[:, None]
        of_logits_MxV = of_scores.logprobs[:, None] * (is_token_MxV - probs_MxV)
        if scoring.entropies:
            slopes_MxV = probs_MxV * (logprobs_MxV + forward.scores.entropies[:, None])
            of_logits_MxV -= of_scores.entropies[:, None] * slopes_MxV
        of_matrix_VxD, of_hidden_MxD = pull_back(of_logits_MxV)
        return total_VxD + of_matrix_VxD, of_hidden_MxD

    chunks = scoring.chunks
    inputs = (*chunks.split((hidden_NxWxD, tokens_NxW, gradients)), results)
    zeros_VxD = jnp.zeros_like(head.matrix_VxD)
    of_matrix_VxD, of_hidden = chunks.scan(differentiate, zeros_VxD, filled_N, inputs, unroll=scoring.keep)
    of_head = dataclasses.replace(head, matrix_VxD=of_matrix_VxD, absent_V=None)
    return of_head, None, chunks.join(of_hidden), None


_scores.defvjp(_scores_forward, _scores_backward)


def _chunks(rows: int, size: int, logit_chunk_tokens: int) -> TokenChunks:
    if logit_chunk_tokens < 1:
        raise ValueError("training.logit_chunk_tokens has not been planned.")
    return TokenChunks(rows=rows, size=size, width=min(max(1, logit_chunk_tokens // rows), size))


def _entropies(logits_MxV: jax.Array, totals_M: jax.Array) -> jax.Array:
    """Return entropies in nats, float32 [M], from logits and their logsumexp."""
    probs_MxV = jnp.exp(logits_MxV - totals_M[:, None])
    # A logit of -inf has probability zero, and 0 · -inf would be NaN.
    return totals_M - jnp.sum(probs_MxV * jnp.where(probs_MxV > 0, logits_MxV, 0.0), axis=-1)
