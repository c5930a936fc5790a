"""Metrics of rollouts."""

from __future__ import annotations

import numpy as np

from rpt_jax.rollout.metrics import distinct_fraction, drawn_metrics, mean_over_rounds


def test_distinct_n_equals_its_definition():
    """Compared with sets of tuples. One prompt's samples repeat n-grams, another's never do, and a third's are too short."""
    rng, n, samples, limit = np.random.default_rng(0), 2, 3, 9
    tokens = rng.integers(0, 6, (3, samples, limit)).astype(np.int32)
    tokens[1] = np.arange(samples * limit).reshape(samples, limit)
    lengths = rng.integers(n, limit + 1, (3, samples)).astype(np.int32)
    lengths[2] = 1
    fractions = []
    for p in range(2):
        ngrams = [tuple(tokens[p, g, t : t + n]) for g in range(samples) for t in range(lengths[p, g] - n + 1)]
        fractions.append(len(set(ngrams)) / len(ngrams))
    assert fractions[1] == 1 and fractions[0] < 1
    np.testing.assert_allclose(distinct_fraction(tokens, lengths, n), np.mean(fractions), rtol=1e-6)
    assert distinct_fraction(tokens[..., :1], np.minimum(lengths, 1), 2) == 1.0


def test_the_reward_of_all_drawn_groups_is_kept_beside_that_of_the_selected_ones():
    """Two rounds of two groups: dynamic sampling selects the two groups with variance, whose mean is higher."""
    rounds = [
        np.array([[0.0, 0, 0, 0], [1, 1, 1, 0]], np.float32),
        np.array([[1.0, 0, 1, 1], [0, 0, 0, 0]], np.float32),
    ]
    drawn = mean_over_rounds([drawn_metrics(reward_PxG) for reward_PxG in rounds])
    assert drawn == {"reward/drawn_mean": 6 / 16, "groups/drawn_zero_variance": 0.5}
