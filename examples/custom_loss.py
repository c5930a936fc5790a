"""A policy-gradient loss of your own: REINFORCE in which bad responses count half.

python -m rpt_jax.main --config=examples/custom_loss.py
"""

from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.config import load_config_file
from rpt_jax.objective.loss import ClipRange, TokenLoss, reinforce_loss
from rpt_jax.registry import LOSSES


@LOSSES.register("optimistic")
def optimistic_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: ClipRange
) -> TokenLoss:
    """REINFORCE with negative advantages halved."""
    weighted = jnp.where(advantages > 0, advantages, 0.5 * advantages)
    return reinforce_loss(logprobs, old_logprobs, weighted, mask, clip_range)


def get_config() -> Any:
    config = load_config_file("configs/rpt_tiny.py")
    config.objective.loss = "optimistic"
    config.training.total_steps = 10
    config.evaluation.positions = 64
    config.evaluation.unseen_positions = 32
    return config
