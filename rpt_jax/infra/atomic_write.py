"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`: a process that is killed at any moment leaves either the old file or the complete new one.

    Text is encoded as UTF-8. The temporary file has a unique name, because several processes may write the same file of a
    corpus at once.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # Otherwise a power cut after the rename can leave an empty file.
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # A full disk stays as it was.
        raise
