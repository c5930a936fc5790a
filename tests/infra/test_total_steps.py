"""What a run says when `training.total_steps` changes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rpt_jax.config import Experiment
from rpt_jax.infra.total_steps import consequences_of_total_steps


def experiment(**sections: dict[str, object]) -> Experiment:
    base = Experiment()
    return dataclasses.replace(
        base, **{name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
    )


def test_a_constant_schedule_has_no_consequence() -> None:
    longer = experiment(training={"total_steps": 20}, optimizer={"warmup_steps": 3})
    assert consequences_of_total_steps(longer, earlier_total=10, completed=10) == []


def test_the_learning_rates_of_a_cosine_schedule_are_said() -> None:
    """Halfway between the peak of 1 and a tenth of it, and at the end of the earlier schedule."""
    longer = experiment(
        training={"total_steps": 20, "minibatches_per_step": 2, "prompts_per_step": 4},
        optimizer={"schedule": "cosine", "learning_rate": 1.0},
    )
    [said] = consequences_of_total_steps(longer, earlier_total=10, completed=10)
    halfway = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert f"the learning rate of step 11 is {halfway:.3g} (0.1 with the earlier total)" in said
    assert consequences_of_total_steps(longer, earlier_total=20, completed=10) == []
    assert consequences_of_total_steps(longer, earlier_total=10, completed=0) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"positions": "curriculum"}},
        {"objective": {"budget_weight": 0.5, "budget_start": 16, "budget_decay": 0.5}},
    ],
)
def test_other_parts_that_follow_the_total_are_said(sections: dict[str, dict[str, object]]) -> None:
    longer = experiment(training={"total_steps": 20}, **sections)
    [section] = sections
    [said] = consequences_of_total_steps(longer, earlier_total=10, completed=10)
    assert f"{section}." in said
    assert consequences_of_total_steps(dataclasses.replace(longer, task="pretrain"), 10, 10) == []
