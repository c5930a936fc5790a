"""The report command: it writes the page and the plots of a run, or names the file that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rpt_jax import report
from tests.helpers.plots import PLOTS, keep_figures, write_run


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


def test_a_missing_folder_is_named_by_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["report", f"--workdir={tmp_path / 'absent'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --workdir={tmp_path / 'absent'}")
