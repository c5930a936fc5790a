"""Small runs of the trainer: their outputs, how they resume, and how invalid input is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import pytest

import rpt_jax
from rpt_jax import main, setup
from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.diagnosis.rule import RULES
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.metrics_page import explained, written
from tests.helpers.paths import ROOT, TINY
from tests.helpers.runs import EVERY_METRIC, experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment(**EVERY_METRIC), workdir)
    return workdir


def test_each_program_is_compiled_once(finished: Path) -> None:
    """Shapes and shardings are the same in every step. In step 3, windows are scored again and dynamic sampling begins."""
    compiled = [line["time/compiled_programs"] for line in read_metrics(finished / "metrics.jsonl")]
    assert compiled[0] > 0 and compiled[1] > 0 and compiled[2] == 0 == compiled[4], compiled


def test_a_run_leaves_metrics_result_plots_and_policy(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert "eval/reasoning/hard" in lines[0] and "eval/reasoning/hard" in lines[2] and "eval/reasoning/hard" in lines[4]
    assert all(line["mismatch/p99"] <= line["mismatch/max"] < 1e-4 for line in lines[1:])
    assert lines[-1]["flops/train_total"] > lines[1]["flops/train_total"] > 0
    rounds = [line["groups/rounds"] for line in lines[1:]]
    assert rounds[:2] == [1, 1] and all(1 <= r <= 2 for r in rounds), "dynamic sampling begins in step 3"
    discarded = [line["flops/discarded_total"] > 0 for line in lines[1:]]
    assert discarded == [max(rounds[: i + 1]) > 1 for i in range(4)], "replaced groups are counted"

    result = json.loads((finished / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {"direct", "reasoning"}
        for mode in ("direct", "reasoning"):
            splits = result[when][mode]
            assert set(splits) == {"easy", "medium", "hard"}
            assert splits["easy"]["positions"] >= splits["medium"]["positions"] >= splits["hard"]["positions"]
            assert all(s["low"] <= s["accuracy"] <= s["high"] for s in splits.values())
    assert result["seed"] == 0 and result["wall_seconds"] > 0 and result["steps"] == 4
    assert result["version"] == rpt_jax.__version__ and result["jax"] == jax.__version__
    assert result["device_kind"] == jax.devices()[0].device_kind and result["platform"] == "cpu"
    # The config, with the memory fields that it leaves open as they were planned.
    given = dict(leaves(experiment(**EVERY_METRIC)))
    assert result["config"].keys() == given.keys()
    assert {name: result["config"][name] for name in EVERY_METRIC} == {name: given[name] for name in EVERY_METRIC}
    assert list((finished / "plots").glob("*.png")) and list((finished / "tensorboard").iterdir())
    assert not (finished / "profile").exists(), "no profile by default"

    shape, _, fingerprint = load_policy(finished / "policy")
    assert shape.parameters < 2_000_000 and fingerprint == load_tokenizer(finished / "policy").fingerprint


def leaf_paths(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        yield from leaf_paths(value, f"{path}.") if isinstance(value, dict) else [path]


def test_the_page_explains_exactly_the_keys_of_an_rpt_run(finished: Path) -> None:
    assert written(finished) == explained("rpt")


def test_the_page_explains_exactly_the_keys_of_pretraining(finished: Path) -> None:
    assert written(finished / "cold_start") == explained("pretrain")


def test_positions_are_chosen_again_during_training(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("time/rescore")] == [3]


def test_a_cold_start_comes_first(finished: Path) -> None:
    assert all("loss/trace" in line for line in read_metrics(finished / "cold_start" / "metrics.jsonl"))
    assert not any("loss/trace" in line for line in read_metrics(finished / "metrics.jsonl"))
    start, cold, end = (
        (path / "model.safetensors").read_bytes()
        for path in (TINY, finished / "cold_start" / "policy", finished / "policy")
    )
    assert start != cold == end


def test_the_page_explains_exactly_the_keys_of_a_result(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text()) | {"config": {"<field>": "any"}}
    assert set(leaf_paths(result)) == explained("result")


def test_a_run_writes_what_the_rules_of_the_doctor_read(finished: Path) -> None:
    for rule in RULES.choices():
        for task, directory in (("rpt", finished), ("pretrain", finished / "cold_start")):
            if task in rule.requirements.tasks and not rule.requirements.rpt_reward:
                assert set(rule.requirements.metrics) <= written(directory), rule.name


def test_tensorboard_has_the_keys_of_the_metrics_file(finished: Path) -> None:
    events = b"".join(path.read_bytes() for path in (finished / "tensorboard").iterdir())
    assert [key for key in sorted(explained("rpt") - {"step"}) if key.encode() not in events] == []


def test_a_result_of_an_older_format_is_refused(finished: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((workdir / "result.json").read_text())
    del result["format"], result["version"]
    (workdir / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="result.json has format 1"):
        main.run(experiment(**EVERY_METRIC), workdir)


def test_a_complete_run_is_left_alone_and_a_changed_config_is_refused(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    before = (finished / "metrics.jsonl").read_bytes()
    config = (finished / "run_config.json").read_bytes()
    main.run(experiment(**EVERY_METRIC | {"evaluation.positions": 17}), finished)
    assert "This run is complete" in caplog.text
    assert "these changes have no effect: evaluation.positions: 16 there, 17 now" in caplog.text
    with pytest.raises(UserError) as raised:
        main.run(experiment(**EVERY_METRIC | {"optimizer.learning_rate": 1e-5}), finished)
    assert raised.value.field == "optimizer.learning_rate"
    assert (finished / "run_config.json").read_bytes() == config
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_replay_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not_finite.json does not exist") as raised:
        main.run(experiment(**EVERY_METRIC), tmp_path, replay=True)
    assert raised.value.field == "--replay"


def test_the_tokenizer_of_another_policy_is_refused(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in (ROOT / "configs" / "tiny").iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    from rpt_jax.tokenizers.training import train_sentencepiece

    train_sentencepiece(["other words than those of the policy, many enough 123"] * 50, 300, policy / "tokenizer.model")
    with pytest.raises(UserError) as raised:
        main.run(experiment(**EVERY_METRIC | {"policy.path": str(policy)}), tmp_path / "run")
    assert raised.value.field == "policy.path"


def test_a_batch_that_the_mesh_cannot_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        main.run(
            dataclasses.replace(experiment(**EVERY_METRIC), mesh=dataclasses.replace(Experiment().mesh, tensor=3)),
            tmp_path,
        )
    assert raised.value.field == "mesh.tensor"


def test_a_reward_that_needs_an_end_of_thinking_token_is_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_think(source):
        return dataclasses.replace(load_tokenizer(source), end_think_id=-1)

    monkeypatch.setattr(setup, "load_tokenizer", without_think)
    with pytest.raises(UserError) as raised:
        main.run(experiment(**EVERY_METRIC | {"objective.reward": "mean_prob"}), tmp_path)
    assert raised.value.field == "objective.reward"
