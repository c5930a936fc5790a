"""Questions of the right difficulty: those that a policy solves sometimes, by the pass rates of task "difficulty".

The first line of a file of pass rates says what they were measured with: policy, tokenizer, verifier and sampling. Every other
line is about a question:

    {"id": "questions.jsonl:3", "question": "5f0c…", "passes": 3, "samples": 16}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.digest import digest
from rpt_jax.questions.question import Question

logger = logging.getLogger(__name__)

PASS_RATES = "pass_rates.jsonl"

_FIELD = "questions.pass_rates"
_SOURCE = f"Give the {PASS_RATES} of a run of task 'difficulty'."
_HEADER = ("policy", "tokenizer", "verifier", "sampling")
# The number of samples may differ from that of training, and so may their noise.
_NOT_COMPARED = ("rollout.samples_per_prompt", "seed")


class PassRate(NamedTuple):
    """How many of some responses to a question were correct; `question` is its `question_digest`."""

    question: str
    passes: int
    samples: int


class PassRates(NamedTuple):
    """The contents of a file of pass rates.

    Attributes:
      measured_with: fingerprints of the "policy" and the "tokenizer", the name of the "verifier", and the fields of "sampling".
      rates: by the id of the question.
    """

    measured_with: dict[str, Any]
    rates: dict[str, PassRate]


class DifficultyFilter:
    """Chooses questions to train on, of which `questions.min_passes` to `questions.max_passes` responses were correct."""

    def __init__(self, config: QuestionsConfig, measured_with: Mapping[str, Any]):
        """Read the file of `questions.pass_rates`, and warn if another policy or other sampling was measured.

        Args:
          config: section `questions`.
          measured_with: what a run of task "difficulty" would measure with now, as `PassRates.measured_with`.

        Raises: UserError, if the file cannot be read, if it is of another verifier, or if the bounds leave no question.
        """
        self._path = Path(config.pass_rates)
        found, self._rates = read_pass_rates(self._path)
        if not self._rates:
            raise UserError(f"{_FIELD}: {self._path} has no pass rate. {_SOURCE}", field=_FIELD)
        if found["verifier"] != measured_with["verifier"]:
            raise UserError(
                f"{_FIELD}: {self._path} was measured with the verifier '{found['verifier']}', and "
                f"questions.verifier='{measured_with['verifier']}' accepts other answers. Measure again, or choose the first.",
                field=_FIELD,
            )
        if changes := _changes(found, measured_with):
            logger.warning(
                "%s: %s was measured with another %s than this run's. The questions are filtered by what that policy solved; "
                "this one may always or never solve some of them.",
                _FIELD,
                self._path,
                " and ".join(changes),
            )
        samples = max(rate.samples for rate in self._rates.values())
        self._min_passes = config.min_passes
        self._max_passes = samples - 1 if config.max_passes < 0 else config.max_passes
        for name, value, limit in (
            ("max_passes", config.max_passes, samples),
            ("min_passes", config.min_passes, self._max_passes),
        ):
            if value > limit:
                default = (
                    " and questions.max_passes=-1 excludes those that were always solved" if limit < samples else ""
                )
                raise UserError(
                    f"questions.{name}={value} leaves no question: {self._path} has {samples} responses to each{default}. "
                    f"Give at most {limit}.",
                    field=f"questions.{name}",
                )

    def __call__(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions that are kept, in their order. One without a pass rate, such as one that was too long, is not.

        Raises: UserError, if the file has no pass rate of any of them, or one of another question with the same id.
        """
        measured = [question for question in questions if question.id in self._rates]
        if not measured:
            raise UserError(
                f"{_FIELD}: {self._path} has no pass rate of any of the {len(questions):,} training questions: it has the ids "
                f"{', '.join(list(self._rates)[:2])}, …, and they have ids such as {questions[0].id}. {_SOURCE} Without "
                "questions.id_field, ids are the names of files and the numbers of lines.",
                field=_FIELD,
            )
        for question in measured:
            if self._rates[question.id].question != question_digest(question):
                raise UserError(
                    f"{_FIELD}: {self._path} has a pass rate of another question with the id {question.id} than "
                    f"{question.place or 'that of this run'}: a question was changed or moved. Measure again.",
                    field=_FIELD,
                )
        kept = [q for q in measured if self._min_passes <= self._rates[q.id].passes <= self._max_passes]
        logger.info(
            "%s: of %s training questions, %s were solved %d to %d times; %s have no pass rate.",
            _FIELD,
            f"{len(questions):,}",
            f"{len(kept):,}",
            self._min_passes,
            self._max_passes,
            f"{len(questions) - len(measured):,}",
        )
        return kept


def question_digest(question: Question) -> str:
    """Return the digest that says whether two questions with the same id are the same one."""
    return digest(question.text, question.choices, question.answers)[:16]


def _changes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return what differs of two values of `PassRates.measured_with`: the policy, the tokenizer, and fields of sampling."""
    sampling = [
        name
        for name in {**found["sampling"], **expected["sampling"]}
        if name not in _NOT_COMPARED and found["sampling"].get(name) != expected["sampling"].get(name)
    ]
    return [name for name in ("policy", "tokenizer") if found[name] != expected[name]] + sampling


def read_pass_rates(path: Path, field: str = _FIELD) -> PassRates:
    """Return the pass rates in a file.

    Args:
      path: the file.
      field: the config field or flag that names it, for errors.

    Raises: UserError, naming the file, the line and the reason.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{field}={path}: {reason}. {_SOURCE}", field=field) from None
    header = _parse(lines[0])
    if not all(isinstance(header.get(name), dict if name == "sampling" else str) for name in _HEADER):
        raise UserError(f"{field}: {path}:1 does not have {', '.join(_HEADER)} of pass rates. {_SOURCE}", field=field)
    rates = {}
    for number, line in enumerate(lines[1:], start=2):
        record = _parse(line)
        rate = PassRate(*map(record.get, PassRate._fields))  # pyright: ignore[reportArgumentType]
        if not (
            isinstance(record.get("id"), str)
            and isinstance(rate.question, str)
            and type(rate.passes) is type(rate.samples) is int
            and 0 <= rate.passes <= rate.samples
        ):
            raise UserError(
                f"{field}: {path}:{number} has no 'id' and {', '.join(map(repr, PassRate._fields))} of a question. {_SOURCE}",
                field=field,
            )
        rates[record["id"]] = rate
    return PassRates(measured_with={name: header[name] for name in _HEADER}, rates=rates)


def _parse(line: str) -> dict[str, Any]:
    """Return the JSON object of a line; {} if it has none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
