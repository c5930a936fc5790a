r"""What is read in a text on the host: the content of its last `\boxed{}`, and the form in which two questions are compared."""

from __future__ import annotations

import re
import unicodedata

_BOX = b"\\boxed{"  # As `prompts.response_format.BOX`, in bytes.
_BRACE_OR_ESCAPE = re.compile(rb"\\.|[{}]", re.DOTALL)


def last_box(text: bytes) -> bytes | None:
    r"""Return the content of the last `\boxed{`, by the rule of `rewards.boxed`; None if there is none.

    It ends at the brace that balances the opening one or, if there is none, at the last brace of the text. A brace behind an odd
    number of backslashes does not count, and `\boxed{}}` holds a brace.
    """
    _, opening, content = text.rpartition(_BOX)
    if not opening:
        return None
    if content.startswith(b"}}"):
        return b"}"
    depth = 1
    for match in _BRACE_OR_ESCAPE.finditer(content):
        depth += {b"{": 1, b"}": -1}.get(match[0], 0)
        if depth == 0:
            return content[: match.start()]
    unbalanced, closing, _ = content.rpartition(b"}")
    return unbalanced if closing else None


def normalized_text(text: str) -> str:
    """Return a text in the form in which questions are compared: without differences of case, spaces and Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
