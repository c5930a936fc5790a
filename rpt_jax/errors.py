"""Errors that a user can fix, and the exit codes of a run."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Iterable


class ExitCode(enum.IntEnum):
    """Exit codes of the commands. A second stop signal exits with 128 + the signal's number."""

    COMPLETE = 0
    BUG = 1  # An unexpected exception; its traceback was printed.
    USER_ERROR = 2  # Something to fix; the message says what.
    NOT_FINITE = 3  # A metric became NaN or infinite.
    DIVERGED = 4  # A rule of config section `divergence` stopped the run.
    FAILED_UNITS = 5  # Of `rpt_jax.study`: some units failed, and the others are complete.
    RESTART = 75  # EX_TEMPFAIL: the run was interrupted; rerun the same command to resume.


class UserError(Exception):
    """An error that the user can fix: the message names the field or file, the value and what was expected.

    `main` prints the message without a traceback and exits with `code`.

    Attributes:
      field: the config field ("data.path"), flag ("--workdir") or file that is at fault; "" where there is no single one.
      code: `ExitCode.RESTART` if the same command may succeed without a change, because another process was gone or late.
    """

    def __init__(self, message: str, *, field: str = "", code: ExitCode = ExitCode.USER_ERROR):
        super().__init__(message)
        self.field = field
        self.code = code


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `choices`, or an empty string if none is close."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower_case[close[0]]}'?" if close else ""


def check_choice(field: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Args:
      field: name of the config field or flag, for the message.
      value: its value.
      choices: the allowed values.

    Raises: UserError, naming the field, the value, what is allowed and the nearest choice.
    """
    choices = sorted(choices)
    if value not in choices:
        raise UserError(f"{field}='{value}' is not one of: {', '.join(choices)}.{nearest(value, choices)}", field=field)
    return value


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check, and raise one `UserError` with the messages of all that fail.

    The error has the field of the messages, if all are about the same one.
    """
    errors: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            errors.append(error)
    if errors:
        fields = {error.field for error in errors}
        field = fields.pop() if len(fields) == 1 else ""
        # Continuation lines are aligned with the first one, which `main` prints after "error: ".
        raise UserError("\n       ".join(map(str, errors)), field=field)
