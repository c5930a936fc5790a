"""Lengths of a run against the context of its policy."""

from __future__ import annotations

import dataclasses

import pytest

from rpt_jax.config import ColdStartConfig, DataConfig, Experiment, PromptConfig, RolloutConfig
from rpt_jax.model.context_length import context_warnings, trained_context
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.model.rope import Linear, Yarn

CONFIG = dataclasses.replace(preset("tiny"), context=4096)


def test_yarn_extends_the_context() -> None:
    """Qwen2.5's documentation leaves max_position_embeddings as it was before; other models give the extended one."""
    for context in (32_768, 131_072):
        yarn = Yarn(factor=4.0, original_max_position_embeddings=32_768)
        assert trained_context(dataclasses.replace(CONFIG, context=context, rope_scaling=yarn)) == 131_072
    assert trained_context(dataclasses.replace(CONFIG, rope_scaling=Linear(factor=2.0))) == 4096


@pytest.mark.parametrize(
    ("max_new_tokens", "task", "warns"), [(4000, "rpt", False), (4001, "rpt", True), (4001, "pretrain", False)]
)
def test_prompt_and_response_must_fit_together(max_new_tokens: int, task: str, warns: bool) -> None:
    experiment = Experiment(
        task=task, prompt=PromptConfig(max_tokens=96), rollout=RolloutConfig(max_new_tokens=max_new_tokens)
    )
    found = context_warnings(experiment, CONFIG)
    assert [text.startswith("prompt.max_tokens + rollout.max_new_tokens = 4,097") for text in found] == [True] * warns


def test_windows_and_traces_must_fit_too() -> None:
    data = DataConfig(max_document_tokens=4097)
    cold_start = ColdStartConfig(total_steps=1)

    def fields(**sections: object) -> list[str]:
        return [text.partition(" = ")[0] for text in context_warnings(Experiment(**sections), CONFIG)]

    traces = "data.max_document_tokens + pretrain.row_tokens"
    assert fields(task="score", data=data) == ["data.max_document_tokens"]
    assert fields(task="pretrain", data=data) == [traces]
    assert fields(data=data, cold_start=cold_start) == [traces, "data.max_document_tokens"]
    assert fields(data=dataclasses.replace(data, prepared="corpus")) == []


def test_a_default_run_of_the_tiny_policy_fits() -> None:
    config: ModelConfig = preset("tiny")
    assert context_warnings(Experiment(), config) == []
