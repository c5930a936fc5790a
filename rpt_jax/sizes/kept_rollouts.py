"""The disk space that kept rollouts take."""

from __future__ import annotations

from rpt_jax.config import Experiment

CONTEXT_CHARACTERS = 600  # Kept of a prompt's context, from its end.
_ROW_BYTES = 150 + CONTEXT_CHARACTERS  # Of a rollout, without its response.
_TOKEN_BYTES = 5  # Of a response, per token; more than the mean of any tokenizer on ordinary text.


def kept_training_bytes(experiment: Experiment) -> int:
    """Return the bytes of the kept rollouts of training before compression, if every response fills its limit."""
    training = experiment.training
    prompts = training.total_steps * min(training.kept_prompts_per_step, training.prompts_per_step)
    return prompts * experiment.rollout.samples_per_prompt * _rollout_bytes(experiment.rollout.max_new_tokens)


def kept_evaluation_bytes(experiment: Experiment) -> int:
    """Return the same of all evaluations; 0 where the number of test questions is not in the config."""
    evaluation = experiment.evaluation
    if not evaluation.keep_rollouts:
        return 0
    if experiment.asks_questions:
        prompts = experiment.questions.test_questions
    else:
        prompts = evaluation.positions + evaluation.unseen_positions
    evaluations = 2 + (experiment.training.total_steps - 1) // evaluation.every_steps
    samples = evaluation.samples or experiment.rollout.samples_per_prompt
    tokens = evaluation.max_new_tokens or experiment.rollout.max_new_tokens
    return evaluations * prompts * samples * _rollout_bytes(tokens)


def _rollout_bytes(tokens: int) -> int:
    return _ROW_BYTES + _TOKEN_BYTES * tokens
