"""The paper's run with DeepSeek-R1-Distill-Qwen-7B, for 16 chips: rpt_14b.py with a smaller policy.

Command   python -m rpt_jax.main --config=configs/rpt_7b.py
Needs     models/DeepSeek-R1-Distill-Qwen-7B, a Hugging Face directory; data/omnimath, see rpt_14b.py
Hardware  not run; compiled for v6e:4x4, where it fits (docs/results/preflight.md)
Time      not measured; an estimate is on the same page
Results   not measured
"""

from typing import Any

import rpt_14b


def get_config() -> Any:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-7B"
    config.policy.preset = "r1-distill-qwen-7b"
    config.mesh.tensor = config.mesh.rollout_tensor = 4  # One KV head per device.
    return config
