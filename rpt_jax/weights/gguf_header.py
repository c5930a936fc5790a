"""Metadata of GGUF files: values about the model and its tokenizer, by key."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.weights.model_files import split_parts, unreadable_hint


def open_gguf(path: Path) -> Any:
    """Return a `gguf.GGUFReader`, whose tensors are memory-mapped.

    Raises: UserError if the file cannot be read or the package `gguf` is not installed.
    """
    # Cached, because parsing the header, which contains the vocabulary, takes a second, and several modules read it.
    try:
        return _open_cached(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", field=str(path)) from None


@functools.lru_cache(maxsize=1)
def _open_cached(path: Path, modified_ns: int) -> Any:
    """Open a file; `modified_ns` is part of the cache key, so that a changed file is read again."""
    return _open(path)


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"Reading the GGUF file {path} requires the package gguf: pip install gguf.", field=str(path)
        ) from None
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", field=str(path)) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _damaged(path, error) from None


def open_tensors(path: Path) -> list[Any]:
    """Return the tensors of a file and, if it is the first part of several, those of the other parts.

    Raises: UserError if a part is missing or damaged.
    """
    first, *others = split_parts(path)
    tensors = list(open_gguf(first).tensors)
    for part in others:
        tensors += _open(part).tensors
    count = header_value(first, "split.tensors.count", len(tensors))
    if len(tensors) != count:
        raise UserError(
            f"{first} and its other parts have {len(tensors)} tensors instead of {count}. Download all parts again.",
            field=str(first),
        )
    return tensors


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a GGUF file, or it is damaged ({error}).{unreadable_hint(path)}", field=str(path))


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
