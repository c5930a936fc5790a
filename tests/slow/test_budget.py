"""Runs with a budget: they end when it is spent, resume exactly, and go on when it grows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rpt_jax import main
from rpt_jax.corpus.prepared import open_prepared, position_flops
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.model.flops import forward_flops
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_model_config
from tests.helpers.paths import TINY
from tests.helpers.questions import SMALL_RFT
from tests.helpers.runs import COLD_START, PRETRAIN, SMALL, comparable, experiment, interruption_after

pytestmark = pytest.mark.slow

STEPS = {"training.total_steps": 4, "optimizer.schedule": "constant", "checkpoint.every_steps": 1}
TASKS = {
    "rpt_tiny": COLD_START | STEPS | {"optimizer.learning_rate": 1e-4, "evaluation.every_steps": 10},
    "rft_tiny": SMALL_RFT | STEPS,
    "pretrain_tiny": PRETRAIN | STEPS,
}


def flops_of(workdir: Path) -> list[float]:
    """Return `flops/train_total` after each step."""
    return [line["flops/train_total"] for line in read_metrics(workdir / "metrics.jsonl") if line["step"]]


def result_of(workdir: Path) -> dict[str, float]:
    return json.loads((workdir / "result.json").read_text())


@pytest.mark.parametrize("name", TASKS)
def test_a_run_ends_when_its_budget_is_spent_and_goes_on_when_it_grows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    main.run(experiment(name, **TASKS[name]), whole)
    spent = flops_of(whole)
    assert result_of(whole)["flops"] == spent[-1] and spent == sorted(set(spent))

    # Just more than two steps cost: the third one is the last. It is interrupted after the second.
    limited = TASKS[name] | {"training.total_steps": 1000, "training.flops_budget": spent[1] * 1.0001}
    with interruption_after(2, monkeypatch):
        main.run(experiment(name, **limited), workdir)
    main.run(experiment(name, **limited), workdir)
    assert result_of(workdir)["steps"] == 3 and flops_of(workdir) == spent[:3]

    # A complete run is left alone, and a larger budget continues it.
    before = (workdir / "result.json").stat().st_mtime_ns
    main.run(experiment(name, **limited), workdir)
    assert (workdir / "result.json").stat().st_mtime_ns == before
    main.run(experiment(name, **limited | {"training.flops_budget": spent[3]}), workdir)
    assert result_of(workdir)["steps"] == 4 and flops_of(workdir) == spent
    if name == "pretrain_tiny":  # Those of reinforcement learning have an evaluation after the third step too.
        assert comparable(workdir) == comparable(whole)


def test_cold_start_and_scoring_are_counted(tmp_path: Path) -> None:
    """The corpus is charged where positions depend on it, also if another run has scored it."""
    fields = SMALL | {"training.total_steps": 1}
    main.run(experiment(**COLD_START), tmp_path / "cold")
    cold_start = json.loads((tmp_path / "cold" / "cold_start" / "result.json").read_text())
    assert 0 < cold_start["flops"] < flops_of(tmp_path / "cold")[0] and cold_start["seconds"] > 0

    score = {field: value for field, value in fields.items() if field.startswith("data.") and "per_window" not in field}
    main.run(experiment(task="score", **score), tmp_path / "scored")
    (corpus,) = {path.parent for path in (tmp_path / "scored").rglob("manifest.json")}
    for name, changes in {"own": {}, "prepared": {"data.prepared": corpus}}.items():
        main.run(experiment(**fields | changes), tmp_path / name)
    assert flops_of(tmp_path / "own") == flops_of(tmp_path / "prepared")

    data = experiment(**fields).data
    prepared = open_prepared(data, load_tokenizer(TINY), corpus)
    lengths = np.array([len(ids) for ids in prepared.corpus.windows("train")])
    tokens = int(lengths.sum())
    pairs = int((lengths * (lengths + 1) // 2).sum())
    expected = forward_flops(load_model_config(str(TINY))[0], tokens=tokens, pairs=pairs, head_tokens=tokens)
    assert position_flops(data, prepared) == pytest.approx(expected, rel=0.02)
    assert position_flops(dataclasses.replace(data, positions="random"), prepared) == 0


def test_seconds_end_a_run_too(tmp_path: Path) -> None:
    fields = PRETRAIN | STEPS | {"training.total_steps": 10_000, "training.seconds_budget": 0.001}
    main.run(experiment("pretrain_tiny", **fields), tmp_path)
    result = result_of(tmp_path)
    assert result["steps"] == 1 and result["seconds"] > 0.001
