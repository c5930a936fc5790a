"""Metadata of GGUF files: values about the model and its tokenizer, by key."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError


def is_gguf(source: str | Path) -> bool:
    """Return whether `source` is the name of a GGUF file; the file need not exist."""
    return Path(source).suffix == ".gguf"


def open_gguf(path: Path) -> Any:
    """Return a `gguf.GGUFReader`, whose tensors are memory-mapped.

    Raises: UserError if the file cannot be read or the package `gguf` is not installed.
    """
    # Cached, because parsing the header, which contains the vocabulary, takes a second, and several modules read it.
    try:
        return _open(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", field=str(path)) from None


@functools.lru_cache(maxsize=1)
def _open(path: Path, modified_ns: int) -> Any:
    """Open a file; `modified_ns` is part of the cache key, so that a changed file is read again."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"Reading the GGUF file {path} requires the package gguf: pip install gguf.", field=str(path)
        ) from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a GGUF file, or it is damaged ({error}).", field=str(path))


def header_value(path: Path, key: str, default: Any = None) -> Any:
    """Return the value of a key in the header.

    Args:
      path: the GGUF file.
      key: full name, such as "general.architecture".
      default: returned if the key is missing; None = the key is required.

    Raises: UserError if the value is damaged, or if it is missing and there is no default.
    """
    field = open_gguf(path).get_field(key)
    if field is not None:
        try:
            return field.contents()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _damaged(path, error) from None
    if default is None:
        raise UserError(f"{path}: the header has no {key}.", field=str(path))
    return default
