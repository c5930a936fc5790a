"""The third stage of the base policy of configs/rpt_tiny.py: sums of several numbers, from the second stage's weights.

The weights in configs/tiny went through the first two stages on 22 November 2026, when traces calculated with two numbers only
and did not see through units such as kg/cow; to make all three again is to practise those from the beginning.

Command   bash launch/local.sh --config=configs/practice_tiny.py
Hardware  2 processor cores, 4 GB
Time      27 minutes (24 November 2026)
Results   0.12 nats a token on the documents, 0.04 on the traces, at the end
"""

import ml_collections

import cold_start_tiny


def get_config() -> ml_collections.ConfigDict:
    config = cold_start_tiny.get_config()
    config.seed = 2
    config.policy.path = "runs/cold_start_tiny_seed1/policy"
    config.pretrain.calculation_position_fraction = 0.3
    config.training.total_steps = 1200
    config.optimizer.learning_rate = 1.5e-3
    return config
