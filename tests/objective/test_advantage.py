"""Advantages against their equations in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.objective.advantage import group_advantages, has_variance
from rpt_jax.registry import ADVANTAGES

REWARDS = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0.5, 2, -1, 0], [1.1] * 4, [0.1] * 4])
LENGTHS = np.array([[3, 5, 7, 1], [2, 2, 9, 4], [1, 6, 2, 8], [3, 1, 7, 5], [2, 2, 2, 2]])
COUNTED = np.array([True, True, False, True, True])
EPSILON = 0.01


def expected(name: str) -> np.ndarray:
    """Return every advantage, computed one by one."""
    centered = [[r - np.mean(group) for r in group] for group in REWARDS]
    spread = np.std([a for group, counted in zip(centered, COUNTED, strict=True) if counted for a in group], ddof=1)
    equations = {
        "grpo": lambda p, g: centered[p][g] / (np.std(REWARDS[p], ddof=1) + EPSILON),
        "dr_grpo": lambda p, g: centered[p][g],
        "rloo": lambda p, g: REWARDS[p, g] - np.mean(np.delete(REWARDS[p], g)),
        "opo": lambda p, g: REWARDS[p, g] - np.average(REWARDS[p], weights=LENGTHS[p]),
        "batch": lambda p, g: centered[p][g] / (spread + EPSILON),
    }
    advantages = np.array([[equations[name](p, g) for g in range(4)] for p in range(len(REWARDS))])
    return np.where(np.ptp(REWARDS, axis=1, keepdims=True) > 0, advantages, 0)


def ours(name: str) -> np.ndarray:
    arrays = jnp.asarray(REWARDS, jnp.float32), jnp.asarray(LENGTHS, jnp.int32), jnp.asarray(COUNTED)
    return np.asarray(group_advantages(name, *arrays, EPSILON))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_equals_its_equation(name):
    np.testing.assert_allclose(ours(name), expected(name), rtol=1e-5, atol=1e-6)
    others = [expected(other) for other in ADVANTAGES if other != name]
    assert all(np.abs(expected(name) - other).max() > 0.05 for other in others), (
        "two advantages are equal in this example"
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_equal_rewards_are_exactly_zero(name):
    """The mean of equal numbers is subject to rounding, and the remainder may be divided by epsilon."""
    for samples in (2, 3, 7, 8):
        rewards = jnp.array([[0.0], [1.0], [0.1], [1.1]]) * jnp.ones(samples)
        lengths = jnp.arange(1, 4 * samples + 1).reshape(4, samples)
        assert not has_variance(rewards).any()
        np.testing.assert_array_equal(group_advantages(name, rewards, lengths, jnp.ones(4, bool), 1e-6), 0.0)


def test_advantages_of_one_group_by_hand():
    np.testing.assert_allclose(ours("dr_grpo")[0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(ours("rloo")[0], [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_allclose(ours("opo")[0], np.array([13, -3, -3, -3]) / 16, rtol=1e-6)


def test_groups_with_different_rewards_have_variance():
    rewards = jnp.array([[0.0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]])
    assert has_variance(rewards).tolist() == [False, False, True, True]
