"""A long text in pieces that end where a reader would stop, and a large file in blocks that end likewise."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

PIECE_CHARACTERS = 2000
_NEAR = 2**16  # Bytes after the asked-for end of a block in which a line end is looked for.

# The groups are atomic because a backtracking `\r\n` would pass for two line ends.
LINE_END = re.compile(r"(?>\r\n|\r|\n)")
_SPACES = re.compile(r"[ \t]+")
_BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)(?:[ \t]*(?>\r\n|\r|\n))+")


def split_text(text: str) -> Iterator[str]:
    """Cut a text at blank lines into pieces of at most about 2,000 characters; joined, they are the text again.

    A paragraph longer than that is cut at its line ends, a line longer than that at its spaces, and a word stays whole.
    """
    current = ""
    for part in _parts(text, (_BLANK_LINES, LINE_END, _SPACES)):
        if current and len(current) + len(part) > PIECE_CHARACTERS:
            yield current
            current = ""
        current += part
    if current:
        yield current


def _parts(text: str, separators: Sequence[re.Pattern]) -> Iterator[str]:
    """Cut at the first separator, and what is too long then at the next."""
    for part in _cut_after(text, separators[0]):
        if len(part) > PIECE_CHARACTERS and separators[1:]:
            yield from _parts(part, separators[1:])
        else:
            yield part


def _cut_after(text: str, separator: re.Pattern) -> Iterator[str]:
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def cut_block(file: io.BufferedIOBase, at: int) -> int:
    """Return where a block that should end at byte `at` does: after a line end, or else a space, or else a character.

    It depends on the file's bytes around `at` alone, so that whoever reads the next block finds the same border.
    """
    if at == 0:
        return 0
    file.seek(at - 1)
    near = file.read(_NEAR)
    for mark in (b"\n", b" "):
        if mark in near:
            return at + near.index(mark)
    # Bytes from 0x80 to 0xBF go on with a character.
    inside = next((i for i, byte in enumerate(near[1:]) if not 0x80 <= byte < 0xC0), len(near) - 1)
    return at + max(0, inside)
