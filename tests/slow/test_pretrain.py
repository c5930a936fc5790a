"""Pretraining that is stopped by NaN."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rpt_jax import main, pretrain
from tests.helpers.runs import PRETRAIN, comparable, experiment

pytestmark = pytest.mark.slow


def test_a_nan_stops_pretraining_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path / "whole")
    fields = PRETRAIN | {"checkpoint.every_steps": 100}
    workdir = tmp_path / "run"
    pretrain_step = pretrain.pretrain_step
    calls = []

    def spoiled(*arguments: object, **options: object) -> object:
        calls.append(0)
        return pretrain_step(*arguments, **options | ({"weights": (float("nan"), 1.0)} if len(calls) >= 2 else {}))

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "pretrain_step", spoiled)
        with pytest.raises(FloatingPointError, match="step 2: "):
            main.run(experiment("pretrain_tiny", **fields), workdir)
        assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == ["1"]
        record = json.loads((workdir / "not_finite.json").read_text())
        assert record["step"] == 2 and len(record["documents"]) == 2
        with pytest.raises(FloatingPointError):
            main.run(experiment("pretrain_tiny", **fields), workdir, replay=True)
    main.run(experiment("pretrain_tiny", **fields), workdir, replay=True)
    assert "Step 2 was replayed, and all its metrics are finite" in caplog.text
    main.run(experiment("pretrain_tiny", **fields), workdir)
    assert comparable(workdir) == comparable(tmp_path / "whole")
