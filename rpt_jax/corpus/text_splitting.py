"""Split long texts into chunks, and large files into blocks, at natural boundaries."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

CHUNK_CHARACTERS = 2000
_SEARCH_BYTES = 2**16  # How far after the requested end of a block a line end is searched for.

# The groups are atomic because a backtracking `\r\n` would match as two line ends.
LINE_END = re.compile(r"(?>\r\n|\r|\n)")
_SPACES = re.compile(r"[ \t]+")
_BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)(?:[ \t]*(?>\r\n|\r|\n))+")


def split_text(text: str) -> Iterator[str]:
    """Split a text at blank lines into chunks of about 2,000 characters; joined, they give the text again.

    A paragraph that is longer is split at its line ends, a line that is longer at its spaces. Words are never split.
    """
    chunk = ""
    for segment in _segments(text, (_BLANK_LINES, LINE_END, _SPACES)):
        if chunk and len(chunk) + len(segment) > CHUNK_CHARACTERS:
            yield chunk
            chunk = ""
        chunk += segment
    if chunk:
        yield chunk


def _segments(text: str, separators: Sequence[re.Pattern]) -> Iterator[str]:
    """Split at the first separator, and segments that are still too long at the next ones."""
    for segment in _split_after(text, separators[0]):
        if len(segment) > CHUNK_CHARACTERS and separators[1:]:
            yield from _segments(segment, separators[1:])
        else:
            yield segment


def _split_after(text: str, separator: re.Pattern) -> Iterator[str]:
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def block_boundary(file: io.BufferedIOBase, offset: int) -> int:
    """Return the byte where a block that should end at byte `offset` ends: after a line end, else a space, else a character.

    The result depends only on the bytes around `offset`, so that the reader of the next block finds the same boundary.
    """
    if offset == 0:
        return 0
    file.seek(offset - 1)
    following = file.read(_SEARCH_BYTES)
    for separator in (b"\n", b" "):
        if separator in following:
            return offset + following.index(separator)
    # UTF-8 continuation bytes are 0x80 to 0xBF.
    inside = next((i for i, byte in enumerate(following[1:]) if not 0x80 <= byte < 0xC0), len(following) - 1)
    return offset + max(0, inside)
