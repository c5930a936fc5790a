"""The paper's run with DeepSeek-R1-Distill-Qwen-7B, for 16 chips: rpt_14b.py with another policy.

Command   python -m rpt_jax.main --config=configs/rpt_7b.py
Needs     models/DeepSeek-R1-Distill-Qwen-7B, as Hugging Face has it; data/omnimath, see rpt_14b.py
Hardware  not run
"""

import ml_collections

from configs import rpt_14b


def get_config() -> ml_collections.ConfigDict:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-7B"
    config.policy.preset = "r1-distill-qwen-7b"
    config.mesh.tensor = 4  # Every kv head on a device of its own.
    return config
