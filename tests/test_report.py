"""The report command: it writes the page and the plots of a run, or names the file that is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax import report
from rpt_jax.infra.run_format import METRICS, RESULT, STUDY_RESULTS, format_stamp
from rpt_jax.study.outcome import write_outcomes
from tests.helpers.plots import PLOTS, keep_figures, write_run
from tests.helpers.study import large_study


def test_the_command_prints_the_page_and_the_plots_that_it_wrote(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = keep_figures(monkeypatch)
    run = write_run(tmp_path, steps=8, every=2)
    assert report.main(["report", f"--workdir={run}"]) == 0
    written = [run / "report.html", *(run / "plots" / f"{name}.png" for name in PLOTS)]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]
    assert (run / "report.html").is_file()
    assert sorted(figures) == sorted(PLOTS)


def test_unexpected_arguments_are_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(["report", "run"])
    assert stopped.value.code == 2


def test_a_missing_file_is_named_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpt_jax.report", f"--workdir={tmp_path}"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "metrics.jsonl is missing" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_run_of_a_task_without_plots_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, steps=2, every=1)
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    (run / METRICS).write_text(
        "".join(json.dumps({"step": line["step"], "loss/document": 1.0}) + "\n" for line in lines)
    )
    (run / RESULT).write_text(json.dumps(format_stamp() | {"steps": 2, "flops": 1.0, "seconds": 1.0}))
    assert report.main(["report", f"--workdir={run}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(run / "report.html")]
    assert "Only runs of tasks 'rpt' and 'rft' have plots." in printed.err


def test_a_missing_folder_is_named_by_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["report", f"--workdir={tmp_path / 'absent'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --workdir={tmp_path / 'absent'}")


def test_the_page_of_a_study_is_written_from_its_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_outcomes(large_study(budgets=2, seeds=2), tmp_path / STUDY_RESULTS)
    assert report.main(["report", f"--workdir={tmp_path}"]) == 0
    written = [tmp_path / name for name in ("study.html", "study.md", "study.png")]
    assert capsys.readouterr().out.splitlines()[-3:] == [str(path) for path in written]
    assert all(path.stat().st_size for path in written)
    for option in ("--serve", "--output=page.html", f"--workdir={tmp_path}"):
        assert report.main(["report", f"--workdir={tmp_path}", option]) == 2
        assert "is that of a study" in capsys.readouterr().err
    (tmp_path / STUDY_RESULTS).write_text("{}")
    assert report.main(["report", f"--workdir={tmp_path}"]) == 2
    assert f"{tmp_path / STUDY_RESULTS} is not" in capsys.readouterr().err
