"""Mixed supervised fine-tuning of the small policy that comes with rpt_jax: documents, and right reasoning that it sampled.

The baseline of configs/rpt_tiny.py that imitates right responses, where RPT is rewarded for them.

Command   bash launch/local.sh --config=configs/sft_tiny.py
Needs     runs/traces_tiny_seed0, from configs/traces_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      not measured
Results   not measured
"""

from typing import Any

import ntp_tiny


def get_config() -> Any:
    config = ntp_tiny.get_config()
    config.pretrain.trace_weight = 1.0
    config.pretrain.traces = "sampled"
    config.pretrain.trace_options.path = "runs/traces_tiny_seed0"
    # Each window comes with one trace, for which there is room at any length.
    config.pretrain.traces_per_window = 1
    config.pretrain.rows_per_window = 1
    config.pretrain.row_tokens = 320
    return config
