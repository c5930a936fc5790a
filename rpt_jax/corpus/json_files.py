"""Read JSON texts of any size, record by record."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rpt_jax.corpus.compression import open_binary

BLOCK_CHARACTERS = 2**16
_LONGEST_FIRST_LINE = 2**24
_LONGEST_INTEGER = 1000  # Digits; Python refuses to convert more than 4,300.
_TOKEN_CHARACTERS = 16  # An error this close to the end of the buffer may be that of a value that is not complete.
_OUTSIDE = re.compile(r"\s*")
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")
BYTE_ORDER_MARK = "\ufeff"


def parse_json(text: str) -> Any:
    """Parse a JSON text with numbers of any length. Raises: ValueError or RecursionError."""
    return json.loads(text, parse_int=_parse_integer)


def _parse_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def has_a_record_per_line(path: Path) -> bool:
    """Return whether a .json file is one of JSON lines, by its first line that is not blank."""
    with open_binary(path) as file:
        while line := file.readline(_LONGEST_FIRST_LINE):
            text = line.decode("utf-8", "replace").removeprefix(BYTE_ORDER_MARK)
            if text.strip():
                try:
                    return isinstance(parse_json(text), dict)
                except (ValueError, RecursionError):
                    return False
    return False


def read_json_values(file: Any, max_characters: int) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON array, or the values of a file that has several, each with its text.

    Bytes that are not UTF-8 are decoded by "surrogateescape".

    Args:
      file: binary, is read in blocks.
      max_characters: limit of the length of a value.

    Raises: ValueError, if the file is not JSON or a value is longer.
    """
    decoder = json.JSONDecoder(parse_int=_parse_integer)
    stream = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    buffer = stream.read(BLOCK_CHARACTERS).removeprefix(BYTE_ORDER_MARK)
    position = 0
    in_array = False

    def read_more() -> bool:
        nonlocal buffer, position
        more = stream.read(max(BLOCK_CHARACTERS, len(buffer) - position))
        buffer = buffer[position:] + more
        position = 0
        return bool(more)

    while True:
        skipped = (_BETWEEN_ELEMENTS if in_array else _OUTSIDE).match(buffer, position)
        position = skipped.end() if skipped else position
        if position == len(buffer):
            if read_more():
                continue
            if in_array:
                raise ValueError("the file ends inside of a JSON array")
            return
        if buffer[position] == ("]" if in_array else "["):
            in_array = not in_array
            position += 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            may_be_incomplete = error.msg.startswith("Unterminated") or error.pos > len(buffer) - _TOKEN_CHARACTERS
            if len(buffer) - position > max_characters:
                raise ValueError(f"a value is longer than {max_characters:,} characters") from None
            if may_be_incomplete and read_more():
                continue
            raise ValueError(f"not JSON: {error.msg}") from None
        yield buffer[position:end], value
        position = end
