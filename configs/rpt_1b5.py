"""The paper's run with DeepSeek-R1-Distill-Qwen-1.5B, for 4 chips: rpt_14b.py with another policy, and a quarter of its lengths.

Command   python -m rpt_jax.main --config=configs/rpt_1b5.py
Needs     models/DeepSeek-R1-Distill-Qwen-1.5B, as Hugging Face has it; data/omnimath, see rpt_14b.py
Hardware  not run
"""

import ml_collections

from configs import rpt_14b


def get_config() -> ml_collections.ConfigDict:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-1.5B"
    config.policy.preset = "r1-distill-qwen-1.5b"
    config.mesh.tensor = 2  # Every kv head on a device of its own.

    # For a slice of one host: P has 256 prompts of 4,096 tokens and responses of 8,192.
    config.data.max_document_tokens = 2048
    config.prompt.max_tokens = 2048
    config.rollout.max_new_tokens = 4096
    config.training.prompts_per_step = 64
    config.training.microbatch_tokens = 18_432
    return config
