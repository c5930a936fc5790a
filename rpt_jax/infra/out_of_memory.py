"""A device that runs out of memory, as a sentence: which program, what it asked for, and which fields to change."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

from rpt_jax.errors import UserError

_CODE = "RESOURCE_EXHAUSTED"
# How XLA's backends say what they could not allocate, for example "Out of memory allocating 4000 bytes", "trying to allocate
# 1.50GiB" and "Attempting to allocate 2.01G" at run time, and "Used 20.5G of 15.75G hbm" when a program is compiled.
_SIZE = re.compile(r"(?:[Aa]llocat(?:e|ing)|Used)\D{0,20}?([\d.]+ ?(?:bytes|[KMGT]i?B?\b|B\b))(?: of ([\d.]+[KMGT]?))?")


@contextlib.contextmanager
def explain_out_of_memory(
    program: str, fields: Mapping[str, object], mesh_fields: Sequence[str] = ("mesh.fsdp", "mesh.tensor")
) -> Iterator[None]:
    """Turn JAX's error for a device that is out of memory into a UserError.

    Run the program and wait for its results inside the block: devices report the error late.

    Args:
      program: what runs, for the message.
      fields: the config fields that bound its memory, with their current values; the most useful first.
      mesh_fields: the fields that split the policy over devices in this program.

    Raises:
      UserError: a device ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _CODE not in str(error):
            raise
        current = ", ".join(f"{field} (now {value})" for field, value in fields.items())
        raise UserError(
            f"a device ran out of memory in {program}{_asked(str(error))}. Change one of {current}, or split the policy over "
            f"more devices ({', '.join(mesh_fields)}).",
            field=next(iter(fields)),
        ) from error


def _asked(message: str) -> str:
    """Return what XLA says that it tried to allocate, as words after the name of the program; "" if it does not."""
    found = _SIZE.search(message)
    if not found:
        return ""
    size, limit = found.groups()
    if size.endswith("bytes"):
        size = f"{int(size.split()[0]) / 2**30:.2f} GiB"
    return f", which asked for {size}" + (f" of {limit}" if limit else "")
