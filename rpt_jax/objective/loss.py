"""The policy-gradient loss, as sums: whoever adds microbatches divides once, by the global number of tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PolicyLoss(NamedTuple):
    """Sums over response tokens; divide by the batch's token count for the token mean (verl's default; ours too)."""

    loss: jax.Array  # The objective's negative.
    ratio: jax.Array  # exp(logprob - old logprob).
    clipped: jax.Array  # Tokens where the clip bounds the objective.


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """Clipped surrogate of PPO as GRPO uses it (1707.06347, Equation 7; 2402.03300, Equation 3), without a KL term.

    -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A), summed over tokens where `mask` holds.

    Args:
      logprobs: float32, any shape; of the sampled tokens under the policy that is being trained.
      old_logprobs: the same under the policy that sampled. Exactly on-policy these are `stop_gradient(logprobs)`: the ratio
        is 1 and its gradient is the score function's.
      advantages: broadcasts against `logprobs`.
      mask: bool, True for response tokens up to and including the stop token.
      clip_low, clip_high: how far the ratio may move down and up before its gradient stops.
    """
    # Padding may hold any token: a masked -inf would still turn the gradient into NaN.
    ratio = jnp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))
    free = ratio * advantages
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return PolicyLoss(
        loss=-jnp.sum(jnp.where(mask, jnp.minimum(free, bounded), 0.0)),
        ratio=jnp.sum(jnp.where(mask, ratio, 0.0)),
        clipped=jnp.sum(jnp.where(mask, bounded < free, False)).astype(jnp.float32),
    )
