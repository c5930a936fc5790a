"""Small runs of the trainer: their outputs, how they resume, and how invalid input is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rpt_jax
from rpt_jax import main, setup, train
from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, comparable, experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment(**SMALL), workdir)
    return workdir


def test_each_program_is_compiled_once(finished: Path) -> None:
    """Shapes and shardings are the same in every step; dynamic sampling begins in step 3."""
    compiled = [line["time/compiled_programs"] for line in read_metrics(finished / "metrics.jsonl")]
    assert compiled[0] > 0 and compiled[1] > 0 and compiled[2] == 0 == compiled[4] == compiled[5], compiled


def test_a_run_leaves_metrics_result_plots_and_policy(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert "eval/reasoning/hard" in lines[0] and "eval/reasoning/hard" in lines[2] and "eval/reasoning/hard" in lines[5]
    assert all(line["mismatch/p99"] <= line["mismatch/max"] < 1e-4 for line in lines[1:])
    assert lines[-1]["flops/train_total"] > lines[1]["flops/train_total"] > 0
    rounds = [line["groups/rounds"] for line in lines[1:]]
    assert rounds[:2] == [1, 1] and all(1 <= r <= 2 for r in rounds), "dynamic sampling begins in step 3"
    discarded = [line["flops/discarded_total"] > 0 for line in lines[1:]]
    assert discarded == [max(rounds[: i + 1]) > 1 for i in range(5)], "replaced groups are counted"

    result = json.loads((finished / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {"direct", "reasoning"}
        for mode in ("direct", "reasoning"):
            splits = result[when][mode]
            assert set(splits) == {"easy", "medium", "hard"}
            assert splits["easy"]["positions"] >= splits["medium"]["positions"] >= splits["hard"]["positions"]
            assert all(s["low"] <= s["accuracy"] <= s["high"] for s in splits.values())
    assert result["seed"] == 0 and result["wall_seconds"] > 0 and result["steps"] == 5
    assert result["version"] == rpt_jax.__version__ and result["jax"] == jax.__version__
    assert result["device_kind"] == jax.devices()[0].device_kind and result["platform"] == "cpu"
    # The config, with the memory fields that it leaves open as they were planned.
    given = dict(leaves(experiment(**SMALL)))
    assert result["config"].keys() == given.keys()
    assert {name: result["config"][name] for name in SMALL} == {name: given[name] for name in SMALL}
    assert list((finished / "plots").glob("*.png")) and list((finished / "tensorboard").iterdir())
    assert not (finished / "profile").exists(), "no profile by default"

    shape, _, fingerprint = load_policy(finished / "policy")
    assert shape.parameters < 2_000_000 and fingerprint == load_tokenizer(finished / "policy").fingerprint


def test_a_result_of_an_older_format_is_refused(finished: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((workdir / "result.json").read_text())
    del result["format"], result["version"]
    (workdir / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="result.json has format 1"):
        main.run(experiment(**SMALL), workdir)


def test_a_complete_run_is_left_alone_and_a_changed_config_is_refused(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    before = (finished / "metrics.jsonl").read_bytes()
    config = (finished / "run_config.json").read_bytes()
    main.run(experiment(**SMALL | {"evaluation.positions": 17}), finished)
    assert "This run is complete" in caplog.text
    assert "these changes have no effect: evaluation.positions: 16 there, 17 now" in caplog.text
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SMALL | {"optimizer.learning_rate": 1e-5}), finished)
    assert raised.value.field == "optimizer.learning_rate"
    assert (finished / "run_config.json").read_bytes() == config
    assert (finished / "metrics.jsonl").read_bytes() == before


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


def test_a_replay_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not_finite.json does not exist") as raised:
        main.run(experiment(**SMALL), tmp_path, replay=True)
    assert raised.value.field == "--replay"


def test_the_tokenizer_of_another_policy_is_refused(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in (ROOT / "configs" / "tiny").iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    from rpt_jax.tokenizers.training import train_sentencepiece

    train_sentencepiece(["other words than those of the policy, many enough 123"] * 50, 300, policy / "tokenizer.model")
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SMALL | {"policy.path": str(policy)}), tmp_path / "run")
    assert raised.value.field == "policy.path"


def test_a_batch_that_the_mesh_cannot_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        main.run(
            dataclasses.replace(experiment(**SMALL), mesh=dataclasses.replace(Experiment().mesh, tensor=3)), tmp_path
        )
    assert raised.value.field == "mesh.tensor"


def test_a_reward_that_needs_an_end_of_thinking_token_is_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_think(source):
        return dataclasses.replace(load_tokenizer(source), end_think_id=-1)

    monkeypatch.setattr(setup, "load_tokenizer", without_think)
    with pytest.raises(UserError) as raised:
        main.run(experiment(**SMALL | {"objective.reward": "mean_prob"}), tmp_path)
    assert raised.value.field == "objective.reward"
