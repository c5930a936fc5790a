"""A training reward of your own: Equation 3, minus a small price for every token of reasoning.

python -m rpt_jax.main --config=examples/custom_reward.py
"""

from typing import Any

import jax

from rpt_jax.config import load_config_file
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.catalogue import RewardInputs


@REWARDS.register("concise")
def concise_reward(inputs: RewardInputs) -> jax.Array:
    """Equation 3 minus 0.002 for each token of reasoning, float32 [P, G]."""
    return inputs.matched_PxG - 0.002 * inputs.reasoning_lengths()


def get_config() -> Any:
    config = load_config_file("configs/rpt_tiny.py")
    config.objective.reward = "concise"
    config.training.total_steps = 10
    config.evaluation.positions = 64
    config.evaluation.unseen_positions = 32
    return config
