"""The policy's architecture, read without its parameters."""

from __future__ import annotations

from pathlib import Path

from rpt_jax.config import Experiment
from rpt_jax.model.model_config import ModelConfig, check_preset, preset
from rpt_jax.weights.hf import load_model_config


def model_config_of(experiment: Experiment) -> tuple[ModelConfig, str]:
    """Return the policy's model config and its source: `policy.path` if that exists here, else `policy.preset`.

    Raises:
      UserError: the preset is unknown, or does not match the policy's config.json.
    """
    policy = experiment.policy
    if not policy.path:
        return preset(policy.preset), f"policy.preset={policy.preset}"
    if Path(policy.path).exists() or not policy.preset:
        config = load_model_config(policy.path)[0]
        check_preset(policy.path, policy.preset, config)
        return config, f"policy.path={policy.path}"
    return preset(policy.preset), f"policy.preset={policy.preset} (policy.path={policy.path} does not exist here)"
