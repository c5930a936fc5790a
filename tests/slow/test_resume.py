"""Interrupted runs of all kinds resume to the same metrics."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import jax
import pytest

from rpt_jax import main
from rpt_jax.infra.metrics import MetricsWriter, read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.runs import (
    COLD_START,
    EVERYTHING,
    SELF_ENTROPY,
    SMALL,
    assert_goes_on,
    assert_resumes,
    comparable,
    experiment,
    interruption_after,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("fields", "step"),
    [(SMALL, 1), (SMALL, 4), (SMALL | SELF_ENTROPY, 4), (EVERYTHING, 3)],
    ids=["first step", "fourth step", "rescored", "everything"],
)
def test_an_interrupted_run_resumes_to_the_same_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], step: int
) -> None:
    """Also with the state of options that are off by default: moving average, starting policy, scored windows."""
    main.run(experiment(**fields), tmp_path / "whole")
    assert_resumes(fields, step, tmp_path / "whole", tmp_path / "run", monkeypatch)


def test_the_first_evaluation_of_a_resumed_run_causes_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its batches are larger than those of training, for which the programs were compiled before."""
    fields = SMALL | {"evaluation.prompts_per_batch": 24, "checkpoint.every_steps": 1, "training.total_steps": 6}
    with interruption_after(3, monkeypatch):
        main.run(experiment(**fields), tmp_path)
    caplog.clear()
    jax.clear_caches()  # As in a new process.
    main.run(experiment(**fields), tmp_path)
    assert not [record for record in caplog.records if "compiled again" in record.getMessage()]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [(SMALL, 3), (EVERYTHING | {"objective.budget_decay": 1.0}, 2)],
    ids=["default", "everything"],
)
def test_a_finished_run_goes_on_as_if_it_had_had_more_steps(
    tmp_path: Path, fields: dict[str, object], steps: int
) -> None:
    """With a constant learning rate, bit for bit: metrics, result and policy."""
    fields = fields | {"optimizer.schedule": "constant"}
    main.run(experiment(**fields), tmp_path / "whole")
    assert_goes_on("rpt_tiny", fields, steps, tmp_path / "whole", tmp_path / "run")
    mine, theirs = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole"))
    for result in (mine, theirs):
        del result["wall_seconds"], result["seconds"]
    assert mine == theirs
    assert json.loads((tmp_path / "run" / f"result_{steps}.json").read_text())["before"] == theirs["before"]


def test_a_finished_run_goes_on_in_another_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sampler and trainer agree less well than in float32, which shows that the new precision is used."""
    caplog.set_level(logging.INFO, logger="rpt_jax")
    main.run(experiment(**SMALL), tmp_path)
    main.run(experiment(**SMALL | {"policy.dtype": "bfloat16", "training.total_steps": 6}), tmp_path)
    assert "policy.dtype: 'auto' there, 'bfloat16' now; training.total_steps: 5 there, 6 now" in caplog.text
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[5]["mismatch/max"] < 1e-4 < lines[6]["mismatch/max"] < 1


def wait_for(path: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_a_cold_start_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed during the cold start and right after it, and starts from the policy of the cold start."""
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    write = MetricsWriter.write
    seen = []
    main.run(experiment(**COLD_START), whole)

    def write_and_die(self: MetricsWriter, step: int, scalars: dict[str, float]) -> None:
        write(self, step, scalars)
        seen.append(step if "loss/trace" in scalars else "rpt")
        if len(seen) == 2:
            wait_for(broken / "cold_start" / "checkpoints" / "1")  # Checkpoints are written in the background.
        if len(seen) in (2, 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                main.run(experiment(**COLD_START), broken)
    assert seen == [1, 2, 2, 3, "rpt"] and not (broken / "cold_start" / "checkpoints").exists()
    main.run(experiment(**COLD_START), broken)
    assert comparable(broken) == comparable(whole)
    assert comparable(broken / "cold_start") == comparable(whole / "cold_start")
    assert not any("loss/trace" in line for line in comparable(whole))
    start, cold, end = (
        (path / "model.safetensors").read_bytes()
        for path in (ROOT / "configs" / "tiny", whole / "cold_start" / "policy", whole / "policy")
    )
    assert start != cold == end
