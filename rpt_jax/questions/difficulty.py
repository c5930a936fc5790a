"""Questions of the right difficulty: those that a policy solves sometimes, by the pass rates of task "difficulty"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.questions.question import Question

PASS_RATES = "pass_rates.jsonl"


class PassRate(NamedTuple):
    """How many of some responses to a question were correct."""

    passes: int
    samples: int


class DifficultyFilter:
    """Says whether a question may be trained on: `questions.min_passes` to `questions.max_passes` responses were correct."""

    def __init__(self, config: QuestionsConfig):
        """Read the file of `questions.pass_rates`. Raises: UserError, if it cannot be read, or the bounds exceed its samples."""
        self._config = config
        self._rates = read_pass_rates(Path(config.pass_rates))
        samples = max(rate.samples for rate in self._rates.values())
        self._max_passes = samples - 1 if config.max_passes < 0 else config.max_passes
        for name, value in (("min_passes", config.min_passes), ("max_passes", config.max_passes)):
            if value > samples:
                raise UserError(
                    f"questions.{name}={value} is more than the {samples} responses to each question in "
                    f"questions.pass_rates={config.pass_rates}.",
                    field=f"questions.{name}",
                )

    def __call__(self, question: Question) -> bool:
        """Return whether a question is kept. One without a pass rate, such as one that was too long, is not."""
        rate = self._rates.get(question.id)
        return rate is not None and self._config.min_passes <= rate.passes <= self._max_passes


def read_pass_rates(path: Path) -> dict[str, PassRate]:
    """Return the pass rates in a file by question id. Raises: UserError, naming the file, the line and the reason."""
    field = "questions.pass_rates"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"{field}={path}: {reason}. Give the {PASS_RATES} of a run of task 'difficulty'.", field=field
        ) from None
    rates = {}
    for number, line in enumerate(lines, start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            rate = PassRate(passes=int(record["passes"]), samples=int(record["samples"]))
            rates[str(record["id"])] = rate
        except (KeyError, TypeError, ValueError):
            rate = PassRate(passes=-1, samples=0)
        if not 0 <= rate.passes <= rate.samples:
            raise UserError(
                f"{field}: {path}:{number} has no 'id', 'passes' and 'samples' of a question. Give the {PASS_RATES} of a run of "
                "task 'difficulty'.",
                field=field,
            )
    if not rates:
        raise UserError(f"{field}: {path} is empty.", field=field)
    return rates
