"""Training rewards that a verifier decides on, for questions and for segments of text."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.questions.question import Question
from rpt_jax.rewards.rewarder import RewardedRollouts, Rewarder
from rpt_jax.rewards.verified import BatchVerifier
from rpt_jax.rollout.rollouts import Rollouts


class VerifiedRewarder:
    """Computes the training reward from the scores of a verifier, and counts what it takes."""

    def __init__(self, verify: BatchVerifier, rewarder: Rewarder, mesh: Mesh):
        """
        Args:
          verify: verifies the responses.
          rewarder: adds the terms of the training reward.
          mesh: the devices that training uses.
        """
        self._verify = verify
        self._rewarder = rewarder
        self._mesh = mesh
        names = ("verification/timed_out", "verification/crashed", "time/verification")
        self._metrics: dict[str, float] = dict.fromkeys(names, 0.0)

    def __call__(
        self, state: TrainState, questions: Sequence[Question], prompts: PromptBatch, rollouts: Rollouts, step: int
    ) -> RewardedRollouts:
        """Return the rollouts of training step `step` with the configured reward.

        Args:
          state, prompts, rollouts, step: as of `rewards.rewarder.Rewarder`.
          questions: what each prompt asks, with the accepted answers.
        """
        pending = self._verify.submit(questions, rollouts)
        sharded = shard_prompts(prompts, self._mesh)
        verified = pending.result()
        self._metrics["verification/timed_out"] += verified.timed_out
        self._metrics["verification/crashed"] += verified.crashed
        self._metrics["time/verification"] += verified.waited
        reward_PxG, status_PxG = shard_prompts((verified.score_PxG, verified.status_PxG), self._mesh)
        matched = RewardedRollouts(prompts=sharded, rollouts=rollouts, reward_PxG=reward_PxG, status_PxG=status_PxG)
        return self._rewarder.complete(state, matched, step)

    def take_metrics(self) -> dict[str, float]:
        """Return scalars about the rewards that were given since the last call, by their names in metrics.jsonl."""
        metrics = dict(self._metrics)
        self._metrics = dict.fromkeys(metrics, 0.0)
        return metrics
