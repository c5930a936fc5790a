"""Texts that are compared with a file: `RPT_UPDATE_SNAPSHOTS=1` rewrites the file."""

from __future__ import annotations

import os
from pathlib import Path


def assert_matches_snapshot(text: str, path: Path) -> None:
    if os.environ.get("RPT_UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"run with RPT_UPDATE_SNAPSHOTS=1 if {path.name} should change"
