"""The plan of a study: units, parts, shared runs, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config.loading import load_study
from rpt_jax.config.study import ArmConfig, StageConfig, StudyConfig, SuiteConfig, check_study
from rpt_jax.errors import UserError
from rpt_jax.study.outcome import Unit
from rpt_jax.study.plan import check_inputs, check_stages, config_values, make_plan, select_units
from rpt_jax.study.workdir import claim
from tests.helpers.paths import STUDIES
from tests.helpers.studies import BUDGET, small_study

STUDY = small_study()
BASE, RPT, SFT = STUDY.arms
CONSTANT = ("optimizer.schedule=constant",)  # As a budget needs.


def replaced(arm: ArmConfig, **fields: Any) -> tuple[ArmConfig, ...]:
    """Return the arms of the study with the last stage of one changed."""
    stages = (*arm.stages[:-1], dataclasses.replace(arm.stages[-1], **fields))
    return tuple(dataclasses.replace(a, stages=stages) if a is arm else a for a in STUDY.arms)


def tuned_by(**fields: Any) -> StageConfig:
    return dataclasses.replace(STUDY.tuning, **fields)


def evaluated_by(**fields: Any) -> tuple[SuiteConfig, ...]:
    return tuple(dataclasses.replace(suite, **fields) for suite in STUDY.evaluations)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_planned(path: Path, tmp_path: Path) -> None:
    study = load_study(str(path))
    assert set(check_stages(study)) >= {f"evaluations.{suite.evaluation_name}" for suite in study.evaluations}
    assert make_plan(study, tmp_path)


def test_equal_runs_of_a_seed_are_shared(tmp_path: Path) -> None:
    again = dataclasses.replace(SFT, name="again")
    study = dataclasses.replace(STUDY, arms=(*STUDY.arms, again), seeds=(0, 1), budgets=(1e12, 2e12))
    units = {unit.unit: unit for unit in make_plan(study, tmp_path)}
    assert len(units) == 2 * (1 + 3 * 2)
    first, repeated, larger = (
        units[Unit(arm, 1, budget)] for arm, budget in (("sft", 1e12), ("again", 1e12), ("sft", 2e12))
    )
    assert first.runs == repeated.runs  # A run of the same command is the same run.
    assert units[Unit("sft", 0, 1e12)].stages[0] != first.stages[0]
    # Everything else of a unit is in its own directory.
    for unit in (first, larger, units[Unit("base", 0, None)]):
        assert {run.directory.parent for run in unit.runs} == {unit.directory}
    assert len({unit.directory for unit in units.values()}) == len(units)


def test_an_arm_may_run_with_the_first_seeds_and_budgets_only(tmp_path: Path) -> None:
    arms = (BASE, RPT, dataclasses.replace(SFT, seeds=2, budgets=1))
    plans = make_plan(dataclasses.replace(STUDY, arms=arms, seeds=(3, 1, 2), budgets=(1e12, 2e12)), tmp_path)
    seeds = {(plan.unit.arm, plan.unit.budget): [] for plan in plans}
    for plan in plans:
        seeds[plan.unit.arm, plan.unit.budget].append(plan.unit.seed)
    assert seeds.pop(("base", None)) == [3, 1, 2]
    assert seeds == {
        ("rpt", 1e12): [3, 1, 2],
        ("rpt", 2e12): [3, 1, 2],
        ("sft", 1e12): [3, 1],
    }


def test_runs_of_different_budgets_have_different_seeds(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, seeds=(2, 4), budgets=(1e12, 2e12, 4e12))
    plans = [plan for plan in make_plan(study, tmp_path) if plan.unit.arm == "rpt"]
    seeds = [[argument for argument in plan.tuning.command if "--config.seed=" in argument] for plan in plans]
    assert len({tuple(seed) for seed in seeds}) == len(plans) == 6
    assert [seeds[0], seeds[3]] == [["--config.seed=2"], ["--config.seed=4"]]


def test_fine_tuning_and_evaluations_start_from_the_policy_of_the_last_stage(tmp_path: Path) -> None:
    base, _, sft = make_plan(STUDY, tmp_path)
    policy = sft.stages[-1].directory / "policy"
    assert f"--config.policy.path={policy}" in sft.tuning.command
    assert f"--policy={policy}" in sft.evaluations["next_token"].command
    assert f"--config.pretrain.trace_options.path={sft.stages[0].directory}" in sft.stages[1].command
    assert not any("policy" in argument for run in base.runs for argument in run.command)


def test_a_suite_may_run_twice_under_other_names(tmp_path: Path) -> None:
    [suite] = STUDY.evaluations
    other = dataclasses.replace(suite, name="other", overrides=(*suite.overrides, "evaluation.positions=9"))
    study = dataclasses.replace(STUDY, evaluations=(suite, other))
    assert {"evaluations.next_token", "evaluations.other"} <= set(check_stages(study))
    for plan in make_plan(study, tmp_path):
        assert {name: run.directory.name for name, run in plan.evaluations.items()} == {
            "next_token": "evaluate_next_token",
            "other": "evaluate_other",
        }
        assert "--config.evaluation.positions=9" in plan.evaluations["other"].command
    with pytest.raises(UserError, match="evaluations: name"):
        check_study(dataclasses.replace(STUDY, evaluations=(suite, suite)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_have_every_unit_once(tmp_path: Path, count: int) -> None:
    units = make_plan(dataclasses.replace(STUDY, seeds=(0, 1)), tmp_path)
    parts = [select_units(units, tmp_path, f"{number}/{count}") for number in range(count)]
    assert sorted(str(unit.unit) for part in parts for unit in part) == sorted(str(unit.unit) for unit in units)


@pytest.mark.parametrize("part", ["3/3", "1", "a/b", "-1/2"])
def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError) as raised:
        select_units(make_plan(STUDY, tmp_path), tmp_path, part)
    assert raised.value.field == "--part"


def test_units_are_selected_by_their_directories(tmp_path: Path) -> None:
    units = make_plan(dataclasses.replace(STUDY, seeds=(0, 1), budgets=(1e12, 2e12)), tmp_path)
    selected = select_units(units, tmp_path, names=("rpt/flops_2e+12/seed1", "base/seed0"))
    assert [unit.unit for unit in selected] == [Unit("rpt", 1, 2e12), Unit("base", 0, None)]
    with pytest.raises(UserError, match="Did you mean 'rpt/seed0'"):
        select_units(units, tmp_path, names=("rpt/seed_0",))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"arms": ()}, "arms"),
        ({"arms": (BASE, BASE)}, "arms"),
        ({"arms": (dataclasses.replace(BASE, name="a/b"),)}, "arms"),
        ({"arms": (BASE,)}, "budgets"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (0.0,)}, "budgets"),
        ({"budgets": (2.0000001e12, 2.0000002e12)}, "budgets"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (0, 1000)}, "seeds"),
        ({"arms": (BASE, dataclasses.replace(RPT, seeds=2))}, "arms.rpt.seeds"),
        ({"arms": (BASE, dataclasses.replace(RPT, budgets=2))}, "arms.rpt.budgets"),
        ({"references": ("bse",)}, "references"),
        ({"matched_by": "tokens"}, "matched_by"),
        ({"tuning": tuned_by(name="rpt")}, "arms.rpt.stages"),
        ({"tuning": tuned_by(overrides=("seed=1",))}, "tuning.overrides"),
        ({"tuning": tuned_by(config="configs/rpt_tiny.py", overrides=())}, "tuning: task"),
        ({"tuning": tuned_by(overrides=("training.total_stps=1",))}, "training.total_stps"),
        ({"tuning": tuned_by(overrides=("policy.path=other",))}, "policy.path"),
        (
            {"arms": replaced(SFT, overrides=(*SFT.stages[1].overrides, "policy.path={trces}"))},
            "arms.sft.stages.sft.overrides",
        ),
        ({"arms": replaced(SFT, config="configs/traces_tiny.py", overrides=())}, "arms.sft.stages.sft: task"),
        ({"arms": replaced(RPT, overrides=("optimizer.schedule=cosine",))}, "optimizer.schedule"),
        ({"main_score": "reasoning/hrd"}, "main_score"),
        ({"tuning": None}, "main_score"),
        ({"contrasts": (("reasoning/hard", "direct/hrd"),)}, "contrasts"),
        ({"contrasts": (("reasoning/hard",),)}, "contrasts"),
        ({"contrasts": ("reasoning/hard",)}, "contrasts"),
        ({"evaluations": evaluated_by(measures=("direct/prefix",))}, "evaluations.next_token.measures"),
        ({"evaluations": evaluated_by(measures="direct/prefix")}, "evaluations.next_token.measures"),
        ({"evaluations": evaluated_by(overrides=("questions.verifier=choice",))}, "questions.verifier"),
        ({"evaluations": evaluated_by(suite="next_tokn")}, "evaluations.next_tokn.suite"),
        ({"evaluations": evaluated_by(suite="compare")}, "evaluations.compare.suite"),
        ({"tuning": None, "evaluations": ()}, "evaluations"),
    ],
)
def test_a_study_that_cannot_run_is_refused(changes: dict[str, Any], field: str) -> None:
    study = dataclasses.replace(STUDY, **changes)
    with pytest.raises(UserError) as raised:
        check_study(study)
        check_stages(study)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"arms": (BASE,), "budgets": (), "tuning": tuned_by(overrides=("policy.path=nowhere",)), "evaluations": ()},
            "policy.path",
        ),
        ({"arms": replaced(RPT, overrides=(*CONSTANT, "data.source=path", "data.path=nowhere"))}, "data.path"),
        ({"arms": replaced(RPT, overrides=(*CONSTANT, "data.prepared=nowhere"))}, "data.prepared"),
        ({"tuning": tuned_by(overrides=("questions.source=path", "questions.path=nowhere"))}, "questions.path"),
        ({"evaluations": evaluated_by(overrides=("data.prepared=nowhere",))}, "data.prepared"),
    ],
)
def test_what_a_run_reads_must_be_there(changes: dict[str, Any], field: str) -> None:
    study = dataclasses.replace(STUDY, **changes)
    with pytest.raises(UserError) as raised:
        check_inputs(study, check_stages(study))
    assert raised.value.field == field


def test_what_an_earlier_stage_or_a_url_has_need_not_be_there() -> None:
    arms = replaced(SFT, overrides=(*CONSTANT, "policy.path={traces}/policy", "data.prepared=gs://bucket/corpus"))
    study = dataclasses.replace(STUDY, arms=arms)
    check_inputs(study, check_stages(study))


def test_a_changed_config_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    def claim_by(study: StudyConfig) -> None:
        claim(tmp_path / "study", config_values(study, check_stages(study)))

    claim_by(STUDY)
    claim_by(STUDY)
    for changes, field in (
        ({"seeds": (1, 0)}, "seeds"),
        ({"budgets": (2 * BUDGET,)}, "budgets"),
        ({"arms": (BASE, RPT)}, "arms"),
        ({"main_score": "questions/before_tuning"}, "main_score"),
        ({"evaluations": evaluated_by(name="next_token", suite="altered_reasoning")}, "evaluations.next_token: suite"),
        (
            {"arms": replaced(RPT, overrides=(*RPT.stages[0].overrides, "rollout.temperature=0.5"))},
            "rollout.temperature",
        ),
    ):
        with pytest.raises(UserError) as raised:
            claim_by(dataclasses.replace(STUDY, **changes))
        assert raised.value.field.endswith(field)
    claim_by(dataclasses.replace(STUDY, contrasts=(("questions/tuning_step_20", "questions/before_tuning"),)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as raised:
        claim(tmp_path, {})
    assert raised.value.field == "--workdir"


GROWN = dataclasses.replace(
    STUDY, arms=(*STUDY.arms, dataclasses.replace(SFT, name="again")), seeds=(0, 1), budgets=(BUDGET, 2 * BUDGET)
)


def test_a_study_may_grow_by_arms_seeds_and_budgets_and_not_shrink(tmp_path: Path) -> None:
    for study in (STUDY, GROWN):
        claim(tmp_path / "study", config_values(study, check_stages(study)))
    with pytest.raises(UserError) as raised:
        claim(tmp_path / "study", config_values(STUDY, check_stages(STUDY)))
    assert raised.value.field == "seeds"


def test_the_runs_of_a_study_that_grows_stay_as_they_are(tmp_path: Path) -> None:
    grown = {unit.unit: unit for unit in make_plan(GROWN, tmp_path)}
    for unit in make_plan(STUDY, tmp_path):
        assert grown[unit.unit] == unit


def test_the_packaged_study_can_run() -> None:
    study = load_study("configs/study_tiny.py")
    experiments = check_stages(study)
    assert {experiment.task for experiment in experiments.values()} == {"rpt", "rft", "pretrain", "traces"}
