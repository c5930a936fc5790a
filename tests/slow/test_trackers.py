"""The real trackers, without a network, in a training run that is interrupted and resumed."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from rpt_jax import main
from tests.helpers.runs import SHORT, experiment, interruption_after

pytestmark = pytest.mark.slow


def test_a_run_that_is_resumed_is_one_run_at_each_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when the package is imported.
    for name in ("wandb", "trackio"):
        pytest.importorskip(name)
    workdir = tmp_path / "run"
    fields = SHORT | {
        "logging.trackers": "wandb,trackio",
        "logging.project": "tracked",
        "training.log_rollouts_every": 1,
    }
    with interruption_after(2, monkeypatch):
        main.run(experiment(**fields), workdir)
    main.run(experiment(**fields), workdir)
    ids = json.loads((workdir / "trackers.json").read_text())

    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{ids['trackio']}"}
    logged = [json.loads(metrics) | {"step": step} for _, step, metrics in rows]
    assert [line["step"] for line in logged if "flops/train_total" in line] == [1, 2, 3]
    tables = {line["step"]: line["rollouts"] for line in logged if "rollouts" in line}
    assert sorted(tables) == [1, 3], "the interruption came between the metrics and the table of step 2"
    assert {table["_type"] for table in tables.values()} == {"trackio.table"}

    runs = list((workdir / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert len(runs) == 2 and all(list(run.glob("*.wandb")) for run in runs)
    table = json.loads(next(iter(runs[0].glob("files/media/table/rollouts*.json"))).read_text())
    assert "reasoning" in table["columns"] and len(table["data"]) == 4 * SHORT["rollout.samples_per_prompt"]
