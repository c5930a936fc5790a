"""The command `rpt` runs a module as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.processes import run_rpt

pytestmark = pytest.mark.slow


def test_options_and_exit_code_are_those_of_the_module(tmp_path: Path) -> None:
    described = run_rpt(tmp_path, "train", "--config=configs/rpt_tiny.py", "--config.seed=3", "--describe")
    assert described.returncode == 0, described.stderr
    assert described.stdout
    refused = run_rpt(tmp_path, "train", "--config=configs/rpt_tiny.py", "--config.seeed=3", "--describe")
    assert refused.returncode == 2
