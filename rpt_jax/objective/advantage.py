"""Group-relative advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grpo_advantage(reward_PxG: jax.Array, epsilon: float) -> jax.Array:
    """GRPO: (r - mean) / (std + epsilon) within each prompt's group of G samples, float32 [P, G].

    The standard deviation is the sample's (G - 1 in the denominator), as in the framework that the paper used; the paper
    itself does not say (2402.03300, Equation 3; verl's default in June 2025).
    """
    centred = reward_PxG - reward_PxG.mean(axis=1, keepdims=True)
    std_Px1 = jnp.std(reward_PxG, axis=1, keepdims=True, ddof=1)
    return centred / (std_Px1 + epsilon)


def has_variance(reward_PxG: jax.Array) -> jax.Array:
    """Return [P] bool: groups whose samples were not all rewarded alike, the only ones that GRPO can learn from."""
    return reward_PxG.max(axis=1) > reward_PxG.min(axis=1)
