"""What a run checks and says before anything is scored or compiled."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rpt_jax.errors import UserError
from rpt_jax.setup import make_run_mesh
from rpt_jax.startup import check_start, log_start
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, experiment

TINY = ROOT / "configs" / "tiny"


def field_of_error(workdir: Path, **fields: object) -> str:
    """Return the field of the error that a start of `configs/rpt_tiny.py` with some fields changed ends with."""
    config = experiment(**SMALL | fields)
    with pytest.raises(UserError) as raised:
        check_start(config, workdir, make_run_mesh(config))
    assert not workdir.exists()
    return raised.value.field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt.template", "missing.txt"),
        ("prompt.max_tokens", 2),
        ("data.entropy_top_k", 1025),
        ("data.prepared", "nowhere"),
    ],
)
def test_wrong_fields_are_found_before_the_corpus_is_read(tmp_path: Path, field: str, value: object) -> None:
    assert field_of_error(tmp_path / "run", **{"data.min_context": 1, field: value}) == field


def test_a_tokenizer_without_a_token_that_is_needed_is_found(tmp_path: Path) -> None:
    from rpt_jax.tokenizers.training import train_sentencepiece

    policy = tmp_path / "policy"
    shutil.copytree(TINY, policy)
    train_sentencepiece(["other words than those of the policy, many enough 123"] * 50, 300, policy / "tokenizer.model")
    assert field_of_error(tmp_path / "run", **{"policy.path": str(policy)}) == "policy.path"


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints are kept and a third is written: with the policy, 3 · 12 + 4 bytes a parameter."""
    parameters = 918_656
    needed = 40 * parameters
    config = experiment(**SMALL)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=needed))
    check_start(config, tmp_path / "run", make_run_mesh(config))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=needed - 1))
    assert field_of_error(tmp_path / "run") == "--workdir"


def test_random_weights_are_for_pretraining_and_cold_starts(tmp_path: Path) -> None:
    make_run_mesh(experiment(**SMALL | {"policy.path": "", "cold_start.total_steps": 1}))
    for task in ("rpt", "score"):
        with pytest.raises(UserError) as raised:
            make_run_mesh(experiment(**{"task": task, "policy.path": ""}))
        assert raised.value.field == "policy.path"
    fields = {"policy.path": "", "cold_start.total_steps": 1}
    assert field_of_error(tmp_path / "run", **fields | {"pretrain.vocab_size": 300}) == "pretrain.vocab_size"
    assert field_of_error(tmp_path / "run", **fields | {"prompt.template": "none.txt"}) == "prompt.template"


def test_an_export_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = experiment("pretrain_tiny", **{"pretrain.export": str(tmp_path / "file" / "policy")})
    with pytest.raises(UserError) as raised:
        check_start(config, tmp_path / "run", make_run_mesh(config))
    assert raised.value.field == "pretrain.export"


def test_a_run_does_not_overwrite_the_policy_that_it_starts_from(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "run" / "policy")
    for fields in (
        {"policy.path": str(tmp_path / "run" / "policy"), "pretrain.export": f"{tmp_path}/run/../run/policy/"},
        {"policy.path": str(tmp_path / "run" / "policy")},
    ):
        config = experiment("pretrain_tiny", **fields)
        with pytest.raises(UserError) as raised:
            check_start(config, tmp_path / "run", make_run_mesh(config))
        assert raised.value.field == ("pretrain.export" if "pretrain.export" in fields else "--workdir")


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    config = experiment(**SMALL | {"prompt.template": "missing.txt", "data.entropy_top_k": 1025})
    with pytest.raises(UserError) as raised:
        check_start(config, tmp_path / "run", make_run_mesh(config))
    assert "prompt.template" in str(raised.value) and "data.entropy_top_k" in str(raised.value)


def test_the_start_says_devices_sizes_and_where_results_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    log_start(experiment(**SMALL | {"cold_start.total_steps": 1}), tmp_path / "run")
    said = caplog.text
    assert "x cpu, jax" in said and "918,656 parameters, float32" in said and f"Results: {tmp_path / 'run'}" in said
    assert "8 prompts x 4 responses, at most 1,024 tokens of prompts and 768 of responses" in said
    assert "Step of the cold start: 16 windows of documents" in said
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_context_that_is_too_short_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_start(experiment(**SMALL | {"prompt.max_tokens": 32_768, "training.microbatch_tokens": 40_000}), tmp_path)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("prompt.max_tokens + rollout.max_new_tokens = 32,792 tokens")
