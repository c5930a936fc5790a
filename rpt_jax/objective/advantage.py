"""Group-relative advantages by name.

Every function takes `reward_PxG` (float32), `lengths_PxG` (int32 response lengths), `counted_P` (bool, groups that are
part of the batch) and `epsilon`, and returns float32 [P, G].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rpt_jax.registry import ADVANTAGES


@jax.named_scope("advantage")
def group_advantages(
    name: str, reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float
) -> jax.Array:
    """Return the advantages called `name`, which are exactly zero in groups without variance.

    The mean of equal numbers is subject to rounding: 1.1 minus the mean of eight times 1.1, divided by epsilon, is not
    small.
    """
    advantages_PxG = ADVANTAGES[name].function(reward_PxG, lengths_PxG, counted_P, epsilon)
    return jnp.where(has_variance(reward_PxG)[:, None], advantages_PxG, 0.0)


def has_variance(reward_PxG: jax.Array) -> jax.Array:
    """Return for each group whether its samples have different rewards, bool [P]. Others have no learning signal."""
    return reward_PxG.max(axis=1) > reward_PxG.min(axis=1)


@ADVANTAGES.register("grpo", fields=("advantage_epsilon",))
def grpo_advantage(reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float) -> jax.Array:
    """GRPO: (r - mean) / (std + epsilon) within each prompt's group of G samples.

    The sample standard deviation (G - 1 in the denominator) is used, as in the framework that the paper used; the paper
    does not specify it (2402.03300, Equation 3; verl's default in June 2025).
    """
    centered = reward_PxG - reward_PxG.mean(axis=1, keepdims=True)
    std_Px1 = jnp.std(reward_PxG, axis=1, keepdims=True, ddof=1)
    return centered / (std_Px1 + epsilon)


@ADVANTAGES.register("dr_grpo")
def dr_grpo_advantage(reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float) -> jax.Array:
    """Dr. GRPO: r - mean. Division by the standard deviation would favor very easy and hard prompts (2503.20783)."""
    return reward_PxG - reward_PxG.mean(axis=1, keepdims=True)


@ADVANTAGES.register("rloo")
def rloo_advantage(reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float) -> jax.Array:
    """Leave-one-out: r - mean of the other samples, equal to G / (G - 1) (r - mean) (2402.14740; RLP, 2510.01265)."""
    samples = reward_PxG.shape[1]
    return (reward_PxG - reward_PxG.mean(axis=1, keepdims=True)) * (samples / (samples - 1))


@ADVANTAGES.register("opo")
def opo_advantage(reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float) -> jax.Array:
    """OPO: r - Σ length · r / Σ length, the optimal baseline if gradient norms grow with length (2505.23585)."""
    total_Px1 = jnp.maximum(lengths_PxG.sum(axis=1, keepdims=True), 1)
    return reward_PxG - jnp.sum(lengths_PxG * reward_PxG, axis=1, keepdims=True) / total_Px1


@ADVANTAGES.register("batch", fields=("advantage_epsilon",))
def batch_advantage(reward_PxG: jax.Array, lengths_PxG: jax.Array, counted_P: jax.Array, epsilon: float) -> jax.Array:
    """ScaleRL: (r - group mean) / (std + epsilon), with the standard deviation over the whole batch (2510.13786).

    It is the sample standard deviation of the centered rewards of all counted groups.
    """
    centered = reward_PxG - reward_PxG.mean(axis=1, keepdims=True)
    count = counted_P.sum() * reward_PxG.shape[1]
    # Centered rewards have mean zero in every group, and so in the batch.
    variance = jnp.sum(jnp.where(counted_P[:, None], jnp.square(centered), 0.0)) / jnp.maximum(count - 1, 1)
    return centered / (jnp.sqrt(variance) + epsilon)
