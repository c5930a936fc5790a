"""A warning when a run cannot learn anything, with the likely cause."""

from __future__ import annotations

from collections.abc import Mapping

from rpt_jax.config import Experiment
from rpt_jax.registry import position_fields

STEPS_WITHOUT_SIGNAL = 5  # Consecutive steps without anything to learn from before the warning.


class LearningSignal:
    """Counts consecutive steps from which nothing can be learned, and warns once until there is a signal again.

    Args:
      experiment: the config, whose values the warning quotes.
      advice: for the name of a status, what to do if most responses have it, where the task says more than this module.
    """

    def __init__(self, experiment: Experiment, advice: Mapping[str, str] | None = None):
        self._experiment = experiment
        self._task_advice = advice or {}
        self._silent_steps = 0
        self._skipped = 0.0  # Updates that the last step skipped.

    def check_rollouts(self, step: int, scalars: Mapping[str, float]) -> list[str]:
        """Return the warning, if one is due after a step of reinforcement learning.

        If all samples of every prompt earn the same, each advantage, and so the gradient of the policy loss, is 0. A single such
        step is common, and only counted in `update/skipped`.

        Args:
          step: number of the step.
          scalars: its metrics.
        """
        silent = scalars["groups/zero_variance"] == 1.0
        skipped_before = self._skipped
        self._skipped = scalars["update/skipped"]
        if self._is_due(silent):
            mean = scalars["reward/mean"]
            return [
                f"step {step}: nothing can be learned: in {STEPS_WITHOUT_SIGNAL} steps, all samples of every prompt earned the "
                f"same (mean reward {mean:.4g}). {self._likely_cause(scalars)}{_skipped_updates(scalars)}"
            ]
        # Some minibatches of a step can be without a gradient while others have one.
        if self._skipped and not silent and not skipped_before:
            return [
                f"step {step}: {self._skipped:.0f} of the step's updates were skipped: all samples of each of their prompts "
                "earned the same. update/skipped in metrics.jsonl counts them."
            ]
        return []

    def check_traces(self, step: int, scalars: Mapping[str, float]) -> list[str]:
        """Return the warning, if it is due after a step of pre-training or a cold start: its batches have no trace.

        Args:
          step: number of the step.
          scalars: its metrics.
        """
        pretrain = self._experiment.pretrain
        if not self._is_due(pretrain.trace_weight > 0 and scalars["loss/trace"] == 0.0):
            return []
        return [
            f"step {step}: no trace was learned in {STEPS_WITHOUT_SIGNAL} steps (loss/trace is 0): none fits into "
            f"pretrain.row_tokens={pretrain.row_tokens} tokens with the end of the prompt template. Raise pretrain.row_tokens, "
            f"or set pretrain.trace_weight=0 to learn documents only.{_skipped_updates(scalars)}"
        ]

    def _is_due(self, silent: bool) -> bool:
        self._silent_steps = self._silent_steps + 1 if silent else 0
        return self._silent_steps == STEPS_WITHOUT_SIGNAL

    def _likely_cause(self, scalars: Mapping[str, float]) -> str:
        """Return a sentence about the most frequent status of the rollouts."""
        fractions = {name: value for name, value in scalars.items() if name.startswith("status/")}
        status = max(fractions, key=lambda name: fractions[name])
        cause = f"{fractions[status]:.0%} have {status}: "
        experiment = self._experiment
        cold_start_steps = experiment.cold_start.total_steps
        match status.removeprefix("status/"):
            case name if name in self._task_advice:
                advice = self._task_advice[name]
            case "not_finished":
                advice = f"responses end at rollout.max_new_tokens={experiment.rollout.max_new_tokens}; raise it."
            case "no_box" if cold_start_steps:
                advice = (
                    f"the cold start of cold_start.total_steps={cold_start_steps} has not taught the policy to answer in a box; "
                    "raise it, or cold_start.learning_rate."
                )
            case "no_box" | "empty":
                advice = (
                    "the policy does not answer in a box. Explain the format with prompt.template='v0' (and "
                    "prompt.chat_template=True for a chat model), or teach it with cold_start.total_steps."
                )
            case "correct":
                advice = f"every prediction is right. Choose harder positions than {position_fields(experiment.data)}."
            case _:
                advice = (
                    "the policy answers in the right format, but no prediction is right. Choose easier positions than "
                    f"{position_fields(experiment.data)}, raise rollout.samples_per_prompt="
                    f"{experiment.rollout.samples_per_prompt}, or start from a stronger policy."
                )
        return cause + advice


def _skipped_updates(scalars: Mapping[str, float]) -> str:
    """Return a sentence to append if the steps were skipped, because not even another loss moved the policy; else ""."""
    return " Their updates were skipped (update/skipped in metrics.jsonl)." if scalars["update/skipped"] else ""
