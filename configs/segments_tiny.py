"""Segments as targets: the small policy predicts the next three tokens, and earns the share of them that it gets right.

RLPT (arXiv 2509.19249) predicts sentences, which are too long for this policy; see docs/guides/segments.md.

Command   bash launch/local.sh --config=configs/segments_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      47 minutes on a shared machine with a load of about 20 (28 November 2026); 4.0 minutes of processor time
Results   with the earlier base policy, of version 0.1.0; one seed, share of three tokens at held-out positions above 0.5 nats:
          17.7 % before, 21.4 % after (± 2 and ± 3 points); all three right: 0.5 %, 1.9 %
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
