"""The policy's architecture, read without its parameters."""

from __future__ import annotations

from pathlib import Path

from rpt_jax.config import Experiment
from rpt_jax.errors import UserError
from rpt_jax.model.lora import lora_of, matrix_sizes
from rpt_jax.model.model_config import ModelConfig, check_preset, preset
from rpt_jax.weights.hf import load_model_config


def model_config_of(experiment: Experiment) -> tuple[ModelConfig, str]:
    """Return the policy's model config and its source: `policy.path` if that exists here, else `policy.preset`.

    Raises:
      UserError: the preset is unknown, or does not match the policy's config.json; or a field about experts does not suit it.
    """
    policy = experiment.policy
    if policy.path and (Path(policy.path).exists() or not policy.preset):
        config = load_model_config(policy.path)[0]
        check_preset(policy.path, policy.preset, config)
        source = f"policy.path={policy.path}"
    else:
        config = preset(policy.preset)
        note = f" (policy.path={policy.path} does not exist here)" if policy.path else ""
        source = f"policy.preset={policy.preset}{note}"
    _check_experts(experiment, config)
    return config, source


def _check_experts(experiment: Experiment, config: ModelConfig) -> None:
    """Refuse adapters of experts, and a loss of experts that the policy does not have. Raises: UserError."""
    lora = lora_of(experiment)
    possible = matrix_sizes(config)
    refused = [name for name in lora.targets if name not in possible] if lora else []
    if refused:
        raise UserError(
            f"policy.lora.targets='{experiment.policy.lora.targets}' has {', '.join(f'{name}_proj' for name in refused)}, but "
            "experts cannot have adapters. For this policy, set policy.lora.targets="
            f"'{','.join(f'{name}_proj' for name in possible)}'.",
            field="policy.lora.targets",
        )
    weight = experiment.objective.balance_weight
    if experiment.trains and weight and not config.experts:
        raise UserError(
            f"objective.balance_weight={weight:g} balances experts, but the policy has none: set it to 0.",
            field="objective.balance_weight",
        )
