"""Atomic file writes."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to `path`: a process that is killed at any moment leaves either the old file or the complete new one.

    The temporary file has a unique name, because several processes may write the same file of a corpus at once.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # Otherwise a power cut after the rename can leave an empty file.
    partial.replace(path)
