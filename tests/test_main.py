"""The command line: help, and the exit code and message for each kind of failure."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rpt_jax import main
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.divergence import Diverged
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("data.path does not exist."), ExitCode.USER_ERROR, "error: data.path does not exist."),
        (FloatingPointError("step 4: loss=nan"), ExitCode.NOT_FINITE, "rerun with --replay"),
        (Diverged("step 4: reward/mean 0 < 1"), ExitCode.DIVERGED, "the run diverged at step 4"),
        (OSError(28, "No space left on device"), ExitCode.USER_ERROR, "rerun the same command to resume"),
        (KeyboardInterrupt(), 130, "Rerun the same command to resume"),
        (ZeroDivisionError("a bug"), ExitCode.BUG, "ZeroDivisionError: a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_kind_of_failure_has_its_exit_code(error: BaseException, code: int, message: str) -> None:
    found, text = main.exit_code_and_message(error)
    assert found == code and message in text


def test_help_lists_the_flags_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["main", "--help"]) == ExitCode.COMPLETE
    printed = capsys.readouterr().out
    for shown in ("--config", "--workdir", "--stall_seconds", "Exit codes", *(str(int(code)) for code in ExitCode)):
        assert shown in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ([], "--config is missing"),
        (["--config=configs/none.py"], "configs/none.py"),
        (
            ["--config=configs/rpt_tiny.py", "--config.optimizer.learning_rat=1"],
            "Did you mean 'optimizer.learning_rate'",
        ),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.source_options.documents=many"],
            "data.source_options.documents=many",
        ),
        (["--config=configs/rpt_tiny.py", "--join_seconds=0"], "--join_seconds=0 must be a number, at least 1."),
        (["--config=configs/rpt_tiny.py", "--stall_seconds=x"], "--stall_seconds=x must be a number, at least 1."),
        (["--config=configs/rpt_tiny.py", "--stall_seconds=nan"], "--stall_seconds=nan must be a number, at least 1."),
        (["--config=configs/rpt_tiny.py", "--join_seconds=inf"], "--join_seconds=inf must be a number, at least 1."),
        (["--config=configs/rpt_tiny.py", "--processes=x"], "--processes=x must be an integer."),
        (["--config=configs/rpt_tiny.py", "--flagfile=no/such"], "no/such"),
        (["--config=configs/rpt_tiny.py", "--force=maybe"], "--force=maybe must be true or false."),
        (["--config=configs/rpt_tiny.py", "--workdr=x"], "Did you mean '--workdir'"),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.source=path", "--config.data.path=no/such.txt"],
            "no/such.txt",
        ),
        (["--config=configs/rpt_tiny.py", "--config.policy.path=nowhere"], "nowhere"),
        (["--config=configs/rpt_tiny.py", "--config.training.steps=20"], "Did you mean 'training.total_steps'"),
        (
            ["--config=configs/rpt_tiny.py", "--config.data.entropy_top_k=1025"],
            "data.entropy_top_k=1025 must be at most",
        ),
    ),
)
def test_invalid_input_ends_with_one_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main.main(["main", f"--workdir={tmp_path / 'run'}", *arguments]) == ExitCode.USER_ERROR
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(("content", "message"), ((b"", "empty files: 1"), (b"abc \xff\xfe def\n", "corpus.txt")))
def test_a_corpus_without_a_document_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "corpus.txt").write_bytes(content)
    path = f"--config.data.path={tmp_path / 'corpus.txt'}"
    arguments = ["--config=configs/rpt_tiny.py", "--config.data.source=path", path]
    assert main.main(["main", f"--workdir={tmp_path / 'run'}", *arguments]) == ExitCode.USER_ERROR
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and message in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["policy.path="], "policy.path"),
        (["policy.path=", "task=score"], "policy.path"),
        (["policy.path=", "task=pretrain", "pretrain.vocab_size=300"], "pretrain.vocab_size"),
    ],
)
def test_describe_refuses_what_a_run_refuses_on_every_machine(
    capsys: pytest.CaptureFixture[str], overrides: list[str], field: str
) -> None:
    arguments = ["--config=configs/rpt_tiny.py", "--describe", *(f"--config.{override}" for override in overrides)]
    assert main.main(["main", *arguments]) == ExitCode.USER_ERROR
    assert field in capsys.readouterr().err


def test_everything_that_is_missing_is_reported_at_once(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "rpt_jax.main", f"--workdir={tmp_path / 'run'}", "--config=configs/rpt_14b.py"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    mesh, policy, corpus = done.stderr.strip().split("\n")
    assert "mesh.tensor=8 does not fit 1 device: expected a multiple of 8 devices," in mesh
    assert "policy.path='models/DeepSeek-R1-Distill-Qwen-14B' does not exist" in policy
    assert "data.path='data/omnimath' does not exist" in corpus


def test_only_the_failures_that_follow_a_failed_write_are_silent() -> None:
    reported: list[threading.ExceptHookArgs] = []
    for error in (RuntimeError("Event loop is closed"), RuntimeError("something else")):
        main.report_unless_late(reported.append, threading.ExceptHookArgs((type(error), error, None, None)))
    assert [str(failure.exc_value) for failure in reported] == ["something else"]
