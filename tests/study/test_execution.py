"""Running a study: failures, resume, budgets, locks and stop signals, with scripts in place of the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.infra.signals import StopSignals
from rpt_jax.study.collection import outcome
from rpt_jax.study.execution import FAILURE, Executor, planned_command, read_failure, run_units
from rpt_jax.study.file_lock import locked
from rpt_jax.study.plan import UnitPlan
from tests.helpers.studies import calls, script_run, script_unit


@pytest.fixture(autouse=True)
def stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAMP", json.dumps(format_stamp()))


def run(study: Path, *units: UnitPlan) -> int:
    return run_units(units, Executor(study, StopSignals()), lambda: None)


def test_complete_runs_are_skipped_and_a_failure_is_tried_again(tmp_path: Path) -> None:
    unit = tmp_path / "rpt" / "seed0"
    stage = script_run(unit, "rpt")
    failing = script_unit(tmp_path, "rpt", stage, tuning=script_run(unit, "tuning", code=3))
    assert run(tmp_path, failing, script_unit(tmp_path, "base")) == 1
    assert calls(tmp_path) == ["rpt", "tuning", "tuning"] and not failing.is_complete
    failure = read_failure(failing)
    assert failure and failure.stage == "tuning" and "3" in failure.message and "one line" in failure.message
    assert (tmp_path / failure.log).read_text().endswith("one line\n")

    repaired = script_unit(tmp_path, "rpt", stage)
    assert run(tmp_path, repaired, script_unit(tmp_path, "base")) == 0
    assert calls(tmp_path)[3:] == ["tuning"] and repaired.is_complete and read_failure(repaired) is None


def test_a_shared_run_is_run_once_and_its_failure_fails_all_that_need_it(tmp_path: Path) -> None:
    shared = script_run(tmp_path / "a" / "seed0", "traces", code=2)
    units = [script_unit(tmp_path, arm, shared) for arm in ("a", "b")]
    assert run(tmp_path, *units, script_unit(tmp_path, "c")) == 2
    assert calls(tmp_path) == ["traces", "tuning"]
    assert all(read_failure(unit) for unit in units)


def test_the_last_stage_gets_what_the_stages_before_leave_of_the_budget(tmp_path: Path) -> None:
    unit = tmp_path / "sft" / "seed0"
    traces = script_run(unit, "traces", flops=30.0)
    budget = {"budget": 100.0, "budget_field": "training.flops_budget", "charged": (traces.directory,)}
    assert run(tmp_path, script_unit(tmp_path, "sft", traces, script_run(unit, "sft", flops=75.0, **budget))) == 0
    assert calls(tmp_path) == ["traces", "sft --config.training.flops_budget=70.0", "tuning"]

    # Neither is a run compared that ended early, nor one that has nothing left to spend.
    early = script_unit(tmp_path, "sft", traces, script_run(unit, "early", flops=65.0, **budget))
    late = script_unit(tmp_path, "sft", traces, script_run(unit, "late", **budget | {"budget": 30.0}))
    assert run(tmp_path, early, late) == 2
    # Nor the next time, or by another unit that needs the same run.
    again = script_unit(tmp_path, "other", *early.stages)
    assert run(tmp_path, early, again) == 2 and not early.is_complete
    failure = read_failure(again)
    assert failure and "with 95 of the budget of 100 spent" in failure.message
    assert not (unit / "late").exists() and planned_command(late.stages[1])[-2].startswith("--config.training.flops_")


def test_a_run_that_leaves_no_result_has_failed(tmp_path: Path) -> None:
    unit = script_unit(tmp_path, "a", tuning=script_run(tmp_path / "elsewhere" / "seed0", "tuning", code=0))
    lost = UnitPlan(**{**vars(unit), "tuning": _with_result(unit, "other.json")})
    assert run(tmp_path, lost) == 1
    failure = read_failure(lost)
    assert failure and "other.json" in failure.message


def _with_result(unit: UnitPlan, result: str):
    return type(unit.tuning)(**{**vars(unit.tuning), "result": result})


def test_a_process_that_outlives_its_parent_keeps_the_lock(tmp_path: Path) -> None:
    """A study that is killed leaves the run that is going on; another process waits until that has ended."""
    waits: list[int] = []
    with locked(tmp_path / "lock") as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))

    def end_child() -> None:
        waits.append(1)
        child.communicate(b"\n")

    with locked(tmp_path / "lock", end_child):
        assert child.returncode == 0 and waits == [1]


@pytest.mark.parametrize("content", ["", "[]", '{"flops": 1.0, "seconds": 1.0, "steps": 1}'])
def test_a_damaged_result_is_refused_by_the_name_of_its_file(tmp_path: Path, content: str) -> None:
    unit = script_unit(tmp_path, "base")
    assert run(tmp_path, unit) == 0 and outcome(unit, {}).arm == "base"
    (unit.tuning.directory / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"base/seed0/tuning/result\.json"):
        outcome(unit, {})
    (unit.directory / FAILURE).write_text(content)
    with pytest.raises(UserError) as raised:
        read_failure(unit)
    assert raised.value.field.endswith(FAILURE)
