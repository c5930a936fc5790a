"""What a budget is best spent on before RL fine-tuning, with the small policy that comes with rpt_jax.

Command   python -m rpt_jax.study --config=configs/study_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      7 hours, two units at a time (--part=0/2 and 1/2, each on one core), 29 November 2026
Results   docs/results/study.md

The largest budget is that of 180 of the 210 steps of configs/rpt_tiny.py, 4.9e10 FLOPs each. The learning rates were chosen by
configs/study_tiny_rates.py. Main arms have 5 seeds and 4 budgets, which a fit of accuracy over compute needs; the others
have 3 of each. The starting policy has 15 seeds, because every arm is compared with it.

Two trained policies that differ by 3 points are told apart with a probability of 80 % by 1,070 positions of 2 samples, or by 560
questions of 4 samples; measured were 3.1 points at 1,000 positions and 2.9 points at 603 questions (`rpt_jax.evaluate
--suite=compare`, 28 November 2026). Every seed is evaluated on the same questions, so five seeds with 2 samples have 10 of each.
"""

from rpt_jax.config import ArmConfig, StageConfig, StudyConfig, SuiteConfig

# 240 held-out documents have about 1,500 positions above 0.5 nats.
DOCUMENTS = ("data.held_out_documents=240",)
EVALUATED = (*DOCUMENTS, "evaluation.positions=1100", "evaluation.samples=2")
# These positions fill one batch. They are enough, because altered reasoning costs far more than 6 points.
ALTERED = (*DOCUMENTS, "evaluation.positions=224", "evaluation.samples=2")
# A quarter of the questions is longer than configs/rft_tiny.py allows, and left out.
QUESTIONS = ("questions.source_options.test_documents=1500", "questions.test_questions=800", "evaluation.samples=2")
# A run ends when its budget is spent. Its number of steps is not known before, so the learning rate is constant.
PRETRAINED_UNTIL_SPENT = ("training.total_steps=100000", "optimizer.schedule=constant", "optimizer.learning_rate=1e-4")
UNTIL_SPENT = (*PRETRAINED_UNTIL_SPENT, "evaluation.every_steps=100000")  # Task "pretrain" evaluates nothing.


def get_config() -> StudyConfig:
    arms = (
        ArmConfig(name="base", description="The starting policy."),
        ArmConfig(
            name="rpt",
            description="Reinforcement pre-training at the positions of high entropy.",
            seeds=5,
            stages=(StageConfig(name="rpt", config="configs/rpt_tiny.py", overrides=(*DOCUMENTS, *UNTIL_SPENT)),),
        ),
        ArmConfig(
            name="rpt_random",
            description="Reinforcement pre-training at random positions.",
            seeds=3,
            budgets=3,
            stages=(
                StageConfig(
                    name="rpt",
                    config="configs/rpt_tiny.py",
                    overrides=("data.positions=random", "data.keep_fraction=0.08", *DOCUMENTS, *UNTIL_SPENT),
                ),
            ),
        ),
        ArmConfig(
            name="rpt_and_ntp",
            description="Reinforcement pre-training with the next-token loss of the documents added.",
            seeds=3,
            budgets=3,
            stages=(
                StageConfig(
                    name="rpt",
                    config="configs/rpt_tiny.py",
                    overrides=("objective.document_weight=0.1", *DOCUMENTS, *UNTIL_SPENT),
                ),
            ),
        ),
        ArmConfig(
            name="ntp",
            description="Continual next-token pre-training.",
            seeds=5,
            stages=(
                StageConfig(name="ntp", config="configs/ntp_tiny.py", overrides=(*DOCUMENTS, *PRETRAINED_UNTIL_SPENT)),
            ),
        ),
        ArmConfig(
            name="mixed_sft",
            description="Documents, and right reasoning that the starting policy sampled.",
            seeds=5,
            stages=(
                StageConfig(name="traces", config="configs/traces_tiny.py", overrides=DOCUMENTS),
                StageConfig(
                    name="sft",
                    config="configs/sft_tiny.py",
                    overrides=("pretrain.trace_options.path={traces}", *DOCUMENTS, *PRETRAINED_UNTIL_SPENT),
                ),
            ),
        ),
        ArmConfig(
            name="rlvr",
            description="RL fine-tuning for the whole budget, without pre-training.",
            seeds=3,
            budgets=3,
            stages=(StageConfig(name="rft", config="configs/rft_tiny.py", overrides=UNTIL_SPENT),),
        ),
    )
    return StudyConfig(
        question="Does reinforcement pre-training help RL fine-tuning more than other uses of the same FLOPs?",
        arms=arms,
        references=("base", "ntp", "mixed_sft", "rpt"),
        seeds=tuple(range(15)),
        matched_by="flops",
        budgets=(1.1e12, 2.2e12, 4.4e12, 8.8e12),
        tuning=StageConfig(
            name="tuning",
            config="configs/rft_tiny.py",
            overrides=(
                *QUESTIONS,
                "training.total_steps=40",
                "evaluation.every_steps=10",
                "optimizer.learning_rate=1e-4",
            ),
        ),
        evaluations=(
            SuiteConfig(suite="next_token", config="configs/rpt_tiny.py", overrides=EVALUATED),
            SuiteConfig(
                suite="altered_reasoning",
                config="configs/rpt_tiny.py",
                overrides=ALTERED,
                measures=("own/prefix", "shuffled/prefix", "other/prefix", "empty/prefix"),
            ),
        ),
        main_score="questions/after_tuning",
        contrasts=(
            ("reasoning/easy", "direct/easy"),
            ("reasoning/hard", "direct/hard"),
            ("altered_reasoning/own/prefix", "altered_reasoning/shuffled/prefix"),
            ("altered_reasoning/own/prefix", "altered_reasoning/empty/prefix"),
        ),
    )
