"""A made-up run to plot, and its figures without drawing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rpt_jax.config.difficulty import DIFFICULTIES

BASE_ACCURACY = {"easy": 0.42, "medium": 0.30, "hard": 0.21}
PLOTS = ["reward", "accuracy", "response_length", "scaling"]


def write_run(workdir: Path, steps: int, every: int, levels: Sequence[str] = tuple(DIFFICULTIES)) -> Path:
    """Write the `metrics.jsonl` and `result.json` of a made-up run and return its directory."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(steps + 1):
        line = {"step": step, "flops/train_total": 3e12 * step}
        if step:
            line |= {
                "reward/drawn_mean": 0.3 * step / steps + 0.02 * rng.uniform(),
                "length/mean": 40.0 - rng.uniform(),
                "ended/length": 0.1 * rng.uniform(),
            }
        if step % every == 0:
            line |= {f"eval/reasoning/{level}": BASE_ACCURACY[level] * (1.1 - 1 / (1 + step)) for level in levels}
        lines.append(json.dumps(line))
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    direct = {
        level: {"accuracy": accuracy, "low": 0.0, "high": 1.0, "positions": 200}
        if level in levels
        else {"accuracy": None, "low": None, "high": None, "positions": 0}
        for level, accuracy in BASE_ACCURACY.items()
    }
    (workdir / "result.json").write_text(json.dumps({"before": {"direct": direct}, "seed": 0}))
    return workdir


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Return a dict that gets every saved figure by name; the files are not written, since drawing is slow."""
    saved: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path: saved.__setitem__(Path(path).stem, self))
    return saved
