"""The keys of metrics that a run has written, and those that docs/reference/metrics.md explains."""

from __future__ import annotations

import re
from pathlib import Path

from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.infra.metrics import read_metrics
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
INTERVAL = ("accuracy", "low", "high", "positions")


def explained(anchor: str) -> set[str]:
    """Return the keys in the tables of the section with `anchor`, with their patterns expanded."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if f"{{#{anchor}}}" in part.partition("\n")[0]]
    keys = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(keys) == len(set(keys)), "a key has two rows"
    levels = {key.replace("<difficulty>", level) for key in keys for level in DIFFICULTIES}
    return {key.replace("*", name) for key in levels for name in INTERVAL}


def written(workdir: Path) -> set[str]:
    """Return the keys of metrics.jsonl."""
    return set().union(*read_metrics(workdir / "metrics.jsonl"))
