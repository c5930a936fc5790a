"""The paper's run (arXiv 2506.08007): reinforcement pre-training of DeepSeek-R1-Distill-Qwen-14B on OmniMATH.

Command   python -m rpt_jax.main --config=configs/rpt_14b.py
Sizes     python -m rpt_jax.main --config=configs/rpt_14b.py --config.mesh.fsdp=8 --describe   (on any machine)
Needs     models/DeepSeek-R1-Distill-Qwen-14B, the Hugging Face directory; data/omnimath, OmniMATH as .jsonl with the fields
          problem and solution; 64 accelerators with at least 31 GiB each; 600 GiB of disk
Hardware  not run; compiled for v5p:4x4x4 and v6e:8x8, where it fits (docs/results/preflight.md)
Time      not measured; estimates are on the same page
Results   not measured. The paper's, section 4.1: accuracy by reasoning 45.11 / 33.56 / 23.75 % at positions with an entropy above
          0.5 / 1.0 / 1.5 nats, from 3.31 / 1.66 / 1.41 % before
Written   2026-11-22

Labels: "P" is the paper; "verl" is the default of the framework that the paper used, in June 2025, where the paper is silent;
"ours" is neither. Two things differ from the paper: the starting policy itself scores the corpus (P §3.3: a distilled 1.5B
model), and the prompt has no chat template (P does not say whether it has one).
"""

from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rpt"
    config.seed = 0  # ours

    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-14B"  # P §3.3
    config.policy.preset = "qwen2.5-14b"  # The configuration of that model.
    config.policy.dtype = "bfloat16"  # ours
    config.policy.head_precision = "bfloat16"  # ours; logits are float32
    config.policy.remat = "auto"  # ours: with these rows "dots" where a chip has 95 GiB, "full" where it has 31

    config.data.source = "path"
    config.data.path = "data/omnimath"  # P §3.3: OmniMATH, 4,428 problems with solutions
    config.data.document_template = "{problem}\n{solution}"  # ours; P does not say how they are joined
    config.data.held_out_documents = 200  # P §3.3
    config.data.entropy_top_k = 16  # P §3.3
    config.data.entropy_threshold = 0.5  # ours; P gives none for training, and 0.5 for "easy" in §4.1
    config.data.max_document_tokens = 4096  # ours
    config.data.min_context = 16  # ours

    config.prompt.template = "v0"  # P §3.3, Table 10: its content in our words
    config.prompt.prefill_think_token = True  # ours
    config.prompt.max_tokens = 4096  # P Table 5
    config.prompt.reference_bytes = 64  # ours; a longer prediction earns nothing

    config.rollout.samples_per_prompt = 8  # P §3.3, Table 5
    config.rollout.temperature = 0.8  # P §3.3, Table 5
    config.rollout.max_new_tokens = 8192  # P §3.3, Table 5

    config.objective.advantage_epsilon = 1e-6  # verl
    config.objective.clip_low = 0.2  # verl; inert with one minibatch
    config.objective.clip_high = 0.2  # verl; inert with one minibatch

    config.optimizer.learning_rate = 1e-6  # P §3.3, Table 5
    config.optimizer.schedule = "constant"  # verl
    config.optimizer.warmup_steps = 0  # verl
    config.optimizer.beta1 = 0.9  # P Table 5
    config.optimizer.beta2 = 0.999  # P Table 5
    config.optimizer.epsilon = 1e-8  # ours
    config.optimizer.weight_decay = 0.01  # P Table 5
    config.optimizer.max_grad_norm = 0.2  # P Table 5, "actor gradient clip", read as the norm

    config.training.total_steps = 1000  # P §3.3
    config.training.prompts_per_step = 256  # P §3.3, Table 5
    config.training.minibatches_per_step = 1  # P Table 5: minibatch 256 = batch, exactly on-policy
    config.training.dynamic_sampling_from = 500  # P §3.3
    config.training.dynamic_sampling_rounds = 3  # ours
    # ours: on each device one prompt with two of its responses, at full length
    config.training.microbatch_tokens = 20_480
    config.training.logit_chunk_tokens = 4096  # ours

    config.evaluation.every_steps = 100  # P §4.2 evaluates at multiples of 100
    config.evaluation.positions = 256  # ours
    config.data.score_batch_windows = 8  # ours
    config.checkpoint.every_steps = 50  # ours

    # P gives no hardware.
    config.mesh.data = 1  # ours
    # ours: all remaining devices shard parameters and split the batch. With more than 64 devices set fsdp to 8 and data to -1,
    # or an update moves more bytes (docs/results/preflight.md).
    config.mesh.fsdp = -1
    config.mesh.tensor = 8  # ours: one KV head per device
    config.mesh.rollout_tensor = 4  # ours: the chips of one TPU host, so that collectives of decoding stay inside it
    return config
