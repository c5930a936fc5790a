"""The header of a GGUF file: what it says of a model and of its tokenizer, by key."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError


def is_gguf(source: str | Path) -> bool:
    """Whether `source` names a GGUF file, which need not exist."""
    return Path(source).suffix == ".gguf"


def open_gguf(path: Path) -> Any:
    """Return a `gguf.GGUFReader`, with the tensors mapped from the file. Raises: UserError."""
    # The header has the whole vocabulary, so reading it takes a second, and three modules ask for it.
    try:
        return _open(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


@functools.lru_cache(maxsize=1)
def _open(path: Path, _modified: int) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} is a GGUF file, which takes a package to read: pip install gguf.") from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} is not a GGUF file, or damaged ({error}).") from None


def header_value(path: Path, key: str, default: Any = None) -> Any:
    """Return a value of the header; without a default, raise UserError where it is missing."""
    field = open_gguf(path).get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise UserError(f"{path}: its header lacks {key}.")
    return default
