"""The one exception that reaches a user as a sentence instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend: the message names the field or file, the value, and what was expected.

    `main` prints it alone and exits with code 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `choices`, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_choice(field: str, value: str, choices: Iterable[str]) -> str:
    """Return `value`, or raise `UserError` naming the field, the value and what is allowed."""
    choices = sorted(choices)
    if value not in choices:
        raise UserError(f"{field}='{value}' is not one of: {', '.join(choices)}.{nearest(value, choices)}")
    return value


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check, and raise one `UserError` with the complaints of all that raise one."""
    complaints = []
    for check in checks:
        try:
            check()
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError("\n       ".join(complaints))
