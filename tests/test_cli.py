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
from tests.helpers.parameters import mostly_slow
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, run_rpt


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


@pytest.mark.parametrize(
    "module",
    ("rpt_jax", *dict(COMMANDS.values()), "rpt_jax.preflight.scaling"),
    ids=lambda name: name.rpartition(".")[2],
)
def test_help_suits_a_closed_pipe_and_an_ascii_console(module: str) -> None:
    # The reader leaves at once, as `head` does; the notebook's backend and JAX's settings are not there.
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "module://notebook.that_is_elsewhere",
        "JAX_PLATFORMS": "elsewhere",
        "COLUMNS": "80",
    }
    command = [sys.executable, "-m", module, "--help"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=CHILD_SECONDS)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["rpt_jax.evaluate", "--help"], 0), (["rpt_jax.main", "--config=nowhere.py"], 2)],
)
def test_a_full_disk_behind_the_output_does_not_change_the_exit_code(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=CHILD_SECONDS)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert code or "warning: the standard output cannot be written (No space left on device)" in done.stderr
        assert subprocess.run(command, stdout=full, stderr=full, timeout=CHILD_SECONDS).returncode == code


def test_a_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    # `>&-` closes it, so that Python has no sys.stdout.
    command = f"{sys.executable} -m rpt_jax.cli train --help >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=CHILD_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("name", "value"),
    mostly_slow(
        [("JAX_ENABLE_X64", "maybe"), ("JAX_PLATFORMS", "elsewhere"), ("JAX_PLATFORMS", "cuda")],
        ("JAX_ENABLE_X64", "maybe"),
    ),
)
def test_a_setting_of_jax_that_cannot_be_used_is_named(tmp_path: Path, name: str, value: str) -> None:
    command = [sys.executable, "-m", "rpt_jax", "train", "--config=configs/rpt_tiny.py", "--describe"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert name in done.stderr and value in done.stderr


@pytest.mark.parametrize(
    "command",
    (
        ("convert", "--from=configs/tiny", "--to=nowhere/new"),
        ("report", "--workdir=configs"),
        ("doctor", "--workdir=configs"),
        ("evaluate", "--suite=compare", "--results=a,b"),
        ("preflight", "--config=configs/rpt_tiny.py", "--topology=h100:8"),
        ("bench", "rollout"),
    ),
)
def test_every_command_names_a_value_that_jax_refuses(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpt_jax", *command],
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_X64": "garbage"},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert done.returncode == 2 and "garbage" in done.stderr and "JAX_ENABLE_X64" in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
