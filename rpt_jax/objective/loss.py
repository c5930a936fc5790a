"""The policy-gradient losses, token by token, and how tokens become one number: each equation a function, chosen by name.

A loss is a numerator and a denominator that add up over microbatches; whoever adds them divides once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.registry import AGGREGATIONS, IMPORTANCE_WEIGHTS, KL_ESTIMATORS, LOSSES


class ClipRange(NamedTuple):
    """The ratio may move within [1 - low, 1 + high]; `dual` bounds what a bad token costs."""

    low: float
    high: float
    dual: float = 3.0


class TokenLoss(NamedTuple):
    """Of every token, in the shape of its log-probability; what is not under the mask means nothing, but is finite."""

    loss: jax.Array  # The objective's negative.
    ratio: jax.Array  # exp(logprob - old logprob), of the sequence for GSPO.
    clipped: jax.Array  # bool: the clip bounds the objective, or the weight.


# --- The objective. Every function takes:
#   logprobs       float32 [..., T], of the sampled tokens under the policy that is being trained.
#   old_logprobs   the same under the policy that sampled. Exactly on-policy these are `stop_gradient(logprobs)`: the ratio is 1
#                  and its gradient is the score function's.
#   advantages     broadcast against `logprobs`.
#   mask           bool, True for response tokens up to and including the stop token.
#   bounds         of the ratio.


@LOSSES.register("clip", fields=("clip_low", "clip_high"))
def clipped_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> TokenLoss:
    """Clipped surrogate of PPO as GRPO uses it (1707.06347, Equation 7; 2402.03300, Equation 3), bounds apart as in DAPO
    (2503.14476): -min(ρ A, clip(ρ, 1 - low, 1 + high) A).
    """
    ratio = jnp.exp(_where(mask, logprobs - old_logprobs))
    free = ratio * advantages
    bounded = jnp.clip(ratio, 1.0 - bounds.low, 1.0 + bounds.high) * advantages
    return TokenLoss(-jnp.minimum(free, bounded), ratio, bounded < free)


@LOSSES.register("dual_clip", fields=("clip_low", "clip_high", "dual_clip"))
def dual_clipped_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> TokenLoss:
    """The clipped surrogate, and for A < 0 no less than c A, with c = `bounds.dual` (1912.09729).

    Else a token that has become far likelier than when it was sampled, and was bad, outweighs all others.
    """
    token = clipped_loss(logprobs, old_logprobs, advantages, mask, bounds)
    floor = bounds.dual * advantages
    stopped = (advantages < 0) & (-token.loss < floor)
    return TokenLoss(jnp.where(stopped, -floor, token.loss), token.ratio, token.clipped | stopped)


@LOSSES.register("gspo", fields=("clip_low", "clip_high"), needs=(("aggregation", "sequence_mean"),))
def gspo_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> TokenLoss:
    """GSPO: the clipped surrogate with one ratio a sequence, s = (π / π_old)^(1 / |o|) (2507.18071).

    Written for tokens (its GSPO-token), whose sequence mean is the paper's loss: the config refuses another aggregation.
    """
    log_ratio = _where(mask, logprobs - old_logprobs)
    length = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    sequence = log_ratio.sum(axis=-1, keepdims=True) / length
    # Each token carries the whole ratio, and only its own share of the gradient.
    own = jax.lax.stop_gradient(sequence) + log_ratio - jax.lax.stop_gradient(log_ratio)
    return clipped_loss(own, jnp.zeros_like(own), advantages, mask, bounds)


@LOSSES.register("cispo", fields=("clip_low", "clip_high"))
def cispo_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> TokenLoss:
    """CISPO: -sg(clip(ρ, 1 - low, 1 + high)) A log π (2506.13585): clipped tokens keep their gradient.

    Its authors have no lower bound, which is low = 1.
    """
    ratio = jnp.exp(_where(mask, logprobs - old_logprobs))
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - bounds.low, 1.0 + bounds.high))
    return TokenLoss(-weight * advantages * _where(mask, logprobs), ratio, weight != ratio)


@LOSSES.register("reinforce")
def reinforce_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, bounds: ClipRange
) -> TokenLoss:
    """REINFORCE: -A log π (Williams, 1992). Without a ratio, and so for samples of the present policy."""
    ratio = jnp.exp(_where(mask, logprobs - old_logprobs))
    return TokenLoss(-advantages * _where(mask, logprobs), ratio, jnp.zeros_like(mask))


# --- KL(π || π_ref), estimated at the sampled token (Schulman, "Approximating KL divergence", 2020), as a term of the loss.


@KL_ESTIMATORS.register("k1")
def k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """log π - log π_ref, whose gradient is the score function's, (log π - log π_ref) ∇ log π.

    The gradient of the difference itself is zero on average and would hold the policy nowhere (2510.01555).
    """
    difference = jax.lax.stop_gradient(logprobs - reference)
    return difference * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))


@KL_ESTIMATORS.register("k2")
def k2(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """(log π - log π_ref)² / 2. Its gradient is that of `k1`; its value is never negative."""
    return jnp.square(logprobs - reference) / 2


@KL_ESTIMATORS.register("k3")
def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """π_ref / π - 1 - log(π_ref / π), GRPO's own (2402.03300, Equation 4). Unbiased in its value, not in its gradient."""
    log_ratio = reference - logprobs
    return jnp.expm1(log_ratio) - log_ratio


# --- What the sampler believed is not quite what the trainer does: ρ = π_old (trainer) / π_old (sampler) corrects for it.


@IMPORTANCE_WEIGHTS.register("truncate", fields=("importance_high",))
def truncated_importance(ratio: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """TIS: weights min(ρ, high), and every token accepted (Yao et al., 2025)."""
    return jnp.minimum(ratio, high), jnp.ones_like(ratio, bool)


@IMPORTANCE_WEIGHTS.register("mask", fields=("importance_low", "importance_high"))
def masked_importance(ratio: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """Weights ρ, and tokens accepted whose ρ is in [low, high] (IcePop, Ling team, 2025)."""
    return ratio, (ratio >= low) & (ratio <= high)


# --- Aggregation. Every function takes `kept` (bool [..., T], the tokens that count) and `limit` (the most tokens that a
# response may have), and returns the weight of each token in the numerator, and what these responses add to the denominator.


@AGGREGATIONS.register("token_mean")
def token_mean(kept: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Every token weighs the same, long responses more (DAPO, 2503.14476, Equation 8; verl's default, and ours)."""
    return kept.astype(jnp.float32), kept.sum()


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(kept: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Every response weighs the same, as the mean of its tokens (GRPO, 2402.03300, Equation 3).

    One without any token left is not counted.
    """
    length = kept.sum(axis=-1, keepdims=True)
    return kept / jnp.maximum(length, 1), (length > 0).sum()


@AGGREGATIONS.register("constant")
def constant(kept: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Sums of responses over a constant, the length limit: no weight depends on a length (Dr. GRPO, 2503.20783)."""
    return kept / limit, kept.any(axis=-1).sum()


def _where(mask: jax.Array, x: jax.Array) -> jax.Array:
    # Padding may hold any token: a masked -inf would still turn the gradient into NaN.
    return jnp.where(mask, x, 0.0)
