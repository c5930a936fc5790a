"""The paper's run with DeepSeek-R1-Distill-Qwen-7B, for 16 chips: rpt_14b.py with another policy.

Command   python -m rpt_jax.main --config=configs/rpt_7b.py
Needs     models/DeepSeek-R1-Distill-Qwen-7B, as Hugging Face has it; data/omnimath, see rpt_14b.py
Hardware  not run. It fits: compiled by `python -m rpt_jax.preflight --config=configs/rpt_7b.py --topology=v6e:4x4`, at
          JAX_OPTIMIZATION_LEVEL=O0, 24 November 2026, jax 0.10.2, libtpu 0.0.42.1; mesh 1 x 4 x 4, 260 decode slots.
          GiB of 31.25 a chip: score 7.2, reshard 15.2, sample 25.6, reward 11.2, update 24.6
Time      not measured; by estimate 1,403 s a step or more, bound by memory, where every response is as long as it may be
"""

import ml_collections

import rpt_14b


def get_config() -> ml_collections.ConfigDict:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-7B"
    config.policy.preset = "r1-distill-qwen-7b"
    config.mesh.tensor = config.mesh.rollout_tensor = 4  # Every kv head on a device of its own.
    return config
