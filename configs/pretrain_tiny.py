"""First stage of the base policy of configs/rpt_tiny.py: next-token pre-training on documents and traces, from random weights.

Command   bash launch/local.sh --config=configs/pretrain_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      49 minutes on a shared machine (22 November 2026)
Results   cross-entropy at the end: documents 0.21, traces 0.06 nats per token
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
    config.pretrain.traces_per_window = 18
    config.pretrain.traces = "arithmetic"
    config.pretrain.trace_options.calculation_position_fraction = 0.5
    config.pretrain.trace_options.calculation_fraction = 0.4
    config.pretrain.trace_options.drills_per_window = 8
    config.pretrain.rows_per_window = 8
    config.pretrain.row_tokens = 64

    config.training.total_steps = 3000
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.max_grad_norm = 1.0
    config.checkpoint.every_steps = 200
    return config
