"""The paper's zero-shot evaluation (arXiv 2506.08007, section 4.4): multiple choice after reasoning, with a 14B policy.

Command   python -m rpt_jax.evaluate --config=configs/evaluate_14b.py --suite=multiple_choice --policy=POLICY
Needs     POLICY, a Hugging Face directory or policy/ of a run; data/mmlu_pro, the published parquet files of MMLU-Pro. For
          SuperGPQA: --config.questions.source=super_gpqa --config.questions.path=data/SuperGPQA-all.jsonl
Hardware  not run
Time      not measured
Results   not measured. The paper's: MMLU-Pro 71.1 % (macro average of 14 categories), SuperGPQA 39.0 %; before, by reasoning,
          68.9 % and 36.1 %

Labels: "P" is the paper, "GR" the harness that it refers to (General-Reasoner, arXiv 2505.14652), "ours" is neither. The paper
does not say which questions it asks; its table suggests about 200 of each category.
"""

from typing import Any

from rpt_jax.config import default_config


def get_config() -> Any:
    config = default_config()
    config.task = "rft"  # The prompts are questions.
    config.seed = 0  # ours

    config.policy.path = "models/DeepSeek-R1-Distill-Qwen-14B"  # P §3.3; --policy names another one
    config.policy.preset = "qwen2.5-14b"  # The configuration of that model.
    config.policy.dtype = "bfloat16"  # ours
    config.policy.head_precision = "bfloat16"  # ours; logits are float32

    config.questions.source = "mmlu_pro"  # P §4.4
    config.questions.path = "data/mmlu_pro"
    config.questions.test_questions = 0  # GR: all of them
    config.questions.verifier = "choice"  # Of suite "questions" only.

    config.prompt.template = "boxed_answer"  # Of suite "questions" only; the message of multiple choice is fixed.
    config.prompt.chat_template = True  # GR
    config.prompt.prefill_think_token = True  # ours
    config.prompt.max_tokens = 4096  # ours; longer questions are left out and counted

    config.multiple_choice.samples = 1  # ours
    config.multiple_choice.temperature = 0.8  # P §4.4
    config.multiple_choice.max_new_tokens = 12_288  # P §4.4
    config.multiple_choice.unparsed = "wrong"  # ours; GR: "random"

    config.training.prompts_per_step = 256  # ours: questions in a batch
    return config
