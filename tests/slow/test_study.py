"""A small study of real runs: it is killed, resumed, and its results add up. A stop signal reaches the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax.errors import ExitCode
from rpt_jax.infra.run_format import STUDY_RESULTS
from rpt_jax.study.outcome import AFTER_TUNING, read_outcomes
from tests.helpers.paths import ROOT
from tests.helpers.processes import WITH_SIGNALS
from tests.helpers.studies import BUDGET, calls

pytestmark = pytest.mark.slow

STOPPED = """
import sys
from pathlib import Path
from rpt_jax.infra.signals import StopSignals
from rpt_jax.study.execution import Executor, Stopped, run_units
from tests.helpers.studies import script_run, script_unit

study = Path(sys.argv[1])
slow = script_run(study / "a" / "seed0", "tuning", seconds=3600.0)
signals = StopSignals()
with signals.handle():
    try:
        run_units([script_unit(study, "a", tuning=slow)], Executor(study, signals), lambda: None)
    except Stopped:
        pass
"""


def test_a_study_that_was_killed_and_stopped_resumes_to_its_results(tmp_path: Path) -> None:
    config = tmp_path / "small_study.py"
    config.write_text("from tests.helpers.studies import small_study as get_config\n")
    study = tmp_path / "study"
    command = [sys.executable, "-m", "rpt_jax.study", f"--config={config}", f"--workdir={study}"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    # Kill it in the first stage of RPT: the run that is going on is left alone, and another process waits for it.
    process = start()
    _wait_for(process, study / "rpt" / "seed0" / "rpt" / "run_config.json")
    process.kill()
    process.wait()

    # Stop it in the second stage of another arm.
    process = start()
    _wait_for(process, study / "sft" / "seed0" / "sft" / "run_config.json")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == ExitCode.RESTART

    assert start().wait() == ExitCode.COMPLETE
    outcomes = read_outcomes(study / STUDY_RESULTS)
    assert [outcome.arm for outcome in outcomes.outcomes] == ["base", "rpt", "sft"]
    assert not outcomes.failures and not outcomes.missing
    base, rpt, sft = outcomes.outcomes
    assert base.flops == 0 and base.steps == 0 and base.tuning_flops > 0
    for outcome in (base, rpt, sft):
        assert {AFTER_TUNING, "direct/easy", "reasoning/easy"} <= set(outcome.scores)
    for outcome in (rpt, sft):
        assert BUDGET <= outcome.flops < 1.5 * BUDGET
        assert outcome.steps > 0

    # The traces are charged to the arm that learns them, and the scoring of the corpus to the arm that chooses positions by it.
    spent = {path.parent.name: json.loads(path.read_text())["flops"] for path in study.glob("*/seed0/*/result.json")}
    assert sft.flops == spent["traces"] + spent["sft"] and spent["traces"] > 0


def test_a_stop_signal_lets_the_run_save_and_ends_with_the_code_to_restart(tmp_path: Path) -> None:
    process = subprocess.Popen([*WITH_SIGNALS, sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT)
    try:
        while calls(tmp_path) != ["tuning"]:
            assert process.poll() is None, "ended before its run began"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == ExitCode.RESTART
    finally:
        process.kill()
    assert calls(tmp_path) == ["tuning", "saved"]
    assert not list(tmp_path.glob("*/*/failure.json"))


def _wait_for(process: subprocess.Popen[bytes], path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, f"ended before {path} was written"
