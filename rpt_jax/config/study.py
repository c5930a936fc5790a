"""The config of a study: arms that spend the same budget, seeds, and how the resulting policies are fine-tuned and evaluated.

A study's config file returns a `StudyConfig` from `get_config()`. The comment above each field is its documentation.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rpt_jax.errors import UserError, check_choice

MATCHED_BY = ("flops", "seconds")
SEEDS_PER_BUDGET = 1000  # Field `seed` of the runs of a budget is larger by this than that of the budget before.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A run: a config file, and the fields that differ from it."""

    # Name of the stage, which its directory has too.
    name: str
    # Config file, such as "configs/rpt_tiny.py".
    config: str
    # Assignments "SECTION.FIELD=VALUE", as on the command line; "{NAME}" stands for the directory of an earlier stage of the arm.
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """What a budget is spent on, from the base policy to the one that is evaluated and fine-tuned."""

    # Name of the arm in tables and directories.
    name: str
    # What the arm does, in one sentence.
    description: str = ""
    # Runs before fine-tuning, in order; the last one trains until the budget of all is spent. None for the base policy itself.
    stages: tuple[StageConfig, ...] = ()
    # Number of the study's seeds, from the first, that the arm runs with; 0 for all.
    seeds: int = 0
    # Number of the study's budgets, from the first, that the arm runs with; 0 for all.
    budgets: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """An evaluation of the policy of each arm before fine-tuning, by a suite of `rpt_jax.evaluate`."""

    # Name of the suite, such as "next_token".
    suite: str
    # Config file of the suite.
    config: str
    # Assignments "SECTION.FIELD=VALUE", as on the command line.
    overrides: tuple[str, ...] = ()
    # Name of the evaluation in directories and scores, if a suite is run more than once; "" for that of the suite.
    name: str = ""
    # Measures of the suite that are scores of the study; none for all. Not for suite "next_token", whose scores are fixed.
    measures: tuple[str, ...] = ()

    @property
    def evaluation_name(self) -> str:
        """The name of the evaluation."""
        return self.name or self.suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: every arm runs with every seed and budget; each policy is evaluated and fine-tuned by the same configs.

    It needs evaluations, or fine-tuning, or both.
    """

    # What the study is to answer, in one sentence.
    question: str = ""
    # The arms, in the order in which they are shown.
    arms: tuple[ArmConfig, ...]
    # Names of the arms that all others are compared with.
    references: tuple[str, ...] = ()
    # Seeds: field `seed` of every run at the first budget; at the second 1000 more, and so on, so that all runs are independent.
    seeds: tuple[int, ...] = (0,)
    # Unit of the budget, which is the same for all arms and does not include fine-tuning: "flops" or "seconds".
    matched_by: str = "flops"
    # Budgets, in model FLOPs or in seconds; several for a fit of accuracy over compute.
    budgets: tuple[float, ...] = ()
    # The fine-tuning of every arm, a config of task "rft", which also evaluates the policy on questions before and after it.
    tuning: StageConfig | None = None
    # Evaluations before fine-tuning.
    evaluations: tuple[SuiteConfig, ...] = ()
    # Name of the score that the conclusion rests on, chosen before the study runs.
    main_score: str = "questions/after_tuning"
    # Pairs of scores, such as ("reasoning/easy", "direct/easy"): the first minus the second is shown for each arm. What
    # fine-tuning adds is always shown. They do not change the runs, so they may be chosen later.
    contrasts: tuple[tuple[str, str], ...] = ()


def check_study(study: StudyConfig) -> None:
    """Refuse impossible values. What the stages' own configs say is checked by `study.plan`. Raises: UserError."""
    # Types, because the dataclasses do not check them.
    for name, item in (("arms", ArmConfig), ("evaluations", SuiteConfig), ("seeds", int), ("references", str)):
        _check_tuple(name, getattr(study, name), item)
    _check_tuple("budgets", study.budgets, (int, float))
    _check_tuple("contrasts", study.contrasts, tuple)
    for pair in study.contrasts:
        _check_tuple("contrasts", pair, str)
        if len(pair) != 2:
            raise UserError(f"contrasts: {pair!r} must be two names of scores.", field="contrasts")
    for arm in study.arms:
        _check_tuple(f"arms.{arm.name}.stages", arm.stages, StageConfig)
    for name, stage in named_stages(study):
        _check_tuple(f"{name}.overrides", stage.overrides, str)
    for suite in study.evaluations:
        _check_tuple(f"evaluations.{suite.evaluation_name}.measures", suite.measures, str)

    # Names.
    if not study.arms:
        raise UserError("arms is empty: a study compares arms.", field="arms")
    _check_names("arms", [arm.name for arm in study.arms])
    _check_names("evaluations: name", [suite.evaluation_name for suite in study.evaluations])
    if not (study.tuning or study.evaluations):
        raise UserError("the study has neither evaluations nor tuning: nothing is measured.", field="evaluations")
    for arm in study.arms:
        reserved = [
            *([study.tuning.name] if study.tuning else []),
            *(suite_run_name(suite) for suite in study.evaluations),
        ]
        _check_names(f"arms.{arm.name}.stages", [*(stage.name for stage in arm.stages), *reserved])
    _check_unique("seeds", study.seeds)
    for reference in study.references:
        check_choice("references", reference, [arm.name for arm in study.arms])
    check_choice("matched_by", study.matched_by, MATCHED_BY)

    # Numbers.
    if not study.seeds:
        raise UserError("seeds is empty: give one seed at least.", field="seeds")
    if max(study.seeds) - min(study.seeds) >= SEEDS_PER_BUDGET:
        raise UserError(
            f"seeds={study.seeds}: the runs of a budget have seeds that are {SEEDS_PER_BUDGET} above those of the one before, so "
            f"they must differ by less.",
            field="seeds",
        )
    trained = [arm.name for arm in study.arms if arm.stages]
    if bool(trained) != bool(study.budgets):
        problem = f"arm '{trained[0]}' has stages, which need one" if trained else "no arm has stages to spend it on"
        raise UserError(f"budgets={study.budgets}: {problem}.", field="budgets")
    for arm in study.arms:
        for name, number, all_of_them in (("seeds", arm.seeds, study.seeds), ("budgets", arm.budgets, study.budgets)):
            field = f"arms.{arm.name}.{name}"
            if not 0 <= number <= len(all_of_them):
                raise UserError(
                    f"{field}={number} must be from 0, for all, to the {len(all_of_them)} {name} of the study.",
                    field=field,
                )
    for budget in study.budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise UserError(f"budgets={study.budgets}: {budget} must be a positive number.", field="budgets")
    if len({budget_name(budget) for budget in study.budgets}) < len(study.budgets):
        raise UserError(
            f"budgets={study.budgets}: two of them are equal to six digits, which the names of directories have.",
            field="budgets",
        )


def budget_name(budget: float) -> str:
    """Return a budget as the names of directories have it."""
    return f"{budget:g}"


def suite_run_name(suite: SuiteConfig) -> str:
    """Return the name of the run, and of its directory, that evaluates a policy with a suite."""
    return f"evaluate_{suite.evaluation_name}"


def named_stages(study: StudyConfig) -> list[tuple[str, StageConfig | SuiteConfig]]:
    """Return everything that has a config file, by its name in messages."""
    stages = [(f"arms.{arm.name}.stages.{stage.name}", stage) for arm in study.arms for stage in arm.stages]
    suites = [(f"evaluations.{suite.evaluation_name}", suite) for suite in study.evaluations]
    return [*stages, *suites, *([("tuning", study.tuning)] if study.tuning else [])]


def _check_tuple(name: str, values: Any, kind: Any) -> None:
    is_right = isinstance(values, tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    if not is_right:
        names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
        raise UserError(f"{name}={values!r} must be a tuple of {' or '.join(names)}.", field=name)


def _check_names(field: str, names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{field}: '{name}' must consist of letters, digits, '-' and '_': it is the name of a directory.",
                field=field,
            )
    _check_unique(field, names)


def _check_unique(field: str, values: Iterable[Any]) -> None:
    repeated = [value for value, count in collections.Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{field}: {repeated[0]!r} occurs twice.", field=field)
