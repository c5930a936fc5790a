"""Rejection sampling with the small policy that comes with rpt_jax: correct next-token reasoning for configs/sft_tiny.py.

Command   bash launch/local.sh --config=configs/traces_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      2.0 minutes on a busy shared machine (27 November 2026)
Results   with the earlier base policy, of version 0.1.0: 36.1 % of 8,192 responses accepted at 1,024 positions; 282 without
          an accepted one; 949 traces kept
"""

from typing import Any

import rpt_tiny


def get_config() -> Any:
    config = rpt_tiny.get_config()
    config.task = "traces"
    config.traces.total_prompts = 1024
    config.traces.kept_per_prompt = 2
    return config
