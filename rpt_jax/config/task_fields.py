"""Fields that have no effect in a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rpt_jax.config.schema import Experiment
from rpt_jax.errors import UserError

_TEXT_SECTIONS = ("data", "cold_start", "pretrain")
_WORKERS = "data.workers"  # They build prompts of either kind.
# Fields about the true continuation of a text, which a question does not have, and why they have no effect.
_CONTINUATION = "a question has no true continuation"
_TEXT_FIELDS = {
    "objective.reward": "the reward is that of questions.verifier",
    "objective.reference_tokens": _CONTINUATION,
    "objective.baseline_decay": _CONTINUATION,
    "objective.document_weight": "a question has no document",
    "prompt.box_reading": "verifiers read the box up to the brace that balances it",
    "prompt.reference_bytes": _CONTINUATION,
    "prompt.long_context": "a question is not cut; one that is too long is left out",
    "evaluation.positions": "questions.test_questions says how many questions are evaluated",
    "evaluation.unseen_positions": "questions.test_questions says how many questions are evaluated",
}


def check_task_fields(experiment: Experiment) -> None:
    """Refuse fields that were changed from their default but have no effect in the task. Raises: UserError."""
    for name, value in _changed_fields(experiment):
        if reason := _why_without_effect(experiment, name):
            raise UserError(
                f"{name}={value!r} has no effect with task='{experiment.task}': {reason}. Leave it out.", field=name
            )


def _changed_fields(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field of a section that does not have its default."""
    for section in dataclasses.fields(experiment):
        config = getattr(experiment, section.name)
        if not dataclasses.is_dataclass(config):
            continue
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            # The options of a choice are an instance of their own class.
            default = type(value)() if dataclasses.is_dataclass(value) else field.default
            if value != default:
                yield f"{section.name}.{field.name}", value


def _why_without_effect(experiment: Experiment, name: str) -> str:
    """Return why a field has no effect; "" if it has one."""
    section = name.partition(".")[0]
    if not experiment.asks_questions:
        return "it belongs to tasks 'rft' and 'difficulty'" if section == "questions" else ""
    if section in _TEXT_SECTIONS and name != _WORKERS:
        return "it belongs to tasks that read a corpus"
    return _TEXT_FIELDS.get(name, "")
