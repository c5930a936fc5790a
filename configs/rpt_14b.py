"""The paper's run (arXiv 2506.08007): reinforcement pre-training of DeepSeek-R1-Distill-Qwen-14B on OmniMATH.

Command   python -m rpt_jax.main --config=configs/rpt_14b.py
Sizes     python -m rpt_jax.main --config=configs/rpt_14b.py --config.mesh.fsdp=8 --describe   (on any machine)
Needs     models/DeepSeek-R1-Distill-Qwen-14B: the directory as Hugging Face has it, with its shards of weights;
          data/omnimath: OmniMATH's .jsonl, with a problem and its solution in each line;
          64 accelerators of 31 GiB or more (on each, by arithmetic 62 GiB while sampling and 18 GiB in the update where all
          rollouts are live at once; where memory is less, fewer are; XLA's temporaries come on top); 500 GiB of disk.
Hardware  not run. Compiled for 64 chips by `python -m rpt_jax.preflight --config=configs/rpt_14b.py --topology=v5p:4x4x4`,
          26 November 2026, jax 0.10.2, libtpu 0.0.42.1; mesh 1 x 8 x 8. GiB a chip, what lives beside a program included;
          seconds are estimates at the makers' figures, where every response is as long as it may be:

          v5p:4x4x4, 2,048 decode slots          GiB of 95.74   compute   memory   network   bound by
          score (before the first step)                   1.7      0.04     0.03      0.09   network
          reshard                                        15.3      0        0.01      0.04   network
          sample                                         81.1     24.0    140.4      10.8    memory
          reward                                         11.1      0        0.01      0      memory
          update                                         16.7    113.0    216.2      66.7    memory
          v6e:8x8, 336 decode slots              GiB of 31.25
          score (before the first step)                   1.7      0.02     0.03      0.09   network
          reshard                                        15.3      0        0.02      0.04   network
          sample                                         25.6     12.0    454.4      12.3    memory
          reward                                         11.1      0        0.01      0      memory
          update                                         16.8     56.5    148.6      66.7    memory
          That is 357 s a step on v5p and 603 s on v6e, or more. On v6e, where a chip has room for few rollouts and reads the
          policy for them over and over, --config.mesh.rollout_tensor=8 would sample in 323 s, with 360 slots and collectives
          between hosts. In the update, plain XLA writes attention's blocks to memory: there is no kernel for its rows yet.
          launch/README.md has the figures of 16 and of 256 chips.
Time      not measured
Results   not measured. The paper's, section 4.1: next-token accuracy by reasoning 45.11 / 33.56 / 23.75 % at positions
          with an entropy above 0.5 / 1.0 / 1.5, from 3.31 / 1.66 / 1.41 % before.
Written   2026-11-22, preflight 2026-11-26

"P" is the paper; "verl", where the paper is silent, the default of the framework that it used, in June 2025; "ours" is
neither. Different from the paper: the policy itself, as it starts, scores the corpus (P §3.3: a distilled 1.5B model).
The prompt is text without a chat template; P does not say whether it has one.
"""

import ml_collections

from rpt_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.task = "rpt"
    config.seed = 0  # ours

    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-14B"  # P §3.3
    config.policy.preset = "qwen2.5-14b"  # The shape of that model.
    config.policy.dtype = "bfloat16"  # ours
    config.policy.remat = "full"  # ours

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
    config.prompt.reference_bytes = 64  # ours; longer predictions earn nothing

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
    config.training.microbatch_tokens = (
        20_480  # ours: on each device one prompt with two of its responses, of full length
    )
    config.training.logit_chunk_tokens = 4096  # ours

    config.evaluation.every_steps = 100  # P §4.2 evaluates at multiples of 100
    config.evaluation.positions = 256  # ours
    config.data.score_batch_windows = 8  # ours
    config.checkpoint.every_steps = 50  # ours

    # P gives no hardware.
    config.mesh.data = 1  # ours
    config.mesh.fsdp = -1  # ours: replicas of the activations, shards of the parameters
    config.mesh.tensor = 8  # ours: every kv head on a device of its own, or attention scores would not fit
    config.mesh.rollout_tensor = 4  # ours: a TPU's host, so that a token's collectives stay inside
    return config
