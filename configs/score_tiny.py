"""Preparation of the corpus of configs/rpt_tiny.py, separate from training.

Command   python -m rpt_jax.main --config=configs/score_tiny.py
          then train with --config=configs/rpt_tiny.py --config.data.prepared=runs/score_tiny_seed0
Hardware  2 CPU cores, 4 GB of memory
Time      not measured
Results   with the earlier base policy, of version 0.1.0: 8.4 % of the positions with at least 16 tokens of context have an
          entropy above 0.5 nats
"""

from typing import Any

import rpt_tiny


def get_config() -> Any:
    config = rpt_tiny.get_config()
    config.task = "score"
    return config
