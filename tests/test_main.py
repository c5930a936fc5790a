"""The command line: help, and the exit code and message for each kind of failure."""

from __future__ import annotations

import pytest

from rpt_jax import main
from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.divergence import Diverged


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
