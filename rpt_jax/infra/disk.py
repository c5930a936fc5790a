"""Free disk space, and directories that can be written to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rpt_jax.errors import UserError


def nearest_existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def check_writable(directory: Path, field: str) -> None:
    """Check that `directory` can be made and written to. Raises: UserError, about the config field that names it."""
    existing = nearest_existing(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "it cannot be written to" if existing.is_dir() else "it is a file"
        raise UserError(
            f"{field}={directory}: {existing} is in the way ({reason}). Choose another directory.", field=field
        )


def check_free_space(directory: Path, needed: int, purpose: str, advice: str) -> None:
    """Check that the disk of the workdir has `needed` bytes free.

    Args:
      directory: the workdir, or a folder in it.
      needed: bytes.
      purpose: what is going to be written, for the message.
      advice: what would make that smaller.

    Raises: UserError.
    """
    usage = shutil.disk_usage(nearest_existing(directory))
    # Some network file systems do not tell their size.
    if 0 < usage.total and usage.free < needed:
        raise UserError(
            f"--workdir={directory}: {purpose} need about {needed / 2**30:.2f} GiB, but {usage.free / 2**30:.2f} GiB are free. "
            f"Free some space, {advice}, or choose a --workdir on another disk.",
            field="--workdir",
        )
