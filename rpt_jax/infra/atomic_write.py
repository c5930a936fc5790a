"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write `path` in one step: killed at any moment, it leaves the old file or the new one.

    The partial file is this call's own: processes that prepare shards of a corpus at once write the same files.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # Without it a power cut after the rename can leave an empty file.
    partial.replace(path)
