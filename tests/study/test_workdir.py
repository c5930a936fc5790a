"""What a study has measured outlives the directories of its runs, and can be taken over by another workdir."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from rpt_jax.config.loading import load_study
from rpt_jax.config.study import StudyConfig
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.run_format import STUDY_RESULTS
from rpt_jax.study.__main__ import main
from rpt_jax.study.outcome import (
    BEFORE_TUNING,
    Arm,
    Outcome,
    StudyOutcomes,
    Unit,
    read_outcomes,
    write_outcomes,
)
from rpt_jax.study.plan import UnitPlan, make_plan
from rpt_jax.study.workdir import read_taken, write_results
from tests.helpers.paths import ROOT
from tests.helpers.studies import BUDGET, small_study
from tests.helpers.study import outcome, study

PUBLISHED = ROOT / "docs" / "results" / "study"
STUDY = dataclasses.replace(small_study(), tuning=None, main_score="reasoning/hard", seeds=(0, 1))


def results_of(units: Sequence[Outcome], **fields: object) -> StudyOutcomes:
    """Return what a study with the config of `STUDY` has measured of some units."""
    arms = tuple(Arm(arm.name, arm.description) for arm in STUDY.arms)
    results = study(units, [arm.name for arm in arms])
    return dataclasses.replace(results, **{"question": STUDY.question, "arms": arms, **fields})


def leave_results(unit: UnitPlan, accuracy: float) -> None:
    """Write what the evaluation of an arm without stages leaves."""
    result = {"accuracy": accuracy, "low": 0.0, "high": 1.0, "positions": 8}
    summary = {"difficulties": {"direct/prefix": {"hard": result}, "reasoning/prefix/random@1": {"hard": result}}}
    content = {"suite": "next_token", "summary": summary, "scores": {}, "devices": 1, "device_kind": "cpu"}
    (run,) = unit.runs
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / run.result).write_text(json.dumps(content))


def write(directory: Path, *, taken: tuple[Outcome, ...] = (), config: StudyConfig = STUDY):
    return write_results(config, "study", make_plan(config, directory), directory, "command", taken)


def accuracies(directory: Path) -> dict[str, float]:
    results = read_outcomes(directory / STUDY_RESULTS)
    return {str(each.unit): each.scores["reasoning/hard"].value for each in results.outcomes}


def evaluated_only(*overrides: str) -> StudyConfig:
    """Return a study that evaluates the starting policy, with more overrides."""
    [suite] = STUDY.evaluations
    suite = dataclasses.replace(suite, overrides=(*suite.overrides, *overrides))
    return dataclasses.replace(STUDY, arms=STUDY.arms[:1], budgets=(), evaluations=(suite,))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command that runs `STUDY` in the folder "study"."""
    config = tmp_path / "a_study.py"
    config.write_text("from tests.study.test_workdir import STUDY\n\n\ndef get_config():\n    return STUDY\n")
    return ["study", f"--config={config}", f"--workdir={tmp_path / 'study'}"]


def test_results_stay_when_the_directory_of_a_unit_is_deleted(tmp_path: Path) -> None:
    first, second = (unit for unit in make_plan(STUDY, tmp_path) if unit.unit.arm == "base")
    leave_results(first, 0.25)
    assert len(write(tmp_path).missing) == 5
    shutil.rmtree(first.directory)
    leave_results(second, 0.5)
    assert len(write(tmp_path).missing) == 4
    assert accuracies(tmp_path) == {"base, seed 0": 0.25, "base, seed 1": 0.5}

    # Runs that are there are read again.
    leave_results(first, 0.75)
    write(tmp_path)
    assert accuracies(tmp_path)["base, seed 0"] == 0.75


def test_results_of_another_workdir_are_taken_over_unless_the_study_has_its_own(tmp_path: Path) -> None:
    theirs = (outcome("base", 0, None, 0.1), outcome("base", 1, None, 0.2), outcome("rpt", 1, BUDGET, 0.3))
    own, _ = (unit for unit in make_plan(STUDY, tmp_path) if unit.unit.arm == "base")
    leave_results(own, 0.25)
    write(tmp_path, taken=theirs)
    taken = {"base, seed 0": 0.25, "base, seed 1": 0.2, "rpt, seed 1, budget 1.2e11": 0.3}
    assert accuracies(tmp_path) == taken
    write(tmp_path)
    assert accuracies(tmp_path) == taken


def test_results_of_another_study_are_refused(tmp_path: Path) -> None:
    path = tmp_path / STUDY_RESULTS
    units = make_plan(STUDY, tmp_path)
    write_outcomes(results_of([outcome("base", 0, None, 0.1), outcome("rpt", 0, 2 * BUDGET, 0.1)]), path)
    with pytest.raises(UserError, match=r"--results=.*is not of this study: it has 'rpt, seed 0, budget 2\.4e11'"):
        read_taken(path, STUDY, units)
    base = outcome("base", 0, None, 0.1)
    other_arms = (Arm("base", "Another policy."), Arm("mine", "An arm that this study does not have."))
    for fields, message in (
        ({"matched_by": "seconds"}, "its matched_by is 'seconds', not 'flops'"),
        ({"question": "Which?"}, "its question is 'Which?', not"),
        ({"main_score": "direct/hard"}, "its main_score is 'direct/hard', not 'reasoning/hard'"),
        ({"arms": other_arms}, "its arm 'base' is 'Another policy.', not"),
        ({"outcomes": (dataclasses.replace(base, scores={}),)}, "its 'base, seed 0' has no score 'reasoning/hard'"),
    ):
        write_outcomes(results_of([base], **fields), path)
        with pytest.raises(UserError, match=re.escape(message)):
            read_taken(path, STUDY, units)
    path.write_text("{}")
    with pytest.raises(UserError, match=str(path)):
        read_taken(path, STUDY, units)


def test_the_command_does_not_run_what_it_takes_over(
    tmp_path: Path, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs.json"
    units = [unit.unit for unit in make_plan(STUDY, tmp_path)]
    write_outcomes(results_of([outcome(*dataclasses.astuple(unit), 0.5) for unit in units]), theirs)
    workdir = tmp_path / "study"
    assert main([*command, f"--results={theirs}"]) == ExitCode.COMPLETE
    assert len(accuracies(workdir)) == len(units) == 6 and (workdir / "study.html").exists()
    assert not (workdir / "base").exists()
    (workdir / STUDY_RESULTS).write_text("{")
    assert main(command) == ExitCode.USER_ERROR
    assert STUDY_RESULTS in capfd.readouterr().err


def test_a_dry_run_counts_what_is_left(tmp_path: Path, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    def printed(*more: str) -> list[str]:
        assert main([*command, "--dry-run", *more]) == ExitCode.COMPLETE
        assert not (tmp_path / "study" / "study_config.json").exists()
        return capfd.readouterr().out.splitlines()

    assert printed()[-1] == "left to run: 6 of 6 units, 12 runs"
    base, rpt, *_ = make_plan(STUDY, tmp_path / "study")
    leave_results(base, 0.25)
    stage, _ = rpt.runs
    stage.directory.mkdir(parents=True)
    (stage.directory / stage.result).write_text("{}")
    lines = printed()
    assert lines[0] == "base, seed 0: complete" and lines[2] == "  rpt: complete"
    assert lines[3].startswith("  evaluate_next_token: ") and lines[-1] == "left to run: 5 of 6 units, 10 runs"

    theirs = tmp_path / "theirs.json"
    write_outcomes(results_of([outcome("rpt", 0, BUDGET, 0.5)]), theirs)
    assert printed(f"--results={theirs}")[-1] == "left to run: 4 of 6 units, 9 runs"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_policy_that_is_not_there_is_refused_before_the_first_run(
    tmp_path: Path,
    command: list[str],
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(globals(), "STUDY", evaluated_only("policy.path=nowhere"))
    assert main([*command, *more]) == ExitCode.USER_ERROR
    assert "evaluations.next_token: policy.path='nowhere' does not exist" in capfd.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("config", "file"), [("study_tiny", STUDY_RESULTS), ("study_smollm2_cpu", "smollm2_cpu.json")])
def test_the_published_results_are_those_of_their_config(config: str, file: str) -> None:
    published = load_study(f"configs/{config}.py")
    path = PUBLISHED / file
    units = make_plan(published, Path("runs/study"))
    outcomes = read_taken(path, published, units)
    assert {each.unit for each in outcomes} == {unit.unit for unit in units}
    assert all(published.main_score in each.scores and each.commits for each in outcomes)
    assert read_outcomes(path).commands[0].startswith(f"python -m rpt_jax.study --config=configs/{config}.py")


def test_the_published_details_are_those_of_the_published_units() -> None:
    details = json.loads((PUBLISHED / "details.json").read_bytes())
    fields = {name for names in details["fields"] for name in names.split(", ")}
    units = details["units"]
    assert all(unit.keys() <= {"arm", "budget", "seed", *fields} for unit in units)
    outcomes = {outcome.unit: outcome for outcome in read_outcomes(PUBLISHED / STUDY_RESULTS).outcomes}
    assert {Unit(unit["arm"], unit["seed"], unit["budget"]) for unit in units} == outcomes.keys()
    for unit in units:
        before = outcomes[Unit(unit["arm"], unit["seed"], unit["budget"])].scores[BEFORE_TUNING].value
        assert unit["accuracy_before_tuning"] == pytest.approx(before, abs=1e-5)
