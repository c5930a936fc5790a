"""Budgets of FLOPs and seconds: when training ends, and what does not go with them."""

from __future__ import annotations

import pytest

from rpt_jax.config import TrainingConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.budget import budget_used, expected_steps, is_last_step
from tests.helpers.runs import experiment

BOTH = TrainingConfig(total_steps=100, flops_budget=50.0, seconds_budget=10.0)


def test_the_budget_that_is_spent_first_ends_training() -> None:
    assert budget_used(BOTH, flops=25.0, seconds=8.0) == 0.8
    assert not is_last_step(BOTH, step=3, flops=49.0, seconds=9.0)
    assert is_last_step(BOTH, step=3, flops=50.0, seconds=0.0) and is_last_step(BOTH, step=3, flops=0.0, seconds=10.5)
    # What is spent before the first step does not end a run without any.
    assert not is_last_step(BOTH, step=0, flops=60.0, seconds=0.0)


def test_without_a_budget_the_number_of_steps_ends_training() -> None:
    unlimited = TrainingConfig(total_steps=100)
    assert budget_used(unlimited, flops=1e30, seconds=1e9) == 0
    assert is_last_step(unlimited, step=100, flops=0.0, seconds=0.0) and is_last_step(BOTH, 100, 0.0, 0.0)
    assert expected_steps(unlimited, step=3, flops=1e30, seconds=0.0) == 100


def test_the_length_is_expected_from_the_steps_before() -> None:
    assert expected_steps(BOTH, step=4, flops=10.0, seconds=1.0) == 20
    assert expected_steps(BOTH, step=4, flops=0.1, seconds=0.0) == 100  # At most training.total_steps.


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"training.flops_budget": -1.0}, "training.flops_budget"),
        ({"training.seconds_budget": float("nan")}, "training.seconds_budget"),
        ({"training.seconds_budget": 60}, "optimizer.schedule"),
        (
            {"training.flops_budget": 1e12, "optimizer.schedule": "constant", "data.positions": "curriculum"},
            "data.positions",
        ),
        (
            {
                "training.flops_budget": 1e12,
                "optimizer.schedule": "constant",
                "objective.budget_weight": 0.1,
                "objective.budget_start": 8,
                "objective.budget_decay": 0.5,
            },
            "objective.budget_decay",
        ),
        ({"task": "score", "training.flops_budget": 1e12, "optimizer.schedule": "constant"}, "training.flops_budget"),
    ],
)
def test_what_needs_the_number_of_steps_is_refused(fields: dict[str, object], field: str) -> None:
    """configs/rpt_tiny.py has a cosine schedule."""
    with pytest.raises(UserError) as raised:
        experiment("rpt_tiny", **fields)
    assert raised.value.field == field
