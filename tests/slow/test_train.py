"""Runs of the trainer that go on after their end, and that stop at a metric which is not finite."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from rpt_jax import main, train
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_context import RunContext
from tests.helpers.runs import SMALL, experiment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment(**SMALL), workdir)
    return workdir


def test_a_finished_run_goes_on_with_more_steps(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    shutil.copytree(finished, tmp_path / "run")
    result = (finished / "result.json").read_bytes()
    context = RunContext()
    main.run(experiment(**SMALL | {"training.total_steps": 6}), tmp_path / "run", context=context)
    # One step: each phase feeds the heartbeat that the other processes of a run watch.
    assert context.heartbeat.count >= 2 + 6 and context.heartbeat.phase == "evaluation"
    said = caplog.text
    assert "training.total_steps: 5 there, 6 now" in said
    assert "A response ends at </s> (2)." in said
    assert "optimizer.schedule='cosine', the learning rate of step 6" in said and "Resuming from step 5" in said
    assert (tmp_path / "run" / "result_5.json").read_bytes() == result and (tmp_path / "run" / "policy_5").is_dir()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(7))


def test_a_nan_in_a_rollout_metric_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "rollout_metrics", lambda rewarded, usage: {"reward/mean": float("nan")})
    with pytest.raises(FloatingPointError, match="step 1: reward/mean"):
        main.run(experiment(**SMALL | {"checkpoint.every_steps": 1}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["0"]
