"""fsspec's file system in memory, in place of object storage."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

URL = "memory://bucket/run"


def empty_memory_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """Empty the in-memory file system and return it; local copies go to a cache directory below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files
