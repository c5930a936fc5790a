"""Segments as targets: the small policy predicts the next three tokens, and earns the share of them that it gets right.

RLPT (arXiv 2509.19249) predicts sentences, which are too long for this policy; see docs/guides/segments.md.

Command   bash launch/local.sh --config=configs/segments_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      not measured
Results   not measured
"""

from typing import Any

import rpt_tiny


def get_config() -> Any:
    config = rpt_tiny.get_config()
    config.data.targets = "segment"
    config.data.target_options.unit = "tokens"
    config.data.target_options.tokens = 3
    config.objective.reward = "segment_prefix_share"

    config.training.total_steps = 60
    # Never: with shares as rewards, few groups are without variance.
    config.training.dynamic_sampling_from = 61
    config.evaluation.every_steps = 30
    config.checkpoint.every_steps = 20
    return config
