"""Pre-training: it stops at NaN, resumes, and exports a policy."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from rpt_jax import main, pretrain
from tests.helpers.runs import PRETRAIN, assert_goes_on, comparable, experiment, interruption_after

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    main.run(experiment("pretrain_tiny", **PRETRAIN), workdir)
    return workdir


def test_a_nan_stops_pretraining_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pretrained: Path
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
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
    assert comparable(workdir) == comparable(pretrained)


def test_pretraining_resumes_and_exports_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: Path
) -> None:
    with interruption_after(2, monkeypatch):
        main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    main.run(experiment("pretrain_tiny", **PRETRAIN), tmp_path)
    assert comparable(tmp_path) == comparable(pretrained)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "policy" / name).read_bytes() == (pretrained / "policy" / name).read_bytes()


def test_finished_pretraining_goes_on_as_if_it_had_had_more_steps(tmp_path: Path, pretrained: Path) -> None:
    assert_goes_on("pretrain_tiny", PRETRAIN, 2, pretrained, tmp_path)


def test_finished_pretraining_is_left_as_it_is(tmp_path: Path, pretrained: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "run")
    (tmp_path / "run" / "policy" / "model.safetensors").write_bytes(b"not exported again")
    config = (tmp_path / "run" / "run_config.json").read_bytes()
    main.run(experiment("pretrain_tiny", **PRETRAIN | {"checkpoint.keep": 7}), tmp_path / "run")
    assert (tmp_path / "run" / "policy" / "model.safetensors").read_bytes() == b"not exported again"
    assert (tmp_path / "run" / "run_config.json").read_bytes() == config
