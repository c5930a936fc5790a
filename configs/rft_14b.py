"""The paper's RL fine-tuning (arXiv 2506.08007, section 4.3), from its pre-trained policy or from the one that it was made from.

Command   python -m rpt_jax.main --config=configs/rft_14b.py --config.policy.path=runs/rpt_14b_seed0/policy
          python -m rpt_jax.main --config=configs/rft_14b.py      (the baseline, without reinforcement pre-training)
Sizes     python -m rpt_jax.main --config=configs/rft_14b.py --config.mesh.fsdp=8 --describe   (on any machine)
Needs     models/DeepSeek-R1-Distill-Qwen-14B, the Hugging Face directory; data/skywork_or1, the math questions of Skywork-OR1 as
          .jsonl with the fields problem and answer (one, or a list); as many accelerators as configs/rpt_14b.py
Hardware  not run
Time      not measured
Results   not measured. The paper's, section 4.3, accuracy before and after: 51.2 and 52.7 % for the distilled model, 56.3 and
          58.3 % after reinforcement pre-training. An independent rerun found the opposite order after fine-tuning (RMT,
          arXiv 2509.24375: 48.50 % with, and 51.00 % without, reinforcement pre-training)
Written   2026-11-27

Labels: "P" is the paper; "Skywork" is the recipe of Skywork-OR1, whose filtered questions the paper takes, where the paper is
silent; "ours" is neither.
"""

from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rft"
    config.seed = 0  # ours

    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-14B"  # P §4.3, beside the policy of configs/rpt_14b.py
    config.policy.preset = "qwen2.5-14b"  # The configuration of that model.
    config.policy.dtype = "bfloat16"  # ours
    config.policy.head_precision = "bfloat16"  # ours; logits are float32
    config.policy.remat = "full"  # ours

    config.questions.source = "path"
    config.questions.path = "data/skywork_or1"  # P §4.3: questions of Skywork-OR1
    config.questions.question_field = "problem"
    config.questions.answer_field = "answer"
    config.questions.train_questions = 256  # P §4.3
    config.questions.test_questions = 200  # P §4.3
    config.questions.verifier = "boxed_math"  # Skywork: symbolic or textual equality
    config.questions.verifier_seconds = 10.0  # ours
    # Skywork keeps questions that were solved 1 to 15 of 16 times, and P follows it: run task "difficulty" with
    # rollout.samples_per_prompt=16 and questions.train_questions=0, and give its file as questions.pass_rates.

    config.prompt.template = "boxed_answer"  # ours; P gives none
    config.prompt.chat_template = True  # Skywork
    config.prompt.prefill_think_token = True  # ours
    config.prompt.max_tokens = 2048  # Skywork

    config.rollout.samples_per_prompt = 8  # ours; P §3.3 has 8 in pre-training, Skywork 16
    config.rollout.temperature = 0.8  # ours; P §3.3 has 0.8 in pre-training, Skywork 1.0
    config.rollout.max_new_tokens = 8192  # Skywork; P §3.3 has as many in pre-training

    config.optimizer.learning_rate = 1e-6  # Skywork
    config.optimizer.schedule = "constant"  # ours
    config.optimizer.warmup_steps = 0  # ours
    config.optimizer.beta1 = 0.9  # ours; P Table 5 in pre-training
    config.optimizer.beta2 = 0.999  # ours; P Table 5 in pre-training
    config.optimizer.weight_decay = 0.01  # ours; P Table 5 in pre-training
    config.optimizer.max_grad_norm = 0.2  # ours; P Table 5 in pre-training

    config.training.prompts_per_step = 64  # P §4.3
    config.training.minibatches_per_step = 1  # P §4.3: minibatch 64
    config.training.total_steps = 60  # P §4.3: 15 epochs of 256 questions
    # Skywork leaves groups without variance out of the update; in one round, nothing replaces them.
    config.training.dynamic_sampling_from = 1
    config.training.dynamic_sampling_rounds = 1
    # ours: on each device one prompt with two of its responses, at full length
    config.training.microbatch_tokens = 18_432
    config.training.logit_chunk_tokens = 4096  # ours

    config.evaluation.every_steps = 20  # ours
    config.evaluation.samples = 8  # ours; P does not say how many
    config.evaluation.temperature = 0.6  # P §4.3
    config.evaluation.max_new_tokens = 32_000  # P §4.3
    config.checkpoint.every_steps = 10  # ours

    # P gives no hardware. As configs/rpt_14b.py.
    config.mesh.data = 1  # ours
    config.mesh.fsdp = -1  # ours
    config.mesh.tensor = 8  # ours
    config.mesh.rollout_tensor = 4  # ours
    return config
