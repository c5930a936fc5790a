"""What changes with `training.total_steps` when a run is resumed with another value."""

from __future__ import annotations

import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.infra.optimizer import make_schedule
from rpt_jax.registry import POSITION_CHOICES


def consequences_of_total_steps(experiment: Experiment, earlier_total: int, completed: int) -> list[str]:
    """Return a sentence for each part of the config that follows `training.total_steps`.

    Without any, the run continues exactly as one that had the new total from its start.

    Args:
      experiment: the config with the new total.
      earlier_total: the total that the completed steps were made with.
      completed: number of completed steps.
    """
    training = experiment.training
    if not completed or training.total_steps == earlier_total:
        return []
    changed = (
        f"training.total_steps was {earlier_total} for the first {completed} steps and is {training.total_steps} now"
    )
    consequences = []
    if experiment.optimizer.schedule != "constant":
        # Reinforcement learning takes an optimizer step for each minibatch, and task "pretrain" one per step.
        updates = training.minibatches_per_step if experiment.reinforces else 1
        before, now = (
            float(np.asarray(make_schedule(experiment.optimizer, total * updates)(completed * updates)))
            for total in (earlier_total, training.total_steps)
        )
        consequences.append(
            f"{changed}: with optimizer.schedule='{experiment.optimizer.schedule}', the learning rate of step {completed + 1} is "
            f"{now:.3g} ({before:.3g} with the earlier total), and the steps before it followed the earlier schedule."
        )
    if not experiment.reinforces:
        return consequences
    if POSITION_CHOICES[experiment.data.positions].requirements.staged:
        consequences.append(
            f"{changed}: the stages of data.positions='{experiment.data.positions}' have other lengths, so that some positions "
            "are repeated or left out."
        )
    if experiment.objective.budget_weight and experiment.objective.budget_decay != 1.0:
        consequences.append(
            f"{changed}: objective.budget_decay={experiment.objective.budget_decay:g} spreads over another number of steps, so "
            "that the target length jumps."
        )
    return consequences
