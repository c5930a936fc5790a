"""The second stage of the base policy of configs/rpt_tiny.py: practice in written arithmetic, from the first stage's weights.

Command   bash launch/local.sh --config=configs/cold_start_tiny.py
Hardware  2 processor cores, 4 GB
Time      97 minutes on a shared machine that also ran other work (22 November 2026); about 70 on a quiet one
Results   0.13 nats a token on the documents, 0.02 on the traces, at the end
"""

import ml_collections

import pretrain_tiny


def get_config() -> ml_collections.ConfigDict:
    config = pretrain_tiny.get_config()
    config.seed = 1  # Other positions of the same documents than in the first stage.
    config.policy.path = "runs/pretrain_tiny_seed0/policy"
    # Many short recalls: a guess behind a trace is another skill than a guess, and learns from these alone.
    config.pretrain.traces_per_document = 40
    config.pretrain.recalled_tokens = 2
    config.pretrain.calculation_position_fraction = 0.2
    # Seldom enough that reinforcement has to find out that it pays.
    config.pretrain.calculation_fraction = 0.3
    config.pretrain.drills_per_document = 10
    config.pretrain.rows_per_document = 12
    config.training.total_steps = 4000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    return config
