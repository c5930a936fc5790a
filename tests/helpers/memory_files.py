"""fsspec's file system in memory, in place of object storage."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

URL = "memory://bucket/run"


def empty_memory_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """Return the file system in memory, empty, and give the test a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files
