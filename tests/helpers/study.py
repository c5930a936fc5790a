"""Made-up outcomes of a study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rpt_jax.study.outcome import (
    AFTER_TUNING,
    BEFORE_TUNING,
    GAIN,
    TUNING_STEP,
    Arm,
    Contrast,
    Failure,
    Outcome,
    Score,
    StudyOutcomes,
    Unit,
)

DURING_TUNING = TUNING_STEP.format(20)
SCORES = ("direct/hard", "reasoning/hard", BEFORE_TUNING, DURING_TUNING, AFTER_TUNING)


def score(value: float, count: int = 400) -> Score:
    """Return a score with the half width of a binomial interval."""
    half = 1.96 * (value * (1 - value) / count) ** 0.5
    return Score(value, max(0.0, value - half), min(1.0, value + half), count)


def outcome(arm: str, seed: int, budget: float | None, value: float, **scores: float) -> Outcome:
    """Return a unit with a value for "reasoning/hard", and others by name ("direct__hard")."""
    values = {"reasoning/hard": value} | {name.replace("__", "/"): number for name, number in scores.items()}
    spent = budget or 0.0
    return _outcome(Unit(arm, seed, budget), spent, {name: score(number) for name, number in values.items()})


def _outcome(unit: Unit, flops: float, scores: dict[str, Score]) -> Outcome:
    return Outcome(
        arm=unit.arm,
        seed=unit.seed,
        budget=unit.budget,
        flops=flops,
        seconds=flops / 1e10,
        scores=scores,
        steps=round(flops / 1e11),
        tuning_flops=1e11,
        tuning_seconds=60.0,
        tuning_steps=40,
    )


def study(outcomes: Sequence[Outcome], arms: Sequence[str] = ("base", "rpt"), **fields: object) -> StudyOutcomes:
    """Return a study of these units, with the first arm as reference."""
    values = {
        "name": "A study",
        "question": "Is it better?",
        "matched_by": "flops",
        "arms": tuple(Arm(name, f"What {name} does.") for name in arms),
        "references": (arms[0],),
        "outcomes": tuple(outcomes),
        "failures": (),
        "missing": (),
        "commands": ("python -m rpt_jax.study --config=configs/study_tiny.py",),
        "version": "0.1.0",
        "commit": None,
        "main_score": "reasoning/hard",
    }
    return StudyOutcomes(**(values | fields))


def large_study(
    names: Sequence[str] = ("base", "rpt", "ntp", "sft"), budgets: int = 4, seeds: int = 5
) -> StudyOutcomes:
    """Return a study of several budgets: the first arm has none, and the others rise to a ceiling each at its own speed.

    A unit failed, and one is missing.
    """
    rng = np.random.default_rng(0)
    base = dict(zip(SCORES, (0.32, 0.05, 0.2, 0.3, 0.35), strict=True))
    outcomes = []
    for index, arm in enumerate(names):
        for budget in (None,) if index == 0 else 1e12 * 2.0 ** np.arange(budgets):
            for seed in range(seeds):
                gain = 0.0 if budget is None else (0.5 - 0.08 * index) * (1 - 0.8 * (budget / 1e12) ** -0.7)
                values = {name: start + gain + 0.01 * rng.normal() for name, start in base.items()}
                scores = {name: score(float(np.clip(value, 0, 1))) for name, value in values.items()}
                spent = 0.0 if budget is None else budget * (1 + 0.01 * rng.random())
                outcomes.append(_outcome(Unit(arm, seed, budget), spent, scores))
    failed, missing = outcomes.pop().unit, outcomes.pop().unit
    return study(
        outcomes,
        names,
        references=(names[0], names[2]),
        main_score=AFTER_TUNING,
        contrasts=(GAIN, Contrast("reasoning/hard", "direct/hard")),
        failures=(Failure(failed.arm, failed.seed, failed.budget, "tuning", "out of memory", "units/log.txt"),),
        missing=(Unit(missing.arm, missing.seed, missing.budget),),
    )
