"""Fields without an effect: refused where somebody types them, allowed in config files, which share bases."""

from __future__ import annotations

import pytest

from rpt_jax.config import Experiment, from_config_dict
from rpt_jax.config.schema import TASKS
from rpt_jax.config.task_fields import unread_changes
from rpt_jax.errors import UserError


@pytest.mark.parametrize(
    ("config", "override"),
    [
        ({"task": "pretrain"}, "rollout.temperature=0.5"),
        ({"task": "pretrain"}, "objective.clip_low=0.1"),
        ({"task": "pretrain"}, "evaluation.positions=8"),
        ({"task": "pretrain"}, "cold_start.total_steps=8"),
        ({"task": "score"}, "pretrain.row_tokens=32"),
        ({"task": "score"}, "optimizer.learning_rate=0.1"),
        ({"task": "score"}, "checkpoint.keep=3"),
        ({}, "pretrain.row_tokens=32"),
        ({}, "cold_start.learning_rate=0.1"),
        ({"cold_start": {"total_steps": 5}}, "pretrain.export=policy"),
        ({"task": "pretrain", "policy": {"path": "policy"}}, "pretrain.vocab_size=2048"),
    ],
)
def test_a_typed_field_without_an_effect_is_refused(config: dict, override: str) -> None:
    with pytest.raises(UserError) as raised:
        from_config_dict(config, [override])
    name, _, value = override.partition("=")
    assert raised.value.field == name

    # In a config file it is allowed, and named when the run starts.
    section, _, field = name.partition(".")
    kind = str if name == "pretrain.export" else float if "." in value else int
    experiment = from_config_dict(config | {section: {field: kind(value)}})
    assert name in unread_changes(experiment)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"task": "pretrain"}, ["pretrain.row_tokens=32", "prompt.template=v0", "training.total_steps=3"]),
        ({"task": "score"}, ["data.entropy_top_k=8", "data.shard=0/4", "checkpoint.grace_seconds=5"]),
        ({}, ["cold_start.total_steps=5", "pretrain.row_tokens=32", "rollout.temperature=0.5"]),
        ({"rollout": {"temperature": 0.5}}, ["task=pretrain"]),
    ],
)
def test_a_field_that_the_task_reads_is_accepted(config: dict, overrides: list[str]) -> None:
    from_config_dict(config, overrides)


@pytest.mark.parametrize(
    ("suite", "override"),
    [
        ("next_token", "objective.clip_low=0.1"),
        ("next_token", "evaluation.every_steps=8"),
        ("questions", "optimizer.learning_rate=0.1"),
        ("questions", "questions.min_passes=2"),
        ("questions", "multiple_choice.samples=2"),
        ("multiple_choice", "rollout.temperature=0.5"),
        ("multiple_choice", "questions.verifier_seconds=5"),
        ("multiple_choice_likelihood", "prompt.max_tokens=512"),
    ],
)
def test_a_typed_field_that_a_suite_does_not_read_is_refused(suite: str, override: str) -> None:
    task = "rpt" if suite == "next_token" else "rft"
    fields = {"pass_rates": "rates.jsonl"} if "passes" in override else {}
    with pytest.raises(UserError, match=f"--suite={suite}") as raised:
        from_config_dict({"task": task, "questions": fields}, [override], suite)
    assert raised.value.field == override.partition("=")[0]


def test_an_evaluation_is_not_bound_by_what_only_training_needs() -> None:
    config = {
        "task": "rft",
        "prompt": {"max_tokens": 4096},
        "rollout": {"top_p": 0.9},
        "training": {"microbatch_tokens": 512, "minibatches_per_step": 4, "prompts_per_step": 8},
    }
    with pytest.raises(UserError):
        from_config_dict(config)
    from_config_dict(config, ["training.prompts_per_step=2"], "multiple_choice")


@pytest.mark.parametrize("name", ["multiple_choice.samples", "evaluation.split"])
@pytest.mark.parametrize("task", TASKS)
def test_no_task_reads_what_only_suites_read(task: str, name: str) -> None:
    with pytest.raises(UserError, match="has no effect") as raised:
        from_config_dict({"task": task}, [f"{name}={'train' if name == 'evaluation.split' else 3}"])
    assert raised.value.field == name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_what_it_does_not_read(task: str) -> None:
    assert unread_changes(Experiment(task=task)) == []
