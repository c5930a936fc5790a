"""The scores of a study from the summaries of evaluations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rpt_jax.config.study import check_study
from rpt_jax.errors import UserError
from rpt_jax.study.collection import collect, suite_scores, tuning_scores
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, Score
from rpt_jax.study.plan import check_stages, make_plan
from tests.helpers.studies import small_study


def average(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 8}


def test_scores_have_the_name_of_their_evaluation():
    evaluation = {"suite": "questions", "scores": {"avg@4": {"micro": average(0.5)}}}
    assert suite_scores("gsm8k", evaluation) == {"gsm8k/avg@4": Score(0.5, 0.4, 0.6, 8)}


def test_only_the_measures_of_the_config_are_scores():
    results = {name: {"micro": average(0.5)} for name in ("own/prefix", "own/first_token")}
    evaluation = {"suite": "altered_reasoning", "scores": results}
    scores = suite_scores("altered", evaluation, ("own/prefix",))
    assert scores == {"altered/own/prefix": Score(0.5, 0.4, 0.6, 8)}
    with pytest.raises(UserError, match=r"evaluations\.altered\.measures='own/prefx'.*Did you mean 'own/prefix'"):
        suite_scores("altered", evaluation, ("own/prefx",))


def test_next_token_accuracies_have_a_name_only_if_it_is_another():
    accuracy = {"hard": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "positions": 8}, "easy": {"positions": 0}}
    summary = {"difficulties": {"direct/prefix": accuracy, "reasoning/prefix/random@1": accuracy}}
    evaluation = {"suite": "next_token", "summary": summary, "scores": {}}
    score = Score(0.5, 0.25, 0.75, 8)
    assert suite_scores("next_token", evaluation) == {"direct/hard": score, "reasoning/hard": score}
    assert suite_scores("unseen", evaluation) == {"unseen/direct/hard": score, "unseen/reasoning/hard": score}


def test_evaluations_during_fine_tuning_are_scores():
    def evaluated(mean: float):
        return {"accuracy": {"micro": average(mean), "categories": {"all": average(mean)}}}

    def line(step: int, mean: float):
        names = ("eval/questions/accuracy", "eval/questions/accuracy/low", "eval/questions/accuracy/high")
        return {"step": step} | dict(zip(names, (mean, mean - 0.1, mean + 0.1), strict=True))

    result = {"steps": 6, "before": evaluated(0.2), "after": evaluated(0.6)}
    lines = [line(0, 0.2), {"step": 1}, line(2, 0.3), line(4, 0.5), {"step": 5}, line(6, 0.6)]
    scores = tuning_scores(result, lines)
    assert {name: score.value for name, score in scores.items()} == {
        BEFORE_TUNING: 0.2,
        "questions/tuning_step_2": 0.3,
        "questions/tuning_step_4": 0.5,
        AFTER_TUNING: 0.6,
    }
    assert scores["questions/tuning_step_2"] == Score(0.3, 0.3 - 0.1, 0.3 + 0.1, 8)


def test_accuracies_of_several_categories_are_scores():
    def evaluated(mean: float):
        accuracy = {"micro": average(mean), "categories": {"seen": average(mean + 0.1), "unseen": average(mean - 0.1)}}
        return {"accuracy": accuracy}

    scores = tuning_scores({"steps": 6, "before": evaluated(0.2), "after": evaluated(0.6)}, [])
    assert {name: round(score.value, 1) for name, score in scores.items()} == {
        BEFORE_TUNING: 0.2,
        AFTER_TUNING: 0.6,
        f"{BEFORE_TUNING}/seen": 0.3,
        f"{BEFORE_TUNING}/unseen": 0.1,
        f"{AFTER_TUNING}/seen": 0.7,
        f"{AFTER_TUNING}/unseen": 0.5,
    }


def test_a_study_need_not_fine_tune(tmp_path: Path):
    study = dataclasses.replace(small_study(), tuning=None, main_score="reasoning/hard")
    check_study(study)
    check_stages(study)
    units = make_plan(study, tmp_path)
    base = units[0]
    (evaluation,) = base.runs
    evaluation.directory.mkdir(parents=True)
    accuracy = {"hard": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "positions": 8}}
    summary = {"difficulties": {"direct/prefix": accuracy, "reasoning/prefix/random@1": accuracy}}
    content = {
        "suite": "next_token",
        "summary": summary,
        "scores": {},
        "devices": 1,
        "device_kind": "cpu",
        "commit": "5e577f2",
    }
    (evaluation.directory / evaluation.result).write_text(json.dumps(content))
    outcomes = collect(study, "study", units, (), {})
    (outcome,) = outcomes.outcomes
    assert outcome.unit == base.unit and outcome.tuning_flops == 0
    assert outcome.scores == {name: Score(0.5, 0.25, 0.75, 8) for name in ("direct/hard", "reasoning/hard")}
    assert outcomes.devices() == "1 x cpu"
    assert outcome.commits == ("5e577f2",) and outcomes.commits() == "5e577f2"
