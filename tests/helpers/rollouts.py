"""Constants and checks that tests of rollouts share."""

from __future__ import annotations

import numpy as np

from rpt_jax.rollout.rollouts import Rollouts

TEMPERATURE = 0.8
# With these stop tokens, some responses of the test policy end with their first token, some later, some at the length
# limit.
STOPS = (2, 8, 9, 12, 43)


def assert_same(ours: Rollouts, expected: Rollouts) -> None:
    """Assert that the tokens are equal, and the log-probabilities up to the rounding of sums in another order."""
    np.testing.assert_array_equal(ours.tokens_PxGxT, expected.tokens_PxGxT)
    np.testing.assert_array_equal(ours.lengths_PxG, expected.lengths_PxG)
    np.testing.assert_array_equal(ours.ended_PxG, expected.ended_PxG)
    np.testing.assert_allclose(ours.logprobs_PxGxT, expected.logprobs_PxGxT, atol=1e-5)


def select(rollouts: Rollouts, index: object) -> Rollouts:
    """Return `rollouts` with every array indexed by `index`."""
    return Rollouts(**{name: leaf[index] for name, leaf in rollouts._asdict().items()})
