"""Continual next-token pre-training of the small policy that comes with rpt_jax: the baseline of configs/rpt_tiny.py.

It starts from the same policy and learns the same training documents, without reasoning.

Command   bash launch/local.sh --config=configs/ntp_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      not measured
Results   not measured
"""

from typing import Any

import rpt_tiny


def get_config() -> Any:
    config = rpt_tiny.get_config()
    config.task = "pretrain"
    config.pretrain.trace_weight = 0.0
    config.pretrain.windows_per_step = 16
    return config
