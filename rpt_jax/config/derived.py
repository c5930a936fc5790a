"""Experiments derived from another one."""

from __future__ import annotations

import dataclasses
from typing import Any

from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.schema import Experiment, LoraConfig


def cold_start_experiment(experiment: Experiment) -> Experiment:
    """Return the pre-training that an experiment of task "rpt" starts with, as an experiment of task "pretrain".

    Random weights are trained in full: adapters of them could learn little.
    """
    policy = experiment.policy
    return dataclasses.replace(
        experiment,
        task="pretrain",
        policy=policy if policy.path else dataclasses.replace(policy, lora=LoraConfig()),
        training=dataclasses.replace(
            experiment.training, total_steps=experiment.cold_start.total_steps, flops_budget=0.0, seconds_budget=0.0
        ),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=experiment.cold_start.learning_rate),
        pretrain=dataclasses.replace(experiment.pretrain, export=""),
    )


def evaluation_experiment(experiment: Experiment) -> Experiment:
    """Return an experiment whose `rollout` and `training.prompts_per_step` say how responses are sampled in evaluations."""
    rollout = experiment.rollout
    training = experiment.training
    evaluation = experiment.evaluation
    return dataclasses.replace(
        experiment,
        training=dataclasses.replace(training, prompts_per_step=_evaluation_batch(experiment)),
        rollout=dataclasses.replace(
            rollout,
            samples_per_prompt=evaluation.samples or rollout.samples_per_prompt,
            temperature=evaluation.temperature or rollout.temperature,
            max_new_tokens=evaluation.max_new_tokens or rollout.max_new_tokens,
        ),
    )


def _evaluation_batch(experiment: Experiment) -> int:
    """Return the prompts of a batch of evaluations: no more than positions, up to a whole number of batches of training."""
    evaluation = experiment.evaluation
    step = experiment.training.prompts_per_step
    if not evaluation.prompts_per_batch:
        return step
    if experiment.asks_questions:
        return evaluation.prompts_per_batch
    positions = max(evaluation.positions, evaluation.unseen_positions)
    return min(evaluation.prompts_per_batch, -(-positions // step) * step)


def multiple_choice_experiment(experiment: Experiment) -> Experiment:
    """Return an experiment whose section `rollout` says how responses to multiple choice are sampled."""
    protocol = experiment.multiple_choice
    return dataclasses.replace(
        experiment,
        rollout=dataclasses.replace(
            experiment.rollout,
            samples_per_prompt=protocol.samples,
            temperature=protocol.temperature,
            max_new_tokens=protocol.max_new_tokens,
        ),
    )


def sampling_fields(experiment: Experiment) -> dict[str, Any]:
    """Return the fields that decide which responses are sampled, by name: the seed, and those of prompts and rollouts."""
    without_effect = ("rollout.decode_slots", "rollout.prefill_tokens")
    return {
        name: value
        for name, value in leaves(experiment)
        if name == "seed" or (name.startswith(("prompt.", "rollout.")) and name not in without_effect)
    }
