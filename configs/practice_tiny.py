"""Third stage of the base policy of configs/rpt_tiny.py: sums of several numbers.

The weights in configs/tiny went through the first two stages on 22 November 2026, when traces calculated with two numbers only
and did not recognize units such as kg/cow. Running all three stages again practices these from the beginning.

Command   bash launch/local.sh --config=configs/practice_tiny.py
Needs     runs/cold_start_tiny_seed1, the second stage
Hardware  2 CPU cores, 4 GB of memory
Time      27 minutes (24 November 2026)
Results   cross-entropy at the end: documents 0.12, traces 0.04 nats per token
"""

from typing import Any

import cold_start_tiny


def get_config() -> Any:
    config = cold_start_tiny.get_config()
    config.seed = 2
    config.policy.path = "runs/cold_start_tiny_seed1/policy"
    config.pretrain.trace_options.calculation_position_fraction = 0.3
    config.training.total_steps = 1200
    config.optimizer.learning_rate = 1.5e-3
    return config
