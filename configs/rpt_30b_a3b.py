"""The paper's run with Qwen3-30B-A3B-Base, a mixture of experts, for 64 chips: rpt_14b.py with another policy.

"Is Next-Chunk Reasoning RL really better than SFT?" (arXiv 2608.23256) trained this policy with the paper's objective on other
data, and found that supervised fine-tuning on mixed data does as well or better at a seventieth of the cost.

Command   python -m rpt_jax.main --config=configs/rpt_30b_a3b.py
Sizes     python -m rpt_jax.main --config=configs/rpt_30b_a3b.py --config.mesh.fsdp=16 --describe   (on any machine)
Needs     models/Qwen3-30B-A3B-Base, the Hugging Face directory; data/omnimath, see rpt_14b.py; 64 accelerators
Hardware  not run; compiled for v5p:4x4x4, where it fits (docs/results/preflight.md)
Time      not measured; an estimate is on the same page
Results   not measured
Written   2026-11-28
"""

from typing import Any

import rpt_14b


def get_config() -> Any:
    config = rpt_14b.get_config()
    config.policy.path = "models/Qwen3-30B-A3B-Base"
    config.policy.preset = "qwen3-30b-a3b"
    config.data.score_batch_windows = 16  # One for each of the 64 / 4 groups of devices.
    config.mesh.tensor = config.mesh.rollout_tensor = 4  # One KV head per device, and 32 of the 128 experts.
    return config
