"""Which learning rate is best for each arm of configs/study_tiny.py: a study with a seed that configs/study_tiny.py does not use.

Command   python -m rpt_jax.study --config=configs/study_tiny_rates.py
Hardware  2 CPU cores, 4 GB of memory
Time      not measured
Results   not measured
"""

import dataclasses

import study_tiny
from rpt_jax.config import ArmConfig, StudyConfig

ARMS = ("rpt", "ntp", "mixed_sft", "rlvr")
RATES = ("3e-5", "1e-4", "3e-4", "1e-3")


def get_config() -> StudyConfig:
    study = study_tiny.get_config()
    chosen = [arm for arm in study.arms if arm.name in ARMS]
    return dataclasses.replace(
        study,
        question="Which learning rate is best for each arm?",
        arms=tuple(at_rate(arm, rate) for arm in chosen for rate in RATES),
        references=(),
        seeds=(100,),
        budgets=(2.2e12,),
        evaluations=study.evaluations[:1],
    )


def at_rate(arm: ArmConfig, rate: str) -> ArmConfig:
    *earlier, last = arm.stages
    overrides = tuple(field for field in last.overrides if not field.startswith("optimizer.learning_rate="))
    stage = dataclasses.replace(last, overrides=(*overrides, f"optimizer.learning_rate={rate}"))
    return ArmConfig(
        name=f"{arm.name}_{rate}", description=f"{arm.description} Learning rate {rate}.", stages=(*earlier, stage)
    )
