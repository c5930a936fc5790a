"""Experiments derived from another one."""

from __future__ import annotations

import dataclasses

from rpt_jax.config.schema import Experiment


def cold_start_experiment(experiment: Experiment) -> Experiment:
    """Return the pre-training that an experiment of task "rpt" starts with, as an experiment of task "pretrain"."""
    return dataclasses.replace(
        experiment,
        task="pretrain",
        training=dataclasses.replace(experiment.training, total_steps=experiment.cold_start.total_steps),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=experiment.cold_start.learning_rate),
        pretrain=dataclasses.replace(experiment.pretrain, export=""),
    )
