"""Collect what the finished runs of a study measured into `results.json`."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax import __version__
from rpt_jax.config.study import StudyConfig
from rpt_jax.errors import UserError, check_choice
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.plots import QUESTION_ACCURACY
from rpt_jax.infra.run_format import METRICS
from rpt_jax.infra.source_commit import source_commit
from rpt_jax.infra.workdir import read_result
from rpt_jax.study.execution import read_failure
from rpt_jax.study.outcome import (
    AFTER_TUNING,
    BEFORE_TUNING,
    GAIN,
    TUNING_STEP,
    Arm,
    Contrast,
    Outcome,
    Score,
    StudyOutcomes,
    Unit,
)
from rpt_jax.study.plan import NEXT_TOKEN, Run, UnitPlan

# The measures of suite "next_token" that are scores of a study, by the beginning of their names there.
_NEXT_TOKEN_MEASURES = {"direct/prefix": "direct", "reasoning/prefix/random@1": "reasoning"}


def collect(
    study: StudyConfig, name: str, units: Sequence[UnitPlan], commands: Sequence[str], recorded: Mapping[Unit, Outcome]
) -> StudyOutcomes:
    """Return what all units of a study have measured so far.

    Args:
      study: the config.
      name: of the study.
      units: all of its units.
      commands: that repeat it.
      recorded: what units have measured whose directories are incomplete or gone.

    Raises: UserError, if a result is damaged.
    """
    measures = {suite.evaluation_name: suite.measures for suite in study.evaluations}
    outcomes = {unit.unit: outcome(unit, measures) if unit.is_complete else recorded.get(unit.unit) for unit in units}
    left = [unit for unit in units if outcomes[unit.unit] is None]
    failures = {unit.unit: failure for unit in left if (failure := read_failure(unit))}
    return StudyOutcomes(
        name=name,
        question=study.question,
        matched_by=study.matched_by,
        arms=tuple(Arm(arm.name, arm.description) for arm in study.arms),
        references=study.references,
        outcomes=tuple(measured for measured in outcomes.values() if measured),
        failures=tuple(failures.values()),
        missing=tuple(unit.unit for unit in left if unit.unit not in failures),
        commands=tuple(commands),
        version=__version__,
        commit=source_commit(),
        main_score=study.main_score,
        contrasts=(*([GAIN] if study.tuning else []), *itertools.starmap(Contrast, study.contrasts)),
    )


def outcome(unit: UnitPlan, measures: Mapping[str, Sequence[str]]) -> Outcome:
    """Return what a complete unit measured and spent.

    Args:
      unit: the unit.
      measures: those of each evaluation that are scores, by its name; none for all.

    Raises: UserError, if a result is damaged or lacks a measure.
    """
    stages = [_result(run) for run in unit.stages]
    scores: dict[str, Score] = {}
    for name, run in unit.evaluations.items():
        evaluation = _read_result(run)
        with _undamaged(run.directory / run.result):
            scores |= suite_scores(name, evaluation, measures[name])
    tuning = {"flops": 0.0, "seconds": 0.0, "steps": 0}
    if unit.tuning:
        tuning = _result(unit.tuning)
        with _undamaged(unit.tuning.directory / unit.tuning.result):
            scores |= tuning_scores(tuning, read_metrics(unit.tuning.directory / METRICS))
    return Outcome(
        arm=unit.unit.arm,
        seed=unit.unit.seed,
        budget=unit.unit.budget,
        flops=sum(result["flops"] for result in stages),
        seconds=sum(result["seconds"] for result in stages),
        scores=scores,
        steps=stages[-1]["steps"] if stages else 0,
        tuning_flops=tuning["flops"],
        tuning_seconds=tuning["seconds"],
        tuning_steps=tuning["steps"],
        device=_device(unit.runs[-1]),
        commits=tuple(sorted({commit for run in unit.runs if (commit := _read_result(run).get("commit"))})),
    )


def suite_scores(name: str, evaluation: dict[str, Any], measures: Sequence[str] = ()) -> dict[str, Score]:
    """Return the scores of an evaluation by name.

    Of suite "next_token", "direct/DIFFICULTY" is the accuracy of the most likely token, and "reasoning/DIFFICULTY" that of one
    sampled prediction, both by Equation 3; NAME is before them if it is another. Those of other suites are "NAME/MEASURE".

    Args:
      name: of the evaluation.
      evaluation: the content of its `evaluation.json`.
      measures: those of another suite than "next_token" that are scores; none for all.

    Raises: UserError, if the evaluation lacks a measure.
    """
    if evaluation["suite"] != NEXT_TOKEN:
        results = evaluation["scores"]
        for measure in measures:
            check_choice(f"evaluations.{name}.measures", measure, results)
        return {f"{name}/{measure}": _score(results[measure]["micro"]) for measure in measures or results}
    prefix = "" if name == NEXT_TOKEN else f"{name}/"
    return {
        f"{prefix}{mode}/{difficulty}": Score(result["accuracy"], result["low"], result["high"], result["positions"])
        for measure, mode in _NEXT_TOKEN_MEASURES.items()
        for difficulty, result in evaluation["summary"]["difficulties"][measure].items()
        if result["positions"]
    }


def tuning_scores(result: dict[str, Any], lines: Sequence[dict[str, float]]) -> dict[str, Score]:
    """Return the accuracy on questions before fine-tuning, after it, and at the evaluations in between.

    If the questions have several categories, the accuracies before and after are also given for each: NAME/CATEGORY.

    Args:
      result: of the fine-tuning.
      lines: of its `metrics.jsonl`, in order.
    """
    before, after = (result[name]["accuracy"] for name in ("before", "after"))
    curve = {}
    for line in lines:
        if 0 < line["step"] < result["steps"] and QUESTION_ACCURACY[0] in line:
            value, low, high = (line[name] for name in QUESTION_ACCURACY)
            curve[TUNING_STEP.format(int(line["step"]))] = Score(value, low, high, after["micro"]["count"])
    ends = {BEFORE_TUNING: before, AFTER_TUNING: after}
    by_category = {
        f"{name}/{category}": _score(average)
        for name, accuracy in ends.items()
        for category, average in accuracy["categories"].items()
        if len(accuracy["categories"]) > 1
    }
    return {BEFORE_TUNING: _score(before["micro"]), **curve, AFTER_TUNING: _score(after["micro"]), **by_category}


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turn what a block raises if a result is damaged into a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Move its directory away and run the study again.",
            field=str(path),
        ) from None


def _score(average: dict[str, Any]) -> Score:
    return Score(average["mean"], average["low"], average["high"], average["count"])


def _result(run: Run) -> dict[str, Any]:
    result = read_result(run.directory)
    if result is None:
        raise UserError(f"{run.directory} has no result of a finished run.", field=str(run.directory))
    return result


def _read_result(run: Run) -> dict[str, Any]:
    """Return the content of the file that a complete run has written last."""
    path = run.directory / run.result
    with _undamaged(path):
        return {**json.loads(path.read_bytes())}


def _device(run: Run) -> str:
    """Return the devices that a complete run ran on."""
    result = _read_result(run)
    with _undamaged(run.directory / run.result):
        return f"{result['devices']} x {result['device_kind']}"
