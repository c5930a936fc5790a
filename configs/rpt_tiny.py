"""Reinforcement pre-training of a small policy on worked solutions of math problems, on an ordinary machine.

Command   bash launch/local.sh --config=configs/rpt_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      6.3 minutes, and about 1 minute to compile in a first run (28 November 2026); longer with other work on the machine
Results   hard held-out positions, by reasoning: 21.0 % before, 36.9 % after (mean of three seeds; docs/results/tiny.md)
"""

from pathlib import Path
from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rpt"

    # From configs/pretrain_tiny.py.
    config.policy.path = str(Path(__file__).parent / "tiny")
    config.policy.preset = "tiny"

    config.data.source = "gsm_symbolic"
    config.data.source_options.documents = 600
    config.data.held_out_documents = 200
    config.data.max_document_tokens = 256
    config.data.entropy_threshold = 0.5
    # The first 64 tokens are mostly names and numbers of a new problem, which cannot be predicted.
    config.data.min_context = 64

    config.prompt.template = "plain"
    config.prompt.prefill_think_token = True
    config.prompt.max_tokens = 256

    # As in the paper.
    config.rollout.samples_per_prompt = 8
    config.rollout.temperature = 0.8
    config.optimizer.max_grad_norm = 0.2
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.01

    # Scaled to the small policy (paper: 256 prompts, 1,000 steps, 8,192 new tokens, learning rate 1e-6).
    config.rollout.max_new_tokens = 64
    config.training.prompts_per_step = 32
    config.training.total_steps = 210
    config.training.dynamic_sampling_from = 180
    config.training.dynamic_sampling_rounds = 2
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10

    config.training.microbatch_tokens = 512
    # Six evaluations after the start, for the fit of accuracy against compute.
    config.evaluation.every_steps = 35
    config.evaluation.samples = 2
    config.evaluation.positions = 224
    config.evaluation.unseen_positions = 224
    # Larger batches than in training take half as long: fewer slots are idle while the longest responses end.
    config.evaluation.prompts_per_batch = 224
    config.checkpoint.every_steps = 20
    return config
