"""The paper's run with DeepSeek-R1-Distill-Qwen-1.5B, for 4 chips: rpt_14b.py with a small policy, and a quarter of its prompts.

Command   python -m rpt_jax.main --config=configs/rpt_1b5.py
Needs     models/DeepSeek-R1-Distill-Qwen-1.5B, as Hugging Face has it; data/omnimath, see rpt_14b.py
Hardware  not run. It fits: compiled by `python -m rpt_jax.preflight --config=configs/rpt_1b5.py --topology=v6e:2x2`, at
          JAX_OPTIMIZATION_LEVEL=O0, 24 November 2026, jax 0.10.2, libtpu 0.0.42.1; mesh 1 x 2 x 2, 464 decode slots.
          GiB of 31.25 a chip: score 7.1, reshard 10.8, sample 28.0, reward 8.7, update 16.0
Time      not measured; by estimate 160 s a step or more, bound by memory, where every response is as long as it may be
"""

import ml_collections

import rpt_14b


def get_config() -> ml_collections.ConfigDict:
    config = rpt_14b.get_config()
    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-1.5B"
    config.policy.preset = "r1-distill-qwen-1.5b"
    config.mesh.tensor = config.mesh.rollout_tensor = 2  # Every kv head on a device of its own.

    # For a slice of one host: P has 256 prompts a step, of 4,096 tokens, and responses of 8,192.
    config.data.max_document_tokens = 2048
    config.prompt.max_tokens = 2048
    config.rollout.max_new_tokens = 4096
    config.training.prompts_per_step = 64
    config.training.microbatch_tokens = 18_432
    return config
