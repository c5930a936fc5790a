"""Second stage of the base policy of configs/rpt_tiny.py: practice in written arithmetic.

Command   bash launch/local.sh --config=configs/cold_start_tiny.py
Needs     runs/pretrain_tiny_seed0, the first stage
Hardware  2 CPU cores, 4 GB of memory
Time      97 minutes on a shared machine (22 November 2026)
Results   cross-entropy at the end: documents 0.13, traces 0.02 nats per token
"""

from typing import Any

import pretrain_tiny


def get_config() -> Any:
    config = pretrain_tiny.get_config()
    config.seed = 1  # The documents of the first stage, with traces at other positions.
    config.policy.path = "runs/pretrain_tiny_seed0/policy"
    # Predicting after a trace is another skill than predicting directly; many short traces train it.
    config.pretrain.traces_per_window = 40
    config.pretrain.recalled_tokens = 2
    config.pretrain.trace_options.calculation_position_fraction = 0.2
    # Rare enough that reinforcement learning has to find out that calculating pays.
    config.pretrain.trace_options.calculation_fraction = 0.3
    config.pretrain.trace_options.drills_per_window = 10
    config.pretrain.rows_per_window = 12
    config.training.total_steps = 4000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    return config
