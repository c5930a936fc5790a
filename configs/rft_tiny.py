"""RL fine-tuning of the small policy that comes with rpt_jax on arithmetic word problems, on an ordinary machine.

Command   bash launch/local.sh --config=configs/rft_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      3 to 5 minutes with other work on the machine (29 November 2026)
Results   avg@8 on 189 test questions: 17.1 % before, 66.1 % after (mean of three seeds; docs/guides/rl-fine-tuning.md)
"""

from pathlib import Path
from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rft"

    # The policy that configs/rpt_tiny.py starts from. It knows the format of next-token predictions, and nothing of questions.
    config.policy.path = str(Path(__file__).parent / "tiny")
    config.policy.preset = "tiny"

    # A question is a problem with its solution up to the result of the last calculation, which is the answer.
    config.questions.source = "worked_solutions"
    config.questions.source_options.documents = 1200
    config.questions.source_options.test_documents = 300
    config.questions.verifier = "boxed_exact"
    config.questions.test_questions = 256
    config.questions.verifier_workers = 1

    config.prompt.template = "question"
    config.prompt.prefill_think_token = True
    config.prompt.max_tokens = 256

    config.rollout.samples_per_prompt = 8
    config.rollout.temperature = 0.8
    config.rollout.max_new_tokens = 64

    config.training.prompts_per_step = 32
    config.training.total_steps = 60
    config.training.dynamic_sampling_from = 1
    config.training.dynamic_sampling_rounds = 1
    config.training.microbatch_tokens = 512
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10

    config.evaluation.every_steps = 20
    config.checkpoint.every_steps = 20
    return config
