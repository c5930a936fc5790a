"""The directory of a study: its config, which all processes must share, and its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.config.study import StudyConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.disk import check_writable
from rpt_jax.infra.run_format import STUDY_RESULTS, check_format, format_stamp
from rpt_jax.study.collection import collect
from rpt_jax.study.file_lock import locked
from rpt_jax.study.outcome import Outcome, StudyOutcomes, Unit, read_outcomes, write_outcomes
from rpt_jax.study.plan import UnitPlan

CONFIG = "study_config.json"
_LOCK = "study.lock"
_GROWING = ("arms", "references", "seeds", "budgets")  # Lists of the config that may become longer.


def claim(directory: Path, values: Mapping[str, Any]) -> None:
    """Write the config of a study to its directory, or compare it with the one that is there.

    A study may grow: arms, references, seeds and budgets may follow those that it has. Its runs do not change by this.

    Args:
      directory: created if it does not exist.
      values: what determines the results, see `plan.config_values`.

    Raises: UserError, naming the first field that differs.
    """
    check_writable(directory, "--workdir")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CONFIG
    with locked(directory / _LOCK):
        if path.exists():
            _check_grows(directory, _read_config(path), values)
        elif others := [file.name for file in directory.iterdir() if file.name != _LOCK]:
            raise UserError(
                f"--workdir={directory} is not the directory of a study, but has {sorted(others)[0]}: choose another.",
                field="--workdir",
            )
        atomic_write(path, json.dumps({**format_stamp(), "config": values}, indent=1) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    """Return the config that a study has. Raises: UserError."""
    try:
        content = {**json.loads(path.read_bytes())}
        values = {**content["config"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged; choose another --workdir.", field="--workdir") from None
    check_format(content, path)
    return values


def _check_grows(directory: Path, theirs: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check that a config is the one of a study, or adds to it. Raises: UserError, naming the first field that differs."""
    added = tuple(f"arms.{arm}." for arm in values["arms"] if arm not in theirs.get("arms", []))
    for name in {**values, **theirs}:
        there = theirs.get(name)
        now = values.get(name)
        if there == now or (name not in theirs and name.startswith(added)):
            continue
        if name in _GROWING and isinstance(there, list) and values[name][: len(there)] == there:
            continue
        hint = " What a study has stays in front; more may follow." if name in _GROWING else ""
        raise UserError(
            f"--workdir={directory} belongs to a study with another config ({name}: {there!r} there, {now!r} now).{hint} Choose "
            "another --workdir.",
            field=name,
        )


def read_taken(path: Path, study: StudyConfig, units: Sequence[UnitPlan]) -> tuple[Outcome, ...]:
    """Return what another study has measured of the units of this one.

    Args:
      path: the other's `results.json`.
      study: the config of this one.
      units: all of its units.

    Raises: UserError, if the file is none, or of another study.
    """
    theirs = read_outcomes(path)
    if reason := _difference(theirs, study, units):
        raise UserError(f"--results={path} is not of this study: {reason}.", field="--results")
    return theirs.outcomes


def _difference(theirs: StudyOutcomes, study: StudyConfig, units: Sequence[UnitPlan]) -> str:
    """Return in what the results of another study differ from those of this one; "" if in nothing that they show."""
    for field in ("question", "matched_by", "main_score"):
        if getattr(theirs, field) != getattr(study, field):
            return f"its {field} is '{getattr(theirs, field)}', not '{getattr(study, field)}'"
    descriptions = {arm.name: arm.description for arm in study.arms}
    for arm in theirs.arms:
        if arm.description != descriptions.get(arm.name, arm.description):
            return f"its arm '{arm.name}' is '{arm.description}', not '{descriptions[arm.name]}'"
    planned = {unit.unit for unit in units}
    for outcome in theirs.outcomes:
        if outcome.unit not in planned:
            return f"it has '{outcome.unit}'"
        if study.main_score not in outcome.scores:
            return f"its '{outcome.unit}' has no score '{study.main_score}'"
    return ""


def read_recorded(directory: Path, taken: Sequence[Outcome] = ()) -> dict[Unit, Outcome]:
    """Return what units have measured that need not have directories: in `results.json` or, if it has not, among `taken`.

    Raises: UserError, if `results.json` is damaged.
    """
    path = directory / STUDY_RESULTS
    own = read_outcomes(path).outcomes if path.exists() else ()
    return {outcome.unit: outcome for outcome in (*taken, *own)}


def write_results(
    study: StudyConfig,
    name: str,
    units: Sequence[UnitPlan],
    directory: Path,
    command: str,
    taken: Sequence[Outcome] = (),
) -> StudyOutcomes:
    """Write what all units have measured so far to `results.json`, and return it.

    What it has already about units whose directories are incomplete or gone stays.

    Args:
      study: the config.
      name: of the study.
      units: all of its units, also those of other parts.
      directory: of the study.
      command: that repeats it.
      taken: what other studies have measured of these units.

    Raises: UserError, if a result is damaged.
    """
    with locked(directory / _LOCK):
        outcomes = collect(study, name, units, [command], read_recorded(directory, taken))
        write_outcomes(outcomes, directory / STUDY_RESULTS)
    return outcomes
