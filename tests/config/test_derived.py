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


def test_a_batch_of_evaluations_has_no_more_prompts_than_positions() -> None:
    """Up to a whole number of batches of training, which the mesh splits evenly."""
    evaluation = EvaluationConfig(positions=33, unseen_positions=10, prompts_per_batch=160)
    training = dataclasses.replace(Experiment().training, prompts_per_step=8)
    experiment = dataclasses.replace(Experiment(), evaluation=evaluation, training=training)
    assert evaluation_experiment(experiment).training.prompts_per_step == 40
    assert evaluation_experiment(dataclasses.replace(experiment, task="rft")).training.prompts_per_step == 160
