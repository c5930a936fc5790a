"""Policy-gradient losses per token, KL estimators, importance weights and aggregations, by name.

A loss is aggregated as a numerator and a denominator, which are summed over microbatches and devices and divided once, so that
the result does not depend on how the batch is split.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.registry import AGGREGATIONS, IMPORTANCE_WEIGHTS, KL_ESTIMATORS, LOSSES


class ClipRange(NamedTuple):
    """Bounds of the probability ratio.

    Attributes:
      low: the ratio is clipped below at 1 - low.
      high: the ratio is clipped above at 1 + high.
      dual: "dual_clip" bounds the loss of a token with a negative advantage A at dual · |A|.
    """

    low: float
    high: float
    dual: float = 3.0


class TokenLoss(NamedTuple):
    """Results per token, in the shape of the log-probabilities. Values outside of the mask are finite but undefined.

    Attributes:
      loss: negative objective, float32.
      ratio: exp(logprob - old logprob), float32; of the sequence for GSPO.
      clipped: bool, whether clipping changed the objective, or the weight for CISPO.
    """

    loss: jax.Array
    ratio: jax.Array
    clipped: jax.Array


# --- Losses. Every function takes:
#   logprobs       float32 [..., T] log-probabilities of the sampled tokens under the current policy.
#   old_logprobs   float32 [..., T] under the policy that sampled. With exactly on-policy updates these are
#                  `stop_gradient(logprobs)`: the ratio is 1, and its gradient is that of log π.
#   advantages     broadcast against `logprobs`.
#   mask           bool, True for response tokens up to and including the stop token.
#   clip_range     bounds of the ratio.


@LOSSES.register("clip", fields=("clip_low", "clip_high"))
def clipped_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """Clipped surrogate of PPO and GRPO: -min(ρ A, clip(ρ, 1 - low, 1 + high) A).

    See 1707.06347, Equation 7, and 2402.03300, Equation 3. Separate lower and upper bounds follow DAPO (2503.14476).
    """
    ratio = jnp.exp(_masked(mask, logprobs - old_logprobs))
    unclipped = ratio * advantages
    clipped = jnp.clip(ratio, 1.0 - clip_range.low, 1.0 + clip_range.high) * advantages
    return TokenLoss(loss=-jnp.minimum(unclipped, clipped), ratio=ratio, clipped=clipped < unclipped)


@LOSSES.register("dual_clip", fields=("clip_low", "clip_high", "dual_clip"))
def dual_clipped_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """The clipped surrogate, with the objective bounded below by c A for A < 0, c = `clip_range.dual` (1912.09729).

    Without this bound, a bad token that has become much more likely since it was sampled dominates the loss.
    """
    token = clipped_loss(logprobs, old_logprobs, advantages, mask, clip_range)
    lower_bound = clip_range.dual * advantages
    bounded = (advantages < 0) & (-token.loss < lower_bound)
    return TokenLoss(
        loss=jnp.where(bounded, -lower_bound, token.loss), ratio=token.ratio, clipped=token.clipped | bounded
    )


@LOSSES.register("gspo", fields=("clip_low", "clip_high"), needs=(("aggregation", "sequence_mean"),))
def gspo_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """GSPO: the clipped surrogate with one ratio per sequence, s = (π / π_old)^(1 / |o|) (2507.18071).

    This is the paper's GSPO-token variant, whose mean over a sequence is the sequence loss. The config check rejects
    other aggregations.
    """
    log_ratio = _masked(mask, logprobs - old_logprobs)
    length = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    sequence = log_ratio.sum(axis=-1, keepdims=True) / length
    # Each token has the value of the sequence's ratio and the gradient of its own.
    token = jax.lax.stop_gradient(sequence) + log_ratio - jax.lax.stop_gradient(log_ratio)
    return clipped_loss(token, jnp.zeros_like(token), advantages, mask, clip_range)


@LOSSES.register("cispo", fields=("clip_low", "clip_high"))
def cispo_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """CISPO: -sg(clip(ρ, 1 - low, 1 + high)) A log π, which keeps the gradient of clipped tokens (2506.13585).

    The paper uses no lower bound, which corresponds to low = 1.
    """
    ratio = jnp.exp(_masked(mask, logprobs - old_logprobs))
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_range.low, 1.0 + clip_range.high))
    return TokenLoss(loss=-weight * advantages * _masked(mask, logprobs), ratio=ratio, clipped=weight != ratio)


@LOSSES.register("reinforce")
def reinforce_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """REINFORCE: -A log π (Williams, 1992). It has no ratio, so it assumes samples of the current policy."""
    ratio = jnp.exp(_masked(mask, logprobs - old_logprobs))
    return TokenLoss(loss=-advantages * _masked(mask, logprobs), ratio=ratio, clipped=jnp.zeros_like(mask))


# --- Estimators of KL(π || π_ref) at the sampled token (Schulman, "Approximating KL divergence", 2020), used as loss
# terms.


@KL_ESTIMATORS.register("k1")
def k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """log π - log π_ref, with the gradient of the score function, (log π - log π_ref) ∇ log π.

    The gradient of the difference itself has mean zero and would not constrain the policy (2510.01555).
    """
    difference = jax.lax.stop_gradient(logprobs - reference)
    return difference * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))


@KL_ESTIMATORS.register("k2")
def k2(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """(log π - log π_ref)² / 2, which has the gradient of `k1` and is never negative."""
    return jnp.square(logprobs - reference) / 2


@KL_ESTIMATORS.register("k3")
def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """π_ref / π - 1 - log(π_ref / π) (GRPO, 2402.03300, Equation 4). The value is unbiased, its gradient is not."""
    log_ratio = reference - logprobs
    return jnp.expm1(log_ratio) - log_ratio


# --- Importance weights that correct numerical differences between sampler and trainer, ρ = π_old (trainer) / π_old
# (sampler). Every function returns the weight of each token and whether the token is accepted.


@IMPORTANCE_WEIGHTS.register("truncate", fields=("importance_high",))
def truncated_importance(ratio: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """TIS: weights min(ρ, high); all tokens are accepted (Yao et al., 2025)."""
    return jnp.minimum(ratio, high), jnp.ones_like(ratio, bool)


@IMPORTANCE_WEIGHTS.register("mask", fields=("importance_low", "importance_high"))
def masked_importance(ratio: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """Weights ρ; tokens with ρ in [low, high] are accepted (IcePop, Ling team, 2025)."""
    return ratio, (ratio >= low) & (ratio <= high)


# --- Aggregations. Every function takes `kept` (bool [..., T], tokens that count) and `max_new_tokens` (length limit of
# responses) and returns the weight of each token in the numerator, and the contribution of these responses to the
# denominator.


@AGGREGATIONS.register("token_mean")
def token_mean(kept: jax.Array, max_new_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Mean over all tokens, so that long responses weigh more (DAPO, 2503.14476, Equation 8; verl's default)."""
    return kept.astype(jnp.float32), kept.sum()


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(kept: jax.Array, max_new_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Mean over responses of the mean over their tokens (GRPO, 2402.03300, Equation 3).

    Responses without a token that counts are excluded.
    """
    length = kept.sum(axis=-1, keepdims=True)
    return kept / jnp.maximum(length, 1), (length > 0).sum()


@AGGREGATIONS.register("constant")
def constant(kept: jax.Array, max_new_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Mean over responses of their sums divided by the length limit (Dr. GRPO, 2503.20783).

    No weight depends on a response's length.
    """
    return kept / max_new_tokens, kept.any(axis=-1).sum()


def _masked(mask: jax.Array, x: jax.Array) -> jax.Array:
    # Zero instead of padding, which may hold any value: even under a mask, -inf would make the gradient NaN.
    return jnp.where(mask, x, 0.0)
