"""A base policy for configs/rpt_tiny.py: next-token pre-training on documents and cold-start traces, from random weights.

Command   bash launch/local.sh --config=configs/pretrain_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      about 2 hours, at 1.5 s a step (28 November 2026)
Results   configs/tiny; cross-entropy of 0.18 nats per token on documents and 0.04 on traces in the last 100 steps
"""

from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "pretrain"
    config.policy.preset = "tiny"

    config.data.source = "gsm_symbolic"
    config.data.source_options.documents = 12_000
    config.data.max_document_tokens = 256

    config.pretrain.windows_per_step = 8
    config.pretrain.traces = "arithmetic"
    # Predicting after a trace is another skill than predicting directly; many short traces train it.
    config.pretrain.traces_per_window = 40
    config.pretrain.recalled_tokens = 2
    config.pretrain.trace_options.calculation_position_fraction = 0.3
    # Rare enough that reinforcement learning has to find out that calculating pays.
    config.pretrain.trace_options.calculation_fraction = 0.3
    config.pretrain.trace_options.drills_per_window = 10
    config.pretrain.rows_per_window = 12
    config.pretrain.row_tokens = 64

    config.training.total_steps = 5000
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.max_grad_norm = 1.0
    config.checkpoint.every_steps = 200
    return config
