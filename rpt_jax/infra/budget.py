"""The end of training: `training.total_steps`, or a budget of FLOPs or seconds."""

from __future__ import annotations

import math

from rpt_jax.config import TrainingConfig
from rpt_jax.distributed.processes import in_any_process


def budget_used(training: TrainingConfig, flops: float, seconds: float) -> float:
    """Return the share of the budget that a run has used, the larger one of two budgets; 0 without a budget.

    Args:
      training: section `training`.
      flops: model FLOPs of training so far, see `accounting.Counters`.
      seconds: seconds of training so far, without evaluations.
    """
    spent = ((flops, training.flops_budget), (seconds, training.seconds_budget))
    return max((amount / budget for amount, budget in spent if budget), default=0.0)


def is_last_step(training: TrainingConfig, step: int, flops: float, seconds: float) -> bool:
    """Return whether training ends after `step` steps. A collective: every process must call it.

    Args:
      training, flops, seconds: see `budget_used`. The clocks of several processes differ; the first to reach the budget ends all.
      step: number of completed steps.
    """
    is_used_up = step > 0 and budget_used(training, flops, seconds) >= 1.0
    if training.seconds_budget:
        is_used_up = in_any_process(is_used_up)
    return is_used_up or step == training.total_steps


def expected_steps(training: TrainingConfig, step: int, flops: float, seconds: float) -> int:
    """Return the number of steps that a run will have, estimated from those before.

    Args:
      training, flops, seconds: see `budget_used`.
      step: number of completed steps.
    """
    used = budget_used(training, flops, seconds)
    return min(training.total_steps, max(step, math.ceil(step / used))) if used else training.total_steps
