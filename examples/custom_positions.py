"""A choice of positions of your own: those whose entropy is neither low nor hopelessly high.

python -m rpt_jax.main --config=examples/custom_positions.py
"""

import dataclasses
from typing import Any

from rpt_jax.config import DataConfig, load_config_file
from rpt_jax.prompts.positions import EntropyReader, PositionRule, every_position, quantiles
from rpt_jax.registry import POSITION_CHOICES


@POSITION_CHOICES.register("middle_band")
def middle_band(config: DataConfig, entropies: EntropyReader) -> list[PositionRule]:
    """Positions between the 80th and the 98th percentile of entropy."""
    low, high = quantiles(entropies, [0.80, 0.98], above=0.0)
    return [dataclasses.replace(every_position(config), low=low, high=high)]


def get_config() -> Any:
    config = load_config_file("configs/rpt_tiny.py")
    config.data.positions = "middle_band"
    config.training.total_steps = 10
    config.evaluation.positions = 64
    config.evaluation.unseen_positions = 32
    return config
