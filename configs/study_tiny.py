"""What a budget is best spent on before RL fine-tuning, with the small policy that comes with rpt_jax.

Command   python -m rpt_jax.study --config=configs/study_tiny.py
Hardware  2 CPU cores, 4 GB of memory
Time      about 4 to 5 hours: an estimate from single runs (RPT 7.7 minutes, fine-tuning about 5, an evaluation about 1; 21 units)
Results   not measured

The budget is what the 210 steps of configs/rpt_tiny.py cost, 4.4e10 FLOPs each (28 November 2026).
"""

from rpt_jax.config import ArmConfig, StageConfig, StudyConfig, SuiteConfig

# A run ends when its budget is spent. Its number of steps is not known before, so the learning rate is constant.
UNTIL_SPENT = (
    "training.total_steps=100000",
    "optimizer.schedule=constant",
    "optimizer.learning_rate=2e-4",
    "evaluation.every_steps=100000",
)
PRETRAINED_UNTIL_SPENT = UNTIL_SPENT[:3]  # Task "pretrain" evaluates nothing.


def get_config() -> StudyConfig:
    arms = (
        ArmConfig(name="base", description="The starting policy."),
        ArmConfig(
            name="rpt",
            description="Reinforcement pre-training at the positions of high entropy.",
            stages=(StageConfig(name="rpt", config="configs/rpt_tiny.py", overrides=UNTIL_SPENT),),
        ),
        ArmConfig(
            name="rpt_random",
            description="Reinforcement pre-training at random positions.",
            stages=(
                StageConfig(
                    name="rpt",
                    config="configs/rpt_tiny.py",
                    overrides=("data.positions=random", "data.keep_fraction=0.08", *UNTIL_SPENT),
                ),
            ),
        ),
        ArmConfig(
            name="rpt_and_ntp",
            description="Reinforcement pre-training with the next-token loss of the documents added.",
            stages=(
                StageConfig(
                    name="rpt", config="configs/rpt_tiny.py", overrides=("objective.document_weight=0.1", *UNTIL_SPENT)
                ),
            ),
        ),
        ArmConfig(
            name="ntp",
            description="Continual next-token pre-training.",
            stages=(StageConfig(name="ntp", config="configs/ntp_tiny.py", overrides=PRETRAINED_UNTIL_SPENT),),
        ),
        ArmConfig(
            name="mixed_sft",
            description="Documents, and right reasoning that the starting policy sampled.",
            stages=(
                StageConfig(name="traces", config="configs/traces_tiny.py"),
                StageConfig(
                    name="sft",
                    config="configs/sft_tiny.py",
                    overrides=("pretrain.trace_options.path={traces}", *PRETRAINED_UNTIL_SPENT),
                ),
            ),
        ),
        ArmConfig(
            name="rlvr",
            description="RL fine-tuning for the whole budget, without pre-training.",
            stages=(StageConfig(name="rft", config="configs/rft_tiny.py", overrides=UNTIL_SPENT),),
        ),
    )
    return StudyConfig(
        question="Does reinforcement pre-training help RL fine-tuning more than other uses of the same FLOPs?",
        arms=arms,
        references=("base", "ntp", "mixed_sft"),
        seeds=(0, 1, 2),
        matched_by="flops",
        budgets=(9e12,),
        tuning=StageConfig(name="tuning", config="configs/rft_tiny.py", overrides=("evaluation.every_steps=100000",)),
        evaluations=(SuiteConfig(suite="next_token", config="configs/rpt_tiny.py"),),
        main_score="questions/after_tuning",
    )
