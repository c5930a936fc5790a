"""Sizes of small benches, and a run of a bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpt_jax.bench import __main__ as bench

MODEL = ["--layers=1", "--width=16", "--heads=2", "--kv-heads=1", "--head-size=8", "--ffn=16", "--vocab=32"]
UPDATE = ["--prompts=2", "--samples=2", "--prompt-tokens=8", "--response-tokens=4", "--microbatch-tokens=24"]


def run_bench(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a bench and return the figures that it writes."""
    out = tmp_path / "out.json"
    assert bench.main(["bench", *arguments, f"--json={out}"]) == 0
    written = json.loads(out.read_text())
    assert {"device", "cores", "jax", "load"} <= set(written["machine"])
    return written["figures"]
