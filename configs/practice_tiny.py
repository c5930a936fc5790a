"""The third stage of the base policy of configs/rpt_tiny.py: sums of several numbers, from the second stage's weights.

Command   bash launch/local.sh --config=configs/practice_tiny.py
Hardware  2 processor cores, 4 GB
"""

import ml_collections

from configs import cold_start_tiny


def get_config() -> ml_collections.ConfigDict:
    config = cold_start_tiny.get_config()
    config.seed = 2
    config.policy.path = "runs/cold_start_tiny_seed1/policy"
    config.pretrain.due_share = 0.3
    config.training.total_steps = 1200
    config.optimizer.learning_rate = 1.5e-3
    return config
