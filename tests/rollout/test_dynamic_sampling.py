"""Dynamic sampling, and the utilization of decode slots over its rounds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.dynamic_sampling import first_prompts, prefer_variance
from rpt_jax.rollout.rollouts import Rollouts

P, G, T = 4, 2, 3


def batch(ids: list[int], reward: list[list[float]]) -> RewardedRollouts:
    """Return rewarded rollouts in which every array is derived from the prompt ids."""
    ids_P = np.array(ids, np.int32)
    column_Px1 = ids_P[:, None]
    prompts = PromptBatch(
        tokens_PxS=np.tile(column_Px1, (1, 5)),
        lengths_P=ids_P,
        ids_P=ids_P,
        reference_PxR=np.tile(column_Px1, (1, 2)).astype(np.uint8),
        boundaries_PxRp1=np.ones((P, 3), bool),
        reference_ids_PxR=np.tile(column_Px1, (1, 2)),
        window_P=ids_P,
        position_P=ids_P,
        entropy_P=ids_P.astype(np.float32),
    )
    rollouts = Rollouts(
        tokens_PxGxT=jnp.tile(column_Px1[:, :, None], (1, G, T)),
        lengths_PxG=jnp.tile(column_Px1, (1, G)),
        logprobs_PxGxT=jnp.tile(-column_Px1[:, :, None].astype(np.float32), (1, G, T)),
        ended_PxG=jnp.tile(column_Px1, (1, G)),
    )
    return RewardedRollouts(
        prompts=prompts,
        rollouts=rollouts,
        reward_PxG=jnp.array(reward),
        status_PxG=jnp.tile(column_Px1, (1, G)),
    )


def test_groups_with_variance_come_first_and_earlier_rounds_before_later_ones():
    kept = batch([1, 2, 3, 4], [[0, 0], [0, 1], [1, 1], [1, 0]])
    fresh = batch([5, 6, 7, 8], [[1, 1], [0, 1], [0, 0], [0, 0]])
    chosen = prefer_variance(kept, fresh)
    assert chosen.prompts.ids_P.tolist() == [2, 4, 6, 1]
    assert chosen.reward_PxG.tolist() == [[0, 1], [1, 0], [0, 1], [0, 0]]
    np.testing.assert_array_equal(chosen.rollouts.tokens_PxGxT[:, 0, 0], chosen.prompts.ids_P)
    np.testing.assert_array_equal(chosen.status_PxG[:, 1], chosen.prompts.ids_P)
    assert not chosen.all_vary()
    assert first_prompts(chosen, 3).all_vary()


def test_batch_size_counts_tokens_of_prompts_and_responses():
    size = batch([1, 2, 3, 4], [[0, 0]] * P).size()
    assert (size.prompt_tokens, size.response_tokens) == (10, 20)
