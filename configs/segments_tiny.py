"""Segments as targets: the small policy predicts the next three tokens, and earns the share of them that it gets right."""

from pathlib import Path
from typing import Any

from rpt_jax.config import load_config_file


def get_config() -> Any:
    config = load_config_file(str(Path(__file__).with_name("rpt_tiny.py")))

    # RLPT (arXiv 2509.19249) predicts sentences, which are too long for this policy. Its prompts are the text alone.
    config.data.targets = "segment"
    config.data.target_options.unit = "tokens"
    config.data.target_options.tokens = 3
    config.objective.reward = "segment_prefix_share"

    config.training.total_steps = 60
    config.training.dynamic_sampling_from = 61
    config.evaluation.every_steps = 30
    config.checkpoint.every_steps = 20
    return config
