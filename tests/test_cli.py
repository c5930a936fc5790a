"""The command `rpt`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rpt_jax
from rpt_jax.cli import COMMANDS
from tests.helpers.paths import ROOT


def run_rpt(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rpt_jax.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run_rpt(tmp_path, *arguments)
    assert result.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_version_is_printed(tmp_path: Path) -> None:
    assert run_rpt(tmp_path, "--version").stdout == f"{rpt_jax.__version__}\n"


def test_unknown_command_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    result = run_rpt(tmp_path, "trian")
    assert result.returncode == 2
    assert "Did you mean 'train'?" in result.stderr


def test_every_command_is_a_module_that_exists() -> None:
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(module)


def test_options_and_exit_code_are_those_of_the_module(tmp_path: Path) -> None:
    described = run_rpt(tmp_path, "train", "--config=configs/rpt_tiny.py", "--config.seed=3", "--describe")
    assert described.returncode == 0, described.stderr
    assert described.stdout
    refused = run_rpt(tmp_path, "train", "--config=configs/rpt_tiny.py", "--config.seeed=3", "--describe")
    assert refused.returncode == 2
