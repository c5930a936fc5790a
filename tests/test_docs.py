"""The pages of docs/ say what the code does: the metrics that runs write, and the reading of predictions."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_jax import evaluate, main
from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.config.loading import split_overrides
from rpt_jax.config.study import load_study
from rpt_jax.diagnosis.rule import RULES
from rpt_jax.evaluation.run import check_task
from rpt_jax.evaluation.suite import SUITES
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.study import __main__ as study
from rpt_jax.study.plan import check_stages
from tests.helpers.paths import ROOT, TINY

PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
INTERVAL = ("accuracy", "low", "high", "positions")
# Everything that adds a key is on: a cold start, all optional terms of the objective, dynamic sampling and a rescoring.
FIELDS = {
    "data.source_options.documents": 40,
    "data.held_out_documents": 20,
    "data.source_options.held_out_templates": 2,
    "data.max_document_tokens": 96,
    "data.positions": "self_entropy",
    "data.rescore_every_steps": 2,
    "data.rescore_windows": 32,
    "prompt.max_tokens": 96,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 12,
    "rollout.decode_slots": 8,
    "rollout.stop_at_box": True,
    "objective.importance": "mask",
    "objective.kl": "k2",
    "objective.kl_weight": 0.1,
    "objective.entropy_weight": 0.01,
    "objective.document_weight": 0.5,
    "training.prompts_per_step": 4,
    "training.microbatch_tokens": 128,
    "training.total_steps": 3,
    "training.dynamic_sampling_from": 1,
    "evaluation.every_steps": 9,
    "evaluation.positions": 16,
    "evaluation.unseen_positions": 4,
    "checkpoint.every_steps": 1,
    "cold_start.total_steps": 1,
    "optimizer.learning_rate": 0.0,  # The cold start has its own, so it alone changes the policy.
    "pretrain.windows_per_step": 2,
    "pretrain.rows_per_window": 2,
}


def explained(anchor: str) -> set[str]:
    """Return the keys in the tables of the section with `anchor`, with their patterns expanded."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if f"{{#{anchor}}}" in part.partition("\n")[0]]
    keys = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(keys) == len(set(keys)), "a key has two rows"
    levels = {key.replace("<difficulty>", level) for key in keys for level in DIFFICULTIES}
    return {key.replace("*", name) for key in levels for name in INTERVAL}


def written(workdir: Path) -> set[str]:
    return set().union(*read_metrics(workdir / "metrics.jsonl"))


def leaf_paths(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        yield from leaf_paths(value, f"{path}.") if isinstance(value, dict) else [path]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with every optional part on."""
    config = importlib.import_module("configs.rpt_tiny").get_config()
    for field, value in FIELDS.items():
        section, _, leaf = field.rpartition(".")
        config[section][leaf] = value
    path = tmp_path_factory.mktemp("run")
    main.run(from_config_dict(config.to_dict()), path)
    return path


def test_the_page_explains_exactly_the_keys_of_an_rpt_run(workdir: Path) -> None:
    assert written(workdir) == explained("rpt")


def test_the_page_explains_exactly_the_keys_of_pretraining(workdir: Path) -> None:
    assert written(workdir / "cold_start") == explained("pretrain")


def test_positions_are_chosen_again_during_training(workdir: Path) -> None:
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("time/rescore")] == [3]


def test_a_cold_start_comes_first(workdir: Path) -> None:
    assert all("loss/trace" in line for line in read_metrics(workdir / "cold_start" / "metrics.jsonl"))
    assert not any("loss/trace" in line for line in read_metrics(workdir / "metrics.jsonl"))
    start, cold, end = (
        (path / "model.safetensors").read_bytes()
        for path in (TINY, workdir / "cold_start" / "policy", workdir / "policy")
    )
    assert start != cold == end


def test_the_page_explains_exactly_the_keys_of_a_result(workdir: Path) -> None:
    result = json.loads((workdir / "result.json").read_text()) | {"config": {"<field>": "any"}}
    assert set(leaf_paths(result)) == explained("result")


def test_a_run_writes_what_the_rules_of_the_doctor_read(workdir: Path) -> None:
    for rule in RULES.choices():
        for task, directory in (("rpt", workdir), ("pretrain", workdir / "cold_start")):
            if task in rule.requirements.tasks and rule.name != "answers_unverified":
                assert set(rule.requirements.metrics) <= written(directory), rule.name


def test_tensorboard_has_the_keys_of_the_metrics_file(workdir: Path) -> None:
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert [key for key in sorted(explained("rpt") - {"step"}) if key.encode() not in events] == []


def reward_and_status(response: bytes, finished: bool, continuation: list[bytes]) -> tuple[float, Status]:
    """Score one response with the compiled reward; its tokens are single bytes."""
    tokens = np.frombuffer(response.ljust(64, b"\0"), np.uint8).astype(np.int32)
    text = b"".join(continuation).ljust(32, b"\0")
    boundaries = np.zeros(33, bool)
    boundaries[np.cumsum([len(token) for token in continuation])] = True
    reward_1x1, status_1x1 = prefix_match_reward(
        tokens[None, None],
        np.array([[len(response)]], np.int32),
        np.array([[finished]]),
        np.frombuffer(text, np.uint8)[None],
        boundaries[None],
        np.arange(256, dtype=np.uint8)[:, None],
        np.ones(256, np.int32),
        -1,
    )
    return float(reward_1x1[0, 0]), Status(int(status_1x1[0, 0]))


def test_the_examples_of_the_reward_page_are_read_as_it_says() -> None:
    page = (ROOT / "docs" / "concepts" / "reward.md").read_text()
    rows = re.findall(r"^\| `(.+?)`(.*?) \| .*? ?\| `(\w+)`.*? \| ([01]) \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 10
    for response, remark, status, reward in rows:
        finished = "length limit" not in remark
        result = reward_and_status(f"</think>{response}".encode(), finished, [b" size", b" and", b" decreases"])
        assert result == (float(reward), Status[status.upper()]), response


def test_every_command_of_the_papers_results_can_be_run() -> None:
    """Up to the files that it names: flags and config fields exist and have an effect."""
    page = (ROOT / "docs" / "guides" / "reproduce.md").read_text()
    commands = re.findall(r"`python -m rpt_jax\.(\w+) ([^`]+)`", page)
    assert len(commands) == page.count("python -m rpt_jax") >= 12
    for module, arguments in commands:
        overrides, flags = split_overrides(arguments.split())
        if module == "main":
            main.load_experiment(["main", *arguments.split()])
            continue
        if module == "study":
            check_stages(load_study(study.make_parser().parse_args(flags).config))
            continue
        options = evaluate.make_parser().parse_args(flags)
        assert SUITES[options.suite].requirements.policy == bool(options.config) != bool(options.results)
        if options.config:
            experiment = from_config_dict(load_config_file(options.config), overrides, options.suite)
            check_task(options.suite, experiment)
