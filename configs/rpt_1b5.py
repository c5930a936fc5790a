"""The paper's run with DeepSeek-R1-Distill-Qwen-1.5B, for 4 chips: rpt_14b.py with a smaller policy and a quarter of its prompts.

Command   python -m rpt_jax.main --config=configs/rpt_1b5.py
Needs     models/DeepSeek-R1-Distill-Qwen-1.5B, a Hugging Face directory; data/omnimath, see rpt_14b.py
Hardware  not run; compiled for v6e:2x2, where it fits (docs/results/preflight.md)
Time      not measured; an estimate is on the same page
Results   not measured
"""

from typing import Any

import rpt_14b


def get_config() -> Any:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-1.5B"
    config.policy.preset = "r1-distill-qwen-1.5b"
    config.mesh.tensor = config.mesh.rollout_tensor = 2  # One KV head per device.

    # Smaller than in the paper, to fit one host: 256 prompts of 4,096 tokens and responses of 8,192 there.
    config.data.max_document_tokens = 2048
    config.prompt.max_tokens = 2048
    config.rollout.max_new_tokens = 4096
    config.training.prompts_per_step = 64
    config.training.microbatch_tokens = 18_432
    return config
