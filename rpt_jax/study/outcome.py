"""What a study measured: the contents of its `results.json`.

The runner of a study writes it, and the table and the page are made from it alone.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rpt_jax.config.dataclass_io import checked_type
from rpt_jax.config.study import MATCHED_BY
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.run_format import STUDY_RESULTS, check_format, format_stamp

# Names of scores that the page treats specially. Others are "direct/DIFFICULTY" and "reasoning/DIFFICULTY".
BEFORE_TUNING = "questions/before_tuning"
AFTER_TUNING = "questions/after_tuning"
TUNING_STEP = "questions/tuning_step_{}"  # At an evaluation during fine-tuning, after that many steps.


@dataclasses.dataclass(frozen=True)
class Score:
    """One accuracy of one policy.

    Attributes:
      value: in [0, 1].
      low, high: 95 % interval over documents or questions; it says nothing about other seeds.
      count: number of positions or questions.
    """

    value: float
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or not 0 <= self.value <= 1:
            raise ValueError(f"a score of {self.value} with the interval [{self.low}, {self.high}] is not in [0, 1]")
        if self.count < 1:
            raise ValueError(f"a score of {self.count} questions or positions")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run of a study, named by its arm, its seed and its budget (FLOPs or seconds; None for an arm without training)."""

    arm: str
    seed: int
    budget: float | None

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}" + (
            "" if self.budget is None else f", budget {self.budget:.3g}".replace("e+", "e")
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one unit measured.

    Attributes:
      arm, seed, budget: see `Unit`.
      flops, seconds: spent before tuning: sampling, discarded rollouts, scoring, verification, cold start and traces included.
      scores: by name, such as "reasoning/hard"; see `BEFORE_TUNING` and `AFTER_TUNING`.
      steps: training steps of its last stage before tuning; 0 if there are none or the number is unknown.
      tuning_flops, tuning_seconds: spent by fine-tuning on questions.
      tuning_steps: steps of fine-tuning; 0 if there is none or the number is unknown.
      device: the devices that its last run ran on; "" if unknown.
      commits: of the package, in all of its runs; empty if unknown.
    """

    arm: str
    seed: int
    budget: float | None
    flops: float
    seconds: float
    scores: Mapping[str, Score]
    steps: int = 0
    tuning_flops: float = 0.0
    tuning_seconds: float = 0.0
    tuning_steps: int = 0
    device: str = ""
    commits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flops", "seconds", "tuning_flops", "tuning_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{self.unit}: {name}={value} is not a finite number of at least 0")

    @property
    def unit(self) -> Unit:
        """Which unit this is."""
        return Unit(self.arm, self.seed, self.budget)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A unit that failed.

    Attributes:
      arm, seed, budget: see `Unit`.
      stage: what failed, such as "training" or "tuning".
      message: the error, in a line or two.
      log: path of the log of that stage, relative to the directory of the study.
    """

    arm: str
    seed: int
    budget: float | None
    stage: str
    message: str
    log: str

    @property
    def unit(self) -> Unit:
        """Which unit this is."""
        return Unit(self.arm, self.seed, self.budget)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of the study, and what it does in a sentence."""

    name: str
    description: str = ""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Two scores of the same arm, by name. Their difference is `score` minus `minus`."""

    score: str
    minus: str


GAIN = Contrast(AFTER_TUNING, BEFORE_TUNING)  # What fine-tuning adds.


@dataclasses.dataclass(frozen=True)
class StudyOutcomes:
    """All that a study measured so far.

    Attributes:
      name: of the study.
      question: what it is to answer, in a sentence.
      matched_by: unit of the budgets, "flops" or "seconds".
      arms: in the order in which they are shown.
      references: names of the arms that all others are compared with.
      main_score: name of the score that the headline is about, chosen before the study ran.
      outcomes: of the units that finished.
      failures: of the units that failed.
      missing: the units that have not finished or failed yet.
      commands: that repeat the study.
      version, commit: of the package that collected the results; the commit is None if it is unknown.
      contrasts: pairs of scores that are compared within each arm.
    """

    name: str
    question: str
    matched_by: str
    arms: tuple[Arm, ...]
    references: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    failures: tuple[Failure, ...]
    missing: tuple[Unit, ...]
    commands: tuple[str, ...]
    version: str
    commit: str | None
    main_score: str = AFTER_TUNING
    contrasts: tuple[Contrast, ...] = (GAIN,)

    def __post_init__(self) -> None:
        if self.matched_by not in MATCHED_BY:
            raise ValueError(f"matched_by={self.matched_by!r} is not one of {', '.join(MATCHED_BY)}")
        names = [arm.name for arm in self.arms]
        _check_unique("arm", names)
        units = [
            *(outcome.unit for outcome in self.outcomes),
            *(failure.unit for failure in self.failures),
            *self.missing,
        ]
        _check_unique("unit", units)
        for arm in (*self.references, *(unit.arm for unit in units)):
            if arm not in names:
                raise ValueError(f"arm {arm!r} is not one of the arms: {', '.join(names)}")
        for unit in units:
            if unit.budget is not None and not (math.isfinite(unit.budget) and unit.budget > 0):
                raise ValueError(f"{unit}: the budget is not a finite positive number")

    def devices(self) -> str:
        """Return the devices that the units ran on, in a phrase."""
        return ", ".join(sorted({outcome.device for outcome in self.outcomes} - {""})) or "unknown devices"

    def commits(self) -> str:
        """Return the commits of the package that the units ran with, in a phrase."""
        return ", ".join(sorted({commit for outcome in self.outcomes for commit in outcome.commits})) or "unknown"

    def budgets(self) -> list[float]:
        """Return the budgets in ascending order."""
        units = (*self.outcomes, *self.failures, *self.missing)
        return sorted({unit.budget for unit in units if unit.budget is not None})


def _check_unique(what: str, values: Iterable[object]) -> None:
    """Raise ValueError if a value occurs twice."""
    repeated = [str(value) for value, count in collections.Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} occurs twice: {repeated[0]}")


# --- reading and writing ------------------------------------------------------------------------------


def write_outcomes(outcomes: StudyOutcomes, path: Path) -> None:
    """Write a `results.json`."""
    atomic_write(path, json.dumps(format_stamp() | dataclasses.asdict(outcomes), indent=1) + "\n")


def read_outcomes(path: Path) -> StudyOutcomes:
    """Read a `results.json`.

    Raises: UserError, naming the file and the reason, if it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is damaged ({error})"
        raise _foreign(path, reason) from None
    if not isinstance(values, dict) or "outcomes" not in values:
        raise _foreign(path, "it has no 'outcomes'")
    check_format(values, path)
    try:
        return _decode({name: value for name, value in values.items() if name != "format"}, StudyOutcomes, "")
    except (UserError, ValueError) as error:
        raise _foreign(path, str(error)) from None


def _foreign(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not the {STUDY_RESULTS} of a study: {reason}.", field=str(path))


def _decode(value: Any, expected: Any, name: str) -> Any:
    """Return the JSON value of the field `name` as the expected type. Raises: UserError or ValueError, if it is none."""
    origin = typing.get_origin(expected)
    arguments = typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(value, typing.cast(type, expected), name)
    if origin is tuple:
        items = checked_type(name, value, list)
        return tuple(_decode(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(items))
    if origin is Mapping:
        entries = checked_type(name, value, dict)
        return {key: _decode(entry, arguments[1], f"{name}.{key}") for key, entry in entries.items()}
    if origin is types.UnionType:
        return None if value is None else _decode(value, arguments[0], name)
    return checked_type(name, value, expected)


def _decode_dataclass(value: Any, schema: type, name: str) -> Any:
    values = checked_type(name, value, dict)
    types_of = typing.get_type_hints(schema)
    required = {
        field.name
        for field in dataclasses.fields(schema)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    wrong = sorted((required - values.keys()) | (values.keys() - types_of.keys()))
    if wrong:
        raise ValueError(f"{name or 'the file'} lacks, or should not have, {', '.join(map(repr, wrong))}")
    return schema(**{key: _decode(item, types_of[key], f"{name}.{key}".strip(".")) for key, item in values.items()})
