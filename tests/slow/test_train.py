"""Runs of the trainer that go on after their end, and that stop at a metric which is not finite and can be replayed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rpt_jax import main, train
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_context import RunContext
from tests.helpers.runs import SMALL, comparable, experiment

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


def test_evaluations_do_not_depend_on_their_batches(finished: Path, tmp_path: Path) -> None:
    main.run(experiment(**SMALL | {"evaluation.prompts_per_batch": 16, "training.total_steps": 1}), tmp_path)
    [ours, theirs] = (read_metrics(workdir / "metrics.jsonl")[0] for workdir in (tmp_path, finished))
    evaluated = [name for name in theirs if name.startswith("eval/")]
    assert len(evaluated) > 10 and all(ours[name] == theirs[name] for name in evaluated)


def test_a_nan_in_a_rollout_metric_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "rollout_metrics", lambda rewarded, usage: {"reward/mean": float("nan")})
    with pytest.raises(FloatingPointError, match="step 1: reward/mean"):
        main.run(experiment(**SMALL | {"checkpoint.every_steps": 1}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["0"]


def test_a_nan_stops_the_run_before_the_update_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With NaN advantages in step 4, the end of step 3 is saved, and the run resumes from there as if nothing had happened."""
    caplog.set_level(logging.INFO, logger="rpt_jax")
    fields = SMALL | {"checkpoint.every_steps": 100}
    to_update_batch = train.to_update_batch
    steps = []

    def spoiled(*arguments: object, **options: object) -> object:
        batch = to_update_batch(*arguments, **options)
        steps.append(0)
        if len(steps) < 4:
            return batch
        return batch._replace(advantages_PxG=jax.jit(lambda x: x * jnp.nan)(batch.advantages_PxG))

    with monkeypatch.context() as patch:
        patch.setattr(train, "to_update_batch", spoiled)
        with pytest.raises(FloatingPointError, match="step 4: .*gradient/norm=nan"):
            main.run(experiment(**fields), tmp_path)
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
        assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["3"]
        record = json.loads((tmp_path / "not_finite.json").read_text())
        assert record["step"] == 4 and record["seed"] == 0 and len(record["ids"]) == 8 == len(record["positions"])
        with pytest.raises(FloatingPointError):
            main.run(experiment(**fields), tmp_path, replay=True)
    main.run(experiment(**fields), tmp_path, replay=True)
    assert "Step 4 was replayed, and all its metrics are finite" in caplog.text
    assert not (tmp_path / "result.json").exists()
    main.run(experiment(**fields), tmp_path)
    assert comparable(tmp_path) == comparable(finished)
