"""Next-token pre-training and the cold start: they resume, and export a policy."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rpt_jax import main, pretrain
from tests.helpers.paths import ROOT
from tests.helpers.runs import COLD_START, comparable, experiment, interruption_after

PRETRAIN = {
    "data.source_options.documents": 200,
    "data.max_document_tokens": 64,
    "pretrain.documents_per_step": 2,
    "pretrain.rows_per_document": 2,
    "training.total_steps": 3,
    "checkpoint.every_steps": 1,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    main.run(experiment("pretrain_tiny", **PRETRAIN), workdir)
    return workdir


def test_a_nan_stops_pretraining_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    fields = PRETRAIN | {"checkpoint.every_steps": 100}
    pretrain_step = pretrain.pretrain_step
    calls = []

    def spoiled(*arguments: object, **options: object) -> object:
        calls.append(0)
        return pretrain_step(*arguments, **options | ({"weights": (float("nan"), 1.0)} if len(calls) >= 2 else {}))

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "pretrain_step", spoiled)
        with pytest.raises(FloatingPointError, match="step 2: "):
            main.run(experiment("pretrain_tiny", **fields), tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["1"]
        record = json.loads((tmp_path / "not_finite.json").read_text())
        assert record["step"] == 2 and len(record["documents"]) == 2
        with pytest.raises(FloatingPointError):
            main.run(experiment("pretrain_tiny", **fields), tmp_path, replay=True)
    main.run(experiment("pretrain_tiny", **fields), tmp_path, replay=True)
    assert "Step 2 was replayed, and all its metrics are finite" in caplog.text
    main.run(experiment("pretrain_tiny", **fields), tmp_path)
    assert comparable(tmp_path) == comparable(pretrained)


def test_pretraining_resumes_and_exports_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path
) -> None:
    with interruption_after(2, monkeypatch):
        main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    assert comparable(tmp_path) == comparable(pretrained)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "policy" / name).read_bytes() == (pretrained / "policy" / name).read_bytes()


def test_a_cold_start_comes_first(tmp_path: Path) -> None:
    """The learning rate of the run itself is 0, so its policy is that of the cold start."""
    main.run(experiment(**COLD_START), tmp_path)
    assert not any("loss/trace" in line for line in comparable(tmp_path))
    assert all("loss/trace" in line for line in comparable(tmp_path / "cold_start"))
    start, cold, end = (
        (path / "model.safetensors").read_bytes()
        for path in (ROOT / "configs" / "tiny", tmp_path / "cold_start" / "policy", tmp_path / "policy")
    )
    assert start != cold == end
