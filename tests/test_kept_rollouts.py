"""Rollouts as tables: how a response is divided, and what is kept of it."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from rpt_jax.kept_rollouts import Origin, RolloutReading, rollout_table
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.sizes.kept_rollouts import CONTEXT_CHARACTERS, kept_evaluation_bytes, kept_training_bytes
from tests.helpers.runs import experiment

PIECES = (b"", b"2+", b"2=4", b"\\boxed{", b" 4", b"}", "é".encode()[:1])
END_THINK = 0
ORIGIN = Origin(source="12", window=3, position=9, entropy=1.25, context="ä".encode() * 999, truth=b" 4")


def table(responses: list[list[int]], statuses: list[Status], ended: list[Ended]) -> list[dict[str, Any]]:
    """Return the rows of the samples of one prompt."""
    spell = {END_THINK: b"</think>"}
    tokenizer: Any = types.SimpleNamespace(
        pieces=PIECES,
        end_think_id=END_THINK,
        response_bytes=lambda ids: b"".join(spell.get(i, PIECES[i]) for i in ids),
    )
    width = max(map(len, responses))
    rollouts: Any = Rollouts(
        tokens_PxGxT=np.array([[r + [1] * (width - len(r)) for r in responses]]),
        lengths_PxG=np.array([[len(r) for r in responses]]),
        logprobs_PxGxT=np.full((1, len(responses), width), -0.5),
        ended_PxG=np.array([ended]),
    )
    prompts: Any = None
    rewarded: Any = RewardedRollouts(
        prompts,
        rollouts,
        reward_PxG=np.array([[s == Status.CORRECT for s in statuses]]),
        status_PxG=np.array([statuses]),
    )
    reading = RolloutReading(Status, tokenizer, "balanced")
    return rollout_table(rewarded, [ORIGIN], reading, step=5, split="train").to_pylist()


def test_a_response_is_divided_into_reasoning_answer_and_prediction() -> None:
    right, cut, split_letter = table(
        [[1, 2, END_THINK, 3, 4, 5], [1, 2, 3, 4], [6, END_THINK, 3, 5]],
        [Status.CORRECT, Status.NOT_FINISHED, Status.EMPTY],
        [Ended.BOX, Ended.LENGTH, Ended.BOX],
    )
    parts = ("reasoning", "answer", "prediction", "status", "reward", "length", "logprob")
    assert [right[name] for name in parts] == ["2+2=4", "\\boxed{ 4}", " 4", "correct", 1.0, 6, -3.0]
    assert [cut[name] for name in parts] == ["2+2=4\\boxed{ 4", None, None, "not finished", 0.0, 4, -2.0]
    assert [split_letter[name] for name in parts] == ["\\xc3", "\\boxed{}", "", "empty", 0.0, 4, -2.0]
    assert (right["step"], right["source"], right["position"], right["truth"]) == (5, "12", 9, " 4")
    assert right["context"] == "ä" * CONTEXT_CHARACTERS
    assert [row["sample"] for row in (right, cut, split_letter)] == [0, 1, 2]


def test_the_fields_bound_what_is_kept() -> None:
    kept = experiment()
    nothing = experiment(**{"training.kept_prompts_per_step": 0, "evaluation.keep_rollouts": False})
    twice = experiment(**{"training.kept_prompts_per_step": 8, "evaluation.samples": 2 * kept.evaluation.samples})
    assert kept_training_bytes(nothing) == kept_evaluation_bytes(nothing) == 0
    assert kept_training_bytes(twice) == 2 * kept_training_bytes(kept) > 0
    assert kept_evaluation_bytes(twice) == 2 * kept_evaluation_bytes(kept) > 0
