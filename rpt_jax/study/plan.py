"""The plan of a study: its units, and the runs of each as ordinary commands in directories of their own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.config import Experiment, from_config_dict, load_config_file
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.config.study import (
    SEEDS_PER_BUDGET,
    ArmConfig,
    StageConfig,
    StudyConfig,
    SuiteConfig,
    budget_name,
    named_stages,
    suite_run_name,
)
from rpt_jax.config.user_paths import PATH_FIELDS, is_url
from rpt_jax.corpus.tokenization import parse_shard
from rpt_jax.errors import UserError, check_choice
from rpt_jax.evaluation.run import check_task
from rpt_jax.evaluation.stored_results import SUMMARY
from rpt_jax.evaluation.suite import SUITES
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.workdir import RESULT, read_result
from rpt_jax.setup import check_data, find_policy
from rpt_jax.study.outcome import AFTER_TUNING, BEFORE_TUNING, TUNING_STEP, Unit
from rpt_jax.weights.hf import check_files

NEXT_TOKEN = "next_token"
# How the names of the scores of fine-tuning begin: also those during it, and those of categories of questions.
_TUNING_SCORES = tuple(f"{name}/" for name in (BEFORE_TUNING, AFTER_TUNING)) + (TUNING_STEP.format(""),)
_DATA = ("data.", "questions.")  # The sections that name what a run reads.
# Fields that a stage may not override, because the study sets them.
_SET_BY_STUDY = ("seed", "training.flops_budget", "training.seconds_budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A command that writes a directory.

    Attributes:
      name: of the stage or the evaluation.
      directory: its `--workdir`.
      command: with all arguments but that of the budget.
      result: the file in `directory` that a complete run has.
      budget: of this run and those in `charged` together; None for a run without a budget.
      budget_field: the config field that holds what is left of it for this run.
      charged: directories of the runs before this one in the arm.
    """

    name: str
    directory: Path
    command: tuple[str, ...]
    result: str
    budget: float | None = None
    budget_field: str = ""
    charged: tuple[Path, ...] = ()

    @property
    def log(self) -> Path:
        """The file that has the run's output."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def lock(self) -> Path:
        """The file that is locked while the run is going on."""
        return self.directory.with_name(f"{self.directory.name}.lock")

    @property
    def is_complete(self) -> bool:
        """Whether its result is there."""
        return (self.directory / self.result).is_file()

    def spent(self) -> float:
        """Return what this run and those in `charged` have spent of the budget. Raises: UserError, if one is not complete."""
        return sum(cost(directory)[self.budget_field] for directory in (*self.charged, self.directory))


def cost(directory: Path) -> dict[str, float]:
    """Return what the complete run in `directory` has spent, by the budget field that limits it. Raises: UserError."""
    result = read_result(directory)
    if result is None:
        raise UserError(f"{directory} has no result of a finished run.", field=str(directory))
    return {"training.flops_budget": result["flops"], "training.seconds_budget": result["seconds"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """The runs of a unit. A run that several units have in common has the directory of the first of them.

    Attributes:
      unit: the arm, the seed and the budget.
      directory: of the unit.
      stages: spend the budget.
      evaluations: of the policy that the stages end with, by name.
      tuning: fine-tunes that policy; None if the study does not.
    """

    unit: Unit
    directory: Path
    stages: tuple[Run, ...]
    evaluations: Mapping[str, Run]
    tuning: Run | None

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, in the order of execution."""
        return (*self.stages, *self.evaluations.values(), *([self.tuning] if self.tuning else []))

    @property
    def is_complete(self) -> bool:
        """Whether all runs are complete, and have spent their budgets. Raises: UserError, if a result is damaged."""
        if not all(run.is_complete for run in self.runs):
            return False
        return all(run.budget is None or run.spent() >= run.budget for run in self.runs)


def check_stages(study: StudyConfig) -> dict[str, Experiment]:
    """Load the config of every stage and evaluation, and check that they belong together.

    Returns: the experiments by the name of the stage; the directories of other stages have placeholders.

    Raises: UserError, naming the stage or its field.
    """
    for suite in study.evaluations:
        of_policies = [choice.name for choice in SUITES.choices() if choice.requirements.policy]
        check_choice(f"evaluations.{suite.evaluation_name}.suite", suite.suite, of_policies)

    experiments = {}
    for name, stage in named_stages(study):
        for assignment in stage.overrides:
            field = assignment.partition("=")[0]
            if field in _SET_BY_STUDY:
                raise UserError(
                    f"{name}.overrides: {field} is set by the study; leave it out.", field=f"{name}.overrides"
                )
        experiments[name] = _load(name, stage)

    # Tasks.
    for arm in study.arms:
        for stage in arm.stages:
            name = f"arms.{arm.name}.stages.{stage.name}"
            task = experiments[name].task
            is_last = stage is arm.stages[-1]
            allowed = ("rpt", "rft", "pretrain") if is_last else ("rpt", "rft", "pretrain", "traces")
            check_choice(f"{name}: task", task, allowed)
            if is_last:
                _load(name, stage, f"training.{study.matched_by}_budget={study.budgets[0]!r}")
            _check_placeholders(name, stage, arm)
    if study.tuning:
        check_choice("tuning: task", experiments["tuning"].task, ["rft"])
    for suite in study.evaluations:
        if suite.measures and suite.suite == NEXT_TOKEN:
            name = f"evaluations.{suite.evaluation_name}.measures"
            raise UserError(f"{name}: the scores of suite '{NEXT_TOKEN}' are fixed; leave it out.", field=name)
        check_task(suite.suite, experiments[f"evaluations.{suite.evaluation_name}"])

    # The base policy is the same everywhere.
    paths = {name: experiment.policy.path for name, experiment in experiments.items()}
    first, base = next((name, path) for name, path in reversed(paths.items()) if "{" not in path)
    for name, path in paths.items():
        if path != base and "{" not in path:
            raise UserError(
                f"{name}: policy.path='{path}', but {first} starts from '{base}': all arms start from the same policy.",
                field="policy.path",
            )

    _check_score(study, "main_score", study.main_score)
    for pair in study.contrasts:
        for score in pair:
            _check_score(study, "contrasts", score)
    return experiments


def check_inputs(study: StudyConfig, experiments: Mapping[str, Experiment]) -> None:
    """Check that the policy and the data of every stage and evaluation are available, as their runs do at the start.

    What is at a URL, or in the directory of an earlier stage, is left to the run.

    Args:
      study: the config.
      experiments: those of `check_stages`.

    Raises: UserError, naming the stage.
    """
    for name, stage in named_stages(study):
        experiment = experiments[name]
        policy = experiment.policy.path
        paths = [value for field, value in leaves(experiment) if field in PATH_FIELDS and field.startswith(_DATA)]
        try:
            if policy and _is_here(policy):
                # An evaluation takes the directory of a run, too.
                (find_policy if isinstance(stage, SuiteConfig) else check_files)(policy, "policy.path")
            if all(map(_is_here, paths)):
                check_data(experiment)
        except UserError as error:
            raise UserError(f"{name}: {error}", field=error.field) from None


def _is_here(path: str) -> bool:
    """Return whether a path of a config is neither a URL nor in the directory of another stage."""
    return "{" not in path and not is_url(path)


def _check_score(study: StudyConfig, field: str, score: str) -> None:
    """Check that the study has a score, as far as its name tells before the runs. Raises: UserError."""
    if score.startswith(tuple(f"{suite.evaluation_name}/" for suite in study.evaluations)):
        return
    if study.tuning and score.startswith(_TUNING_SCORES):
        return
    scores = [BEFORE_TUNING, AFTER_TUNING] if study.tuning else []
    if any(suite.suite == suite.evaluation_name == NEXT_TOKEN for suite in study.evaluations):
        scores += [f"{mode}/{difficulty}" for mode in ("direct", "reasoning") for difficulty in DIFFICULTIES]
    check_choice(field, score, scores)


def _load(name: str, stage: StageConfig | SuiteConfig, *more: str) -> Experiment:
    """Return the experiment of a stage, with more overrides than its own. Raises: UserError, which names the stage."""
    try:
        suite = stage.suite if isinstance(stage, SuiteConfig) else ""
        return from_config_dict(load_config_file(stage.config), [*stage.overrides, *more], suite)
    except UserError as error:
        raise UserError(f"{name}: {error}", field=error.field) from None


def _check_placeholders(name: str, stage: StageConfig, arm: ArmConfig) -> None:
    """Check that overrides name earlier stages. Raises: UserError."""
    earlier = {other.name: "DIR" for other in arm.stages[: arm.stages.index(stage)]}
    for assignment in stage.overrides:
        try:
            assignment.format_map(earlier)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{name}.overrides: '{assignment}' has {error} in braces, which is not an earlier stage of the arm "
                f"({', '.join(earlier) or 'there is none'}).",
                field=f"{name}.overrides",
            ) from None


def config_values(study: StudyConfig, experiments: Mapping[str, Experiment]) -> dict[str, Any]:
    """Return everything that determines the results of a study, as JSON values by name.

    Args:
      study: the config.
      experiments: those of `check_stages`.
    """
    values: dict[str, Any] = {}
    for field in ("question", "references", "seeds", "matched_by", "budgets", "main_score"):
        value = getattr(study, field)
        values[field] = list(value) if isinstance(value, tuple) else value
    values["arms"] = [arm.name for arm in study.arms]
    values |= {f"arms.{arm.name}.description": arm.description for arm in study.arms}
    values |= {f"evaluations.{suite.evaluation_name}: suite": suite.suite for suite in study.evaluations}
    for name, experiment in experiments.items():
        values |= {f"{name}: {field}": value for field, value in leaves(experiment)}
    return values


def make_plan(study: StudyConfig, directory: Path) -> list[UnitPlan]:
    """Return the units of a study, all arms of a seed and a budget together.

    Args:
      study: a config that `check_stages` accepts.
      directory: of the study.
    """
    planned: dict[Any, Path] = {}  # Directories by what is run there.

    def shared(run: Run) -> Run:
        """Return the run in the directory of an equal one, if there is one."""
        key = (run.command, run.result, run.budget, run.charged)
        return dataclasses.replace(run, directory=planned.setdefault(key, run.directory))

    return [_plan_unit(study, arm, unit, directory, shared) for arm, unit in _units(study)]


def _run_seed(study: StudyConfig, unit: Unit) -> int:
    """Return field `seed` of a unit's runs: at every budget another one, so that runs of different budgets are independent."""
    return unit.seed + SEEDS_PER_BUDGET * _budget_index(study, unit)


def _budget_index(study: StudyConfig, unit: Unit) -> int:
    return 0 if unit.budget is None else [float(budget) for budget in study.budgets].index(unit.budget)


def _units(study: StudyConfig) -> Iterator[tuple[ArmConfig, Unit]]:
    for number, seed in enumerate(study.seeds, start=1):
        arms = [arm for arm in study.arms if not arm.seeds or number <= arm.seeds]
        for i, budget in enumerate(study.budgets or (None,)):
            for arm in arms:
                if arm.stages and (not arm.budgets or i < arm.budgets):
                    yield arm, Unit(arm.name, seed, budget and float(budget))
                elif not arm.stages and i == 0:
                    yield arm, Unit(arm.name, seed, None)


def _plan_unit(study: StudyConfig, arm: ArmConfig, unit: Unit, directory: Path, shared: Any) -> UnitPlan:
    # A study that grows keeps the directories that it has, so the first budget needs none.
    parts = [arm.name, f"seed{unit.seed}"]
    if unit.budget and _budget_index(study, unit):
        parts.insert(1, f"{study.matched_by}_{budget_name(unit.budget)}")
    path = directory.joinpath(*parts)
    seed = _run_seed(study, unit)

    # The stages before fine-tuning.
    stages: dict[str, Run] = {}
    for stage in arm.stages:
        is_last = stage is arm.stages[-1]
        directories = {name: str(run.directory) for name, run in stages.items()}
        overrides = [assignment.format_map(directories) for assignment in stage.overrides]
        stages[stage.name] = shared(
            Run(
                name=stage.name,
                directory=path / stage.name,
                command=_command("rpt_jax.main", stage.config, seed, overrides),
                result=RESULT,
                budget=unit.budget if is_last else None,
                budget_field=f"training.{study.matched_by}_budget" if is_last else "",
                charged=tuple(run.directory for run in stages.values()),
            )
        )

    # Evaluations and fine-tuning of the policy that the last stage writes, or else of the configs' own.
    policy = str(stages[arm.stages[-1].name].directory / POLICY) if arm.stages else ""
    evaluations = {suite.evaluation_name: shared(_evaluation(suite, seed, policy, path)) for suite in study.evaluations}
    tuning = shared(_tuning(study.tuning, seed, policy, path)) if study.tuning else None
    return UnitPlan(unit=unit, directory=path, stages=tuple(stages.values()), evaluations=evaluations, tuning=tuning)


def _tuning(stage: StageConfig, seed: int, policy: str, directory: Path) -> Run:
    """Return the fine-tuning of a policy; "" is that of the config."""
    overrides = [*stage.overrides, *([f"policy.path={policy}"] if policy else [])]
    return Run(
        name=stage.name,
        directory=directory / stage.name,
        command=_command("rpt_jax.main", stage.config, seed, overrides),
        result=RESULT,
    )


def _evaluation(suite: SuiteConfig, seed: int, policy: str, directory: Path) -> Run:
    """Return the evaluation of a policy; "" is that of the config."""
    arguments = [f"--suite={suite.suite}", *([f"--policy={policy}"] if policy else [])]
    return Run(
        name=suite_run_name(suite),
        directory=directory / suite_run_name(suite),
        command=(*_command("rpt_jax.evaluate", suite.config, seed, suite.overrides), *arguments),
        result=SUMMARY,
    )


def _command(module: str, config: str, seed: int, overrides: Any) -> tuple[str, ...]:
    fields = (*overrides, f"seed={seed}")
    return (sys.executable, "-m", module, f"--config={config}", *(f"--config.{field}" for field in fields))


def select_units(
    units: Sequence[UnitPlan], directory: Path, part: str = "", names: Sequence[str] = ()
) -> Sequence[UnitPlan]:
    """Return some of a study's units.

    Args:
      units: of the study.
      directory: of the study.
      part: NUMBER/COUNT from "0/COUNT" for a share of the units; "" for all.
      names: directories of units, relative to `directory`; none for all.

    Raises: UserError, if there is no such part or unit.
    """
    by_name = {str(unit.directory.relative_to(directory)): unit for unit in units}
    if names:
        units = [by_name[check_choice("--unit", name, by_name)] for name in names]
    if part:
        number, count = parse_shard(part, "--part")
        units = units[number::count]
    return units
