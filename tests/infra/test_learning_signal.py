"""The warning that nothing can be learned, and its likely cause."""

from __future__ import annotations

import dataclasses

import pytest

from rpt_jax.config import ColdStartConfig, DataConfig, Experiment, PretrainConfig
from rpt_jax.infra.learning_signal import STEPS_WITHOUT_SIGNAL, LearningSignal


def rollouts(status: str, zero_variance: float = 1.0) -> dict[str, float]:
    """Return the metrics of a step in which 80 % of the rollouts have `status`."""
    return {
        "groups/zero_variance": zero_variance,
        "reward/mean": 0.0,
        "update/skipped": float(zero_variance == 1.0),
        "status/other": 0.2,
        f"status/{status}": 0.8,
        "ended/length": 1.0,
    }


def test_the_warning_comes_once_until_there_is_a_signal_again() -> None:
    signal = LearningSignal(Experiment())
    silent = rollouts("no_box")
    steps = [silent] * (STEPS_WITHOUT_SIGNAL + 2) + [rollouts("no_box", 0.9)] + [silent] * STEPS_WITHOUT_SIGNAL
    warned = [step for step, scalars in enumerate(steps, start=1) if signal.check_rollouts(step, scalars)]
    assert warned == [STEPS_WITHOUT_SIGNAL, len(steps)]


def test_one_warning_says_that_nothing_is_learned_and_that_updates_are_skipped() -> None:
    for skipped in (0.0, 1.0):  # With another loss, such as objective.kl, the policy moves all the same.
        signal = LearningSignal(Experiment())
        scalars = rollouts("no_box") | {"update/skipped": skipped}
        said = [signal.check_rollouts(step, scalars) for step in range(STEPS_WITHOUT_SIGNAL)]
        assert [len(warnings) for warnings in said] == [0] * (STEPS_WITHOUT_SIGNAL - 1) + [1]
        assert ("update/skipped" in said[-1][0]) == bool(skipped)


def test_a_skipped_minibatch_of_a_step_that_learns_is_reported_once() -> None:
    signal = LearningSignal(Experiment())
    said = [
        signal.check_rollouts(step, rollouts("no_box", 0.5) | {"update/skipped": skipped})
        for step, skipped in enumerate((0.0, 1.0, 1.0, 0.0, 2.0))
    ]
    assert [len(warnings) for warnings in said] == [0, 1, 0, 0, 1]
    assert "2 of the step's updates were skipped" in said[-1][0]


@pytest.mark.parametrize(
    ("status", "cold_start_steps", "field"),
    [
        ("not_finished", 0, "rollout.max_new_tokens=48"),
        ("no_box", 0, "prompt.template='v0'"),
        ("no_box", 7, "cold_start.total_steps=7"),
        ("empty", 0, "prompt.template='v0'"),
        ("wrong_bytes", 0, "easier positions than data.positions='threshold', data.entropy_threshold=0.5"),
        ("inside_token", 0, "easier positions than data.positions='threshold', data.entropy_threshold=0.5"),
        ("correct", 0, "harder positions than data.positions='threshold', data.entropy_threshold=0.5"),
    ],
)
def test_the_likely_cause_follows_from_the_most_frequent_status(status: str, cold_start_steps: int, field: str) -> None:
    experiment = dataclasses.replace(Experiment(), cold_start=ColdStartConfig(total_steps=cold_start_steps))
    signal = LearningSignal(experiment)
    said = [signal.check_rollouts(step, rollouts(status)) for step in range(STEPS_WITHOUT_SIGNAL)]
    [warning] = said[-1]
    assert not any(said[:-1]) and f"80% have status/{status}" in warning and field in warning


@pytest.mark.parametrize(("positions", "fields"), [("quantile", "data.keep_fraction=0.2"), ("every", "")])
def test_the_advice_names_the_fields_of_the_choice_of_positions(positions: str, fields: str) -> None:
    experiment = dataclasses.replace(Experiment(), data=DataConfig(positions=positions))
    signal = LearningSignal(experiment)
    [warning] = [signal.check_rollouts(step, rollouts("correct")) for step in range(STEPS_WITHOUT_SIGNAL)][-1]
    assert f"data.positions='{positions}'" in warning and fields in warning and "entropy_threshold" not in warning


@pytest.mark.parametrize(("loss", "weight", "warns"), [(0.0, 1.0, True), (0.1, 1.0, False), (0.0, 0.0, False)])
def test_a_cold_start_without_traces_is_reported(loss: float, weight: float, warns: bool) -> None:
    signal = LearningSignal(dataclasses.replace(Experiment(), pretrain=PretrainConfig(trace_weight=weight)))
    said = [
        signal.check_traces(step, {"loss/trace": loss, "update/skipped": 0.0}) for step in range(STEPS_WITHOUT_SIGNAL)
    ]
    assert bool(said[-1]) == warns and not any(said[:-1])
    assert not warns or "pretrain.row_tokens=64" in said[-1][0]
