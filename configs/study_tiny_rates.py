"""Which learning rate is best for each arm of configs/study_tiny.py: a study with a seed that configs/study_tiny.py does not use.

Command   python -m rpt_jax.study --config=configs/study_tiny_rates.py
Hardware  2 CPU cores, 4 GB of memory
Time      70 minutes for 16 units, two processes at a time (--part=0/2 and 1/2), 28 November 2026
Results   Questions before and after fine-tuning (%), one seed, on the test questions of configs/study_tiny.py:

          learning rate    3e-5          1e-4          3e-4          1e-3
          rpt              37.9, 61.4    54.7, 62.0    44.4, 62.7     2.8,  3.6
          ntp              17.9, 60.6    18.2, 61.0    19.3, 61.4    15.4, 56.7
          mixed_sft        29.2, 62.4    24.2, 62.7    23.9, 59.9    10.6, 47.5
          rlvr             58.8, 62.9    64.5, 62.3    57.6, 60.3    16.7, 48.2

          Differences below 4 points can be chance (intervals of ± 4 points). configs/study_tiny.py has 1e-4 for all arms, and
          for fine-tuning: from the policy of rpt at 1e-4, it reached 64.2 % with 1e-4 and 62.0 % with the 3e-4 of these runs.
"""

import dataclasses

import study_tiny
from rpt_jax.config import ArmConfig, StageConfig, StudyConfig

ARMS = ("rpt", "ntp", "mixed_sft", "rlvr")
RATES = ("3e-5", "1e-4", "3e-4", "1e-3")
TUNING_RATE = "3e-4"


def get_config() -> StudyConfig:
    study = study_tiny.get_config()
    assert study.tuning
    chosen = [arm for arm in study.arms if arm.name in ARMS]
    return dataclasses.replace(
        study,
        question="Which learning rate is best for each arm?",
        arms=tuple(arm_at_rate(arm, rate) for arm in chosen for rate in RATES),
        references=(),
        seeds=(100,),
        budgets=(2.2e12,),
        tuning=at_rate(study.tuning, TUNING_RATE),
        evaluations=tuple(suite for suite in study.evaluations if suite.suite == "next_token"),
        contrasts=(("reasoning/easy", "direct/easy"), ("reasoning/hard", "direct/hard")),
    )


def arm_at_rate(arm: ArmConfig, rate: str) -> ArmConfig:
    *earlier, last = arm.stages
    return ArmConfig(
        name=f"{arm.name}_{rate}",
        description=f"{arm.description} Learning rate {rate}.",
        stages=(*earlier, at_rate(last, rate)),
    )


def at_rate(stage: StageConfig, rate: str) -> StageConfig:
    others = tuple(field for field in stage.overrides if not field.startswith("optimizer.learning_rate="))
    return dataclasses.replace(stage, overrides=(*others, f"optimizer.learning_rate={rate}"))
