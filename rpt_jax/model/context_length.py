"""Lengths of a run against the context that its policy was trained for."""

from __future__ import annotations

from rpt_jax.config import Experiment
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Yarn


def trained_context(config: ModelConfig) -> int:
    """Return the longest sequence, in tokens, that a policy can be expected to handle.

    With YaRN, files give the context from before or after its extension as `max_position_embeddings`.
    """
    scaling = config.rope_scaling
    if isinstance(scaling, Yarn):
        return max(config.context, round(scaling.factor * scaling.original_max_position_embeddings))
    return config.context


def context_warnings(experiment: Experiment, config: ModelConfig) -> list[str]:
    """Return a sentence for each length of the config that exceeds the context of the policy, whose predictions then degrade.

    Args:
      experiment: a validated config.
      config: architecture of the policy.
    """
    context = trained_context(config)
    data = experiment.data
    lengths = {}
    if experiment.samples:
        fields = "prompt.max_tokens + rollout.max_new_tokens"
        lengths[fields] = experiment.prompt.max_tokens + experiment.rollout.max_new_tokens
    if experiment.reinforces and experiment.evaluation.max_new_tokens > experiment.rollout.max_new_tokens:
        fields = "prompt.max_tokens + evaluation.max_new_tokens"
        lengths[fields] = experiment.prompt.max_tokens + experiment.evaluation.max_new_tokens
    if experiment.task == "pretrain" or (experiment.task == "rpt" and experiment.cold_start.total_steps):
        fields = "data.max_document_tokens + pretrain.row_tokens"
        lengths[fields] = data.max_document_tokens + experiment.pretrain.row_tokens
    if experiment.scores_corpus and not data.prepared:
        lengths["data.max_document_tokens"] = data.max_document_tokens
    return [
        f"{fields} = {length:,} tokens, but the policy was trained for {context:,} (max_position_embeddings); its predictions "
        "degrade beyond them. Lower these fields, or choose a policy with a longer context."
        for fields, length in lengths.items()
        if length > context
    ]
