"""What sampling takes, against counts by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.model.model_config import preset
from rpt_jax.rollout.cost import sampling_cost
from rpt_jax.rollout.prefix_sharing import separate, share_prefixes
from rpt_jax.rollout.rollouts import DecodeWork, Rollouts
from tests.helpers.flops import token_flops

TINY = preset("tiny")
LENGTHS_P = np.array([9, 6, 4], np.int32)
PROMPTS_PxS = np.where(np.arange(9) < LENGTHS_P[:, None], np.arange(9) + 100 * (LENGTHS_P[:, None] == 4), 0).astype(
    np.int32
)
RESPONSES_PxG = np.array([[3, 1], [2, 2], [5, 1]], np.int32)
IDS_P = np.arange(3, dtype=np.int32)
ROLLOUTS = Rollouts(
    tokens_PxGxT=jnp.zeros((3, 2, 5), jnp.int32),
    lengths_PxG=jnp.asarray(RESPONSES_PxG),
    logprobs_PxGxT=jnp.zeros((3, 2, 5)),
    ended_PxG=jnp.zeros((3, 2), jnp.int32),
)
WORK = DecodeWork(steps=jnp.array([[2, 1]]), slots=jnp.array([20]))


def decoding_by_hand() -> int:
    """Every response token but the last is run: it attends to its prompt, to earlier response tokens and to itself."""
    return sum(
        token_flops(TINY, int(prompt) + t + 1, head=True)
        for prompt, lengths in zip(LENGTHS_P, RESPONSES_PxG, strict=True)
        for length in lengths
        for t in range(length - 1)
    )


def test_each_prompt_runs_once_and_its_last_token_reaches_the_head():
    cost = sampling_cost(TINY, separate(PROMPTS_PxS, LENGTHS_P, IDS_P), ROLLOUTS, WORK)
    prompts = sum(
        token_flops(TINY, keys, head=keys == n, only_cache=keys < n) for n in LENGTHS_P for keys in range(1, int(n) + 1)
    )
    assert float(cost.flops) == pytest.approx(prompts + decoding_by_hand(), rel=1e-6)


def test_a_shared_prefix_is_counted_once():
    """The second prompt is the beginning of the first: only its last token runs again."""
    prompts = share_prefixes(PROMPTS_PxS, LENGTHS_P, IDS_P, tail=1)
    assert prompts.ends_P.tolist() == [8, 5, 3] and prompts.lengths_N.tolist() == [8, 3, 0]
    roots = sum(token_flops(TINY, keys, head=False, only_cache=True) for n in (8, 3) for keys in range(1, n + 1))
    tails = sum(token_flops(TINY, int(n), head=True) for n in LENGTHS_P)
    cost = sampling_cost(TINY, prompts, ROLLOUTS, WORK)
    assert float(cost.flops) == pytest.approx(roots + tails + decoding_by_hand(), rel=1e-6)


def test_costs_of_rounds_add_up():
    """The first token of a response comes from the prefill and takes no decode step."""
    cost = sampling_cost(TINY, separate(PROMPTS_PxS, LENGTHS_P, IDS_P), ROLLOUTS, WORK)
    assert int(cost.decoded_tokens) == 8 and int(cost.slot_steps) == 20
    twice = cost.plus(cost)
    assert float(twice.occupancy) == pytest.approx(0.4) and float(twice.flops) == pytest.approx(2 * float(cost.flops))
