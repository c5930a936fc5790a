"""Dense reference implementation of the objective: full sequences without sharing, packing, chunks or skipped groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.model.transformer import Params, head
from rpt_jax.objective.batch import UpdateBatch
from tests.helpers.policy_reference import SHALLOW, SHAPE

LOW, HIGH, TEMPERATURE = 0.2, 0.3, 0.8
P, G, S, T = 8, 3, 6, 5
ZERO_VARIANCE, UNCOUNTED = (1, 5), (2, 6)
Scores = Callable[[Params], tuple[jax.Array, jax.Array]]


def make_batch() -> UpdateBatch:
    """Return a batch in which every group counts, two groups have no variance, and padding would change the results.

    Prompts 1, 3, 4, 6 and 7 are from one document: 3 and 6 share two and four tokens with 1, 4 starts in the middle of
    the document, and 7 is too short to share anything.
    """
    rng = np.random.default_rng(0)
    advantages = rng.standard_normal((P, G)).astype(np.float32)
    advantages[list(ZERO_VARIANCE)] = 0
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G))[..., None]
    prompts = rng.integers(0, SHAPE.vocab, (P, S)).astype(np.int32)
    prompts[3, :2], prompts[6, :4] = prompts[1, :2], prompts[1, :4]
    return UpdateBatch(
        prompts_PxS=prompts,
        lengths_P=np.array([1, 6, 3, 4, 6, 2, 5, 1], np.int32),
        window_P=np.array([0, 9, 2, 9, 9, 5, 9, 9], np.int32),
        tokens_PxGxT=rng.integers(0, SHAPE.vocab, (P, G, T)).astype(np.int32),
        mask_PxGxT=mask,
        sampler_logprobs_PxGxT=np.where(mask, rng.standard_normal((P, G, T)) - 3, -np.inf).astype(np.float32),
        advantages_PxG=advantages,
        counted_P=np.ones(P, bool),
    )


def make_scores(batch: UpdateBatch) -> Scores:
    """Return a function of the parameters that returns log-probabilities and entropies, [P · G, T] each."""
    sequences = np.zeros((P * G, 1, S + T), np.int32)
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        sequence = [*batch.prompts_PxS[p, : batch.lengths_P[p]], *batch.tokens_PxGxT[p, g]]
        sequences[row, 0, : len(sequence)] = sequence
    index = np.repeat(batch.lengths_P, G)[:, None] + np.arange(T) - 1
    tokens = batch.tokens_PxGxT.reshape(-1, T)

    def score(params):
        positions = jnp.broadcast_to(jnp.arange(S + T, dtype=jnp.int32), sequences.shape)
        hidden, _ = SHALLOW.apply({"params": params}, sequences, positions)
        logits = jnp.einsum("bsd,vd->bsv", hidden[:, 0], head(SHALLOW, params).matrix_VxD) / TEMPERATURE
        predicting = jnp.take_along_axis(logits, index[..., None], axis=1)
        logprobs = jax.nn.log_softmax(predicting)
        entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.take_along_axis(logprobs, tokens[..., None], axis=2)[..., 0], entropies

    return score


class Dense(NamedTuple):
    """Results of the reference implementation.

    Attributes:
      logprobs_PxGxT: of the current policy.
      loss: the clipped loss.
      gradient: of the clipped loss.
      reinforce: gradient of the REINFORCE loss.
    """

    logprobs_PxGxT: jax.Array
    loss: jax.Array
    gradient: Params
    reinforce: Params


def make_dense(params: Params, batch: UpdateBatch, scores: Scores) -> Callable[[np.ndarray, np.ndarray], Dense]:
    """Return a function of (old_logprobs, counted_P) that evaluates the default objective, a mean over tokens."""
    mask, advantages = batch.mask_PxGxT.reshape(-1, T), jnp.asarray(batch.advantages_PxG).reshape(-1, 1)

    def clipped(params, old, counted):
        current = scores(params)[0]
        ratio = jnp.exp(current - old.reshape(-1, T))
        objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages)
        return -jnp.sum(objective * counted) / counted.sum(), current.reshape(P, G, T)

    def reinforce(params, counted):
        return -jnp.sum(scores(params)[0] * advantages * counted) / counted.sum()

    @jax.jit
    def everything(old, counted_P):
        counted = mask & jnp.repeat(counted_P, G)[:, None]
        (loss, current), gradient = jax.value_and_grad(clipped, has_aux=True)(params, old, counted)
        return Dense(
            logprobs_PxGxT=current, loss=loss, gradient=gradient, reinforce=jax.grad(reinforce)(params, counted)
        )

    return everything


BAND, LIMIT = (0.7, 1.4), 9


def objective(scores, params, batch, old, theirs, counted, options):
    """Return the loss of one batch with the given options: one sum over all counted tokens and one division."""
    current, entropies = (x.reshape(P, G, T) for x in scores(params))
    mask, advantages = batch.mask_PxGxT & counted[:, None, None], batch.advantages_PxG[..., None]
    ratio, x = jnp.exp(current - old), jnp.where(mask, current, 0.0)
    if options["loss"] == "gspo":
        log_ratio = jnp.where(mask, current - old, 0.0)
        ratio = jnp.exp(log_ratio.sum(-1, keepdims=True) / batch.mask_PxGxT.sum(-1, keepdims=True)) * jnp.ones(T)
        # As in the paper, every sequence counts once: its tokens share one gradient.
        ratio = jax.lax.stop_gradient(ratio) * jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
    clipped = jnp.clip(ratio, 1 - LOW, 1 + HIGH)
    terms = -jnp.minimum(ratio * advantages, clipped * advantages)
    if options["loss"] == "dual_clip":
        terms = jnp.where(advantages < 0, jnp.minimum(terms, -3.0 * advantages), terms)
    if options["loss"] in ("cispo", "reinforce"):
        terms = -advantages * x * (jax.lax.stop_gradient(clipped) if options["loss"] == "cispo" else 1.0)
    kept, importance = mask, jnp.exp(jnp.where(mask, old - batch.sampler_logprobs_PxGxT, 0.0))
    if options.get("importance") == "truncate":
        terms = terms * jnp.minimum(importance, BAND[1])
    if options.get("importance") == "mask":
        kept = mask & (importance > BAND[0]) & (importance < BAND[1])
        terms = terms * importance
    if options.get("kl"):
        difference = current - theirs
        k1 = jax.lax.stop_gradient(difference) * current
        kl = k1 if options["kl"] == "k1" else jnp.exp(-difference) - 1 + difference
        terms = terms + options["kl_weight"] * kl
    terms = jnp.where(kept, terms - options.get("entropy_weight", 0) * entropies, 0.0)
    if options.get("aggregation") == "sequence_mean":
        per_sequence = terms.sum(-1) / jnp.maximum(kept.sum(-1), 1)
        return per_sequence.sum() / kept.any(-1).sum()
    return terms.sum() / (LIMIT * kept.any(-1).sum() if options.get("aggregation") == "constant" else kept.sum())
