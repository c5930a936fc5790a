"""Experiments derived from another one."""

from __future__ import annotations

import dataclasses

from rpt_jax.config import EvaluationConfig, Experiment
from rpt_jax.config.derived import evaluation_experiment


def test_evaluations_sample_as_training_does_unless_the_config_says_otherwise() -> None:
    experiment = Experiment()
    assert evaluation_experiment(experiment) == experiment
    own = dataclasses.replace(
        experiment, evaluation=EvaluationConfig(samples=16, temperature=0.6, max_new_tokens=32_000, prompts_per_batch=7)
    )
    assert evaluation_experiment(own).training == dataclasses.replace(experiment.training, prompts_per_step=7)
    assert evaluation_experiment(own).rollout == dataclasses.replace(
        experiment.rollout, samples_per_prompt=16, temperature=0.6, max_new_tokens=32_000
    )
