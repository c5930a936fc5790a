"""Preparation of the paper's corpus (arXiv 2506.08007, section 3.3): tokens, and the proxy's entropy at every position.

Command   python -m rpt_jax.main --config=configs/score_14b.py --workdir=prepared/omnimath
          then train with --config=configs/rpt_14b.py --config.data.prepared=prepared/omnimath
In parts  add --config.data.shard=3/64 in each of 64 jobs with the same --workdir; the last one writes the manifest
Needs     models/DeepSeek-R1-Distill-Qwen-1.5B, which has the policy's tokenizer; data/omnimath, see rpt_14b.py
Hardware  not run
Time      not measured
"""

from typing import Any

import rpt_14b


def get_config() -> Any:
    config = rpt_14b.get_config()  # Same corpus and same windows as in training.
    config.task = "score"
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-1.5B"  # P §3.3
    config.policy.preset = "r1-distill-qwen-1.5b"
    config.policy.remat = "none"
    config.data.score_batch_windows = 64
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = config.mesh.rollout_tensor = 1
    return config
