"""Next-token pre-training: it resumes, and exports a policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rpt_jax import main
from rpt_jax.model.model_config import preset
from rpt_jax.pretrain import update_flops
from tests.helpers.runs import PRETRAIN, assert_goes_on, comparable, experiment, interruption_after


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained")
    main.run(experiment("pretrain_tiny", **PRETRAIN), workdir)
    return workdir


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


@pytest.mark.parametrize("trace_weight", [0.0, 1.0])
def test_the_flops_of_an_update_are_those_of_its_tokens_without_padding(trace_weight: float) -> None:
    """A window of four tokens, and a row with two traces that continue its first two tokens and its first one."""
    batch = {
        "mask": np.array([[False, True, True, True, False, False]]),
        "trace_segment": np.array([[[1, 1, 1, 2, 0]]]),
        "trace_position": np.array([[[2, 3, 4, 1, 0]]]),
    }
    config = preset("tiny")
    # The number of tokens that each token attends to, itself included.
    attended = [1, 2, 3, 4] + ([3, 4, 5, 2] if trace_weight else [])
    matrices = 2 * config.matmul_parameters * len(attended)
    attention = 4 * config.layers * config.heads * config.head_size * sum(attended)
    assert update_flops(config, batch, trace_weight) == 3 * (matrices + attention)
