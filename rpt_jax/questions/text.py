r"""What is read in a text on the host: its last `\boxed{}`, and the option that it names."""

from __future__ import annotations

import re
import string

_BOX = b"\\boxed{"  # As `prompts.response_format.BOX`, in bytes.
_BRACE_OR_ESCAPE = re.compile(rb"\\.|[{}]", re.DOTALL)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
# "B", "(B)", "B." or "$B$"; and a letter before the text of its option: "B: text", "(B) text".
_LETTER = re.compile(r"[\s$(\[{]*([A-Za-z])[\s$)\]}.:,]*")
_LETTER_BEFORE_TEXT = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.:)])\s*(.*)", re.DOTALL)


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


def read_letter(answer: str, choices: tuple[str, ...]) -> str:
    """Return the letter of the option that an answer names by its letter or its text; "" if it names none, or is ambiguous."""
    text = _LATEX_TEXT.sub(r"\1", answer).strip()
    letters = string.ascii_uppercase[: len(choices)]
    if match := _LETTER.fullmatch(text):
        letter = match[1].upper()
        return letter if letter in letters else ""
    by_text = [letter for letter, option in zip(letters, choices, strict=False) if _same_text(text, option)]
    if len(by_text) == 1:
        return by_text[0]
    if match := _LETTER_BEFORE_TEXT.fullmatch(text):
        letter = match[1] or match[2]
        return letter if letter in letters else ""
    return ""


def _same_text(text: str, other: str) -> bool:
    return " ".join(text.split()).casefold() == " ".join(other.split()).casefold()
