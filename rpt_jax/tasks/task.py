"""What a task gives to the training loop."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.objective.batch import NextTokenBatch
from rpt_jax.objective.update import TrainState
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.prompts.pipeline import PromptStream
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.rollout.sampler import Sampler
from rpt_jax.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Keep = Callable[[str, Callable[[], "pa.Table"]], None]


class Task(Protocol):
    """Prompts, reward and evaluation of a task of `train.train`, which does everything else.

    Attributes:
      policy: the model.
      params: its starting parameters, sharded for training.
      tokenizer: the policy's tokenizer.
      sample: samples responses for training.
      stream: batches of training prompts.
      statuses: the values of `RewardedRollouts.status_PxG`, among them correct, no box and not finished.
      advice: for the name of a status in lower case, what to do if most responses have it and nothing can be learned.
      evaluated: numbers of what is evaluated and how; evaluations with other numbers are not comparable.
      preparation_flops: model FLOPs that choosing the prompts took before the first step.
    """

    policy: Transformer
    params: Params
    tokenizer: Tokenizer
    sample: Sampler
    stream: PromptStream
    statuses: type[enum.IntEnum]
    advice: Mapping[str, str]
    evaluated: list[float]
    preparation_flops: float

    def reward(self, state: TrainState, prompts: PromptBatch, rollouts: Rollouts, step: int) -> RewardedRollouts:
        """Return the rollouts of training step `step` with the training reward; arguments as of `rewards.rewarder.Rewarder`."""
        ...

    def reward_metrics(self) -> dict[str, float]:
        """Return scalars about the rewards that were given since the last call, by their names in metrics.jsonl."""
        ...

    def rescoring_is_due(self, step: int) -> bool:
        """Return whether the prompts are chosen again with the current policy before `step`."""
        ...

    def rescore(self, step: int, params: Params) -> float:
        """Choose the prompts of the following steps with the current policy; return the FLOPs that this took."""
        ...

    def documents(self, rewarded: RewardedRollouts) -> NextTokenBatch | None:
        """Return the text of the prompts' documents, if their cross-entropy is part of the loss."""
        ...

    def truths(self, prompts: PromptBatch) -> list[bytes]:
        """Return what a right prediction is for each of some prompts on the host, to show it."""
        ...

    def rollout_table(self, rewarded: RewardedRollouts, *, step: int) -> pa.Table:
        """Return a table of training rollouts on the host, see `kept_rollouts.rollout_table`. Called by another thread."""
        ...

    def evaluate(self, params: Params, *, step: int, full: bool, keep: Keep) -> dict[str, Any]:
        """Evaluate a policy.

        Args:
          params: its parameters, sharded for training.
          step: training steps of the policy.
          full: whether to measure all that is reported before and after training, or only what is measured in between.
          keep: takes tables of what the policy did: their kind (`infra.rollout_files.EVALUATION` or `TEXT`), and what makes them.

        Returns: the results as JSON values.
        """
        ...

    def evaluation_metrics(self, evaluation: dict[str, Any]) -> dict[str, float]:
        """Return the scalars of an evaluation by their names in metrics.jsonl."""
        ...

    def show_evaluations(self, evaluations: Mapping[str, dict[str, Any]]) -> None:
        """Show one table of full evaluations: the one "before" training and, at the end, the one "after" it."""
        ...

    def result(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return what result.json says about the full evaluations before and after training, as JSON values."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the task beside the stream, as JSON values."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint that holds what `state` returned and, as "stream", the state of the stream.

        Raises: UserError, if the checkpoint was made with other data.
        """
        ...

    def close(self) -> None:
        """End the worker processes of the task and its stream."""
        ...
