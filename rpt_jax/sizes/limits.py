"""Length limits that do not suit a policy."""

from __future__ import annotations

from rpt_jax.config import Experiment
from rpt_jax.model.model_config import ModelConfig

# Smaller policies reason in a few words that a cold start taught them; larger ones have been trained to reason at length.
_REASONING_PARAMETERS = 5e8
_SHORT_RESPONSE_TOKENS = 1024


def short_response_warnings(experiment: Experiment, config: ModelConfig) -> list[str]:
    """Return a sentence if a policy that may reason at length has no room for it."""
    limit = experiment.rollout.max_new_tokens
    taught_format = experiment.cold_start.total_steps > 0
    if not experiment.reinforces or taught_format:
        return []
    if config.parameters < _REASONING_PARAMETERS or limit >= _SHORT_RESPONSE_TOKENS:
        return []
    return [
        f"rollout.max_new_tokens={limit} is short for a policy of {config.parameters / 1e9:.1f} billion parameters: a reasoning "
        "model needs thousands of tokens before it predicts (paper: 8,192), and a response that is cut earns nothing. Raise it, "
        "or teach a short format with cold_start.total_steps."
    ]
