"""Question sources "mmlu_pro" and "super_gpqa": the files of these sets as they are published, named by `questions.path`.

MMLU-Pro (arXiv 2406.01574) is published as parquet files, `test-*.parquet` and `validation-*.parquet`, and SuperGPQA (arXiv
2502.14739) as one file, `SuperGPQA-all.jsonl`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.corpus.files import check_patterns, list_file_ranges
from rpt_jax.corpus.mixture import split_paths
from rpt_jax.corpus.readers import line_in_file, parse_file_range
from rpt_jax.corpus.records import InvalidRecordError, RecordParser, find_field, text_of_value
from rpt_jax.errors import UserError
from rpt_jax.questions.files import MAX_QUESTION_BYTES
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.registry import QUESTION_SOURCES

_FIELD = "questions.path"
_MMLU_PRO_FIELDS = ("question_id", "question", "options", "answer", "answer_index", "category")
_SUPER_GPQA_FIELDS = (
    "uuid",
    "question",
    "options",
    "answer",
    "answer_letter",
    "discipline",
    "field",
    "subfield",
    "difficulty",
    "is_calculation",
)


def check_published_files(config: QuestionsConfig) -> None:
    """Check that `questions.path` names files that exist. Raises: UserError."""
    if not config.path.strip():
        raise UserError(
            f"questions.path is empty: questions.source='{config.source}' needs the published files of the set, or their folder.",
            field=_FIELD,
        )
    check_patterns(split_paths(config.path, _FIELD), _FIELD)


@QUESTION_SOURCES.register("mmlu_pro", check=check_published_files, fields=("path",))
def read_mmlu_pro(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read MMLU-Pro: 12,032 test questions in 14 categories, and for training the 70 of `validation-*.parquet`."""
    yield from _read(config, _MMLU_PRO_FIELDS, _mmlu_pro)


def _mmlu_pro(record: Mapping[str, Any]) -> dict[str, Any]:
    letter = _text(record, "answer")
    index = find_field(record, "answer_index", _FIELD)
    if letter != string.ascii_uppercase[index]:
        raise InvalidRecordError("answer not an option", f"has the answer '{letter}', but the answer_index {index}.")
    return {
        "id": f"mmlu_pro:{find_field(record, 'question_id', _FIELD)}",
        "text": _text(record, "question"),
        "answers": (letter,),
        "choices": _options(record),
        "category": _text(record, "category"),
    }


@QUESTION_SOURCES.register("super_gpqa", check=check_published_files, fields=("path",))
def read_super_gpqa(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read SuperGPQA: 26,529 test questions in 13 disciplines."""
    yield from _read(config, _SUPER_GPQA_FIELDS, _super_gpqa)


def _super_gpqa(record: Mapping[str, Any]) -> dict[str, Any]:
    letter = _text(record, "answer_letter")
    options = _options(record)
    index = string.ascii_uppercase.find(letter)
    if not 0 <= index < len(options) or options[index] != _text(record, "answer"):
        raise InvalidRecordError(
            "answer not an option", f"has the answer_letter '{letter}', which is not the option that its answer says."
        )
    return {
        "id": f"super_gpqa:{_text(record, 'uuid')}",
        "text": _text(record, "question"),
        "answers": (letter,),
        "choices": options,
        "category": _text(record, "discipline"),
        "data": {name: record.get(name) for name in ("field", "subfield", "difficulty", "is_calculation")},
    }


# --- what the two have in common ----------------------------------------------------------------------


def _read(
    config: QuestionsConfig, fields: tuple[str, ...], values: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Iterator[SourceQuestion | Rejected]:
    """Yield the questions of the files that `questions.path` names.

    Args:
      config: section `questions`.
      fields: of a record that are read.
      values: returns the attributes of the question that a record holds, but for its place.

    Raises: UserError, if a file cannot be read.
    """
    check_published_files(config)
    parser = RecordParser(fields, lambda record: record, MAX_QUESTION_BYTES)

    def parse(record: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return values(record)
        except (TypeError, IndexError, AttributeError) as error:
            raise InvalidRecordError("unknown form", f"has another form than the published one ({error}).") from None

    for file_range in list_file_ranges(split_paths(config.path, _FIELD), config.path, _FIELD):
        part = TRAIN if file_range.path.name.startswith("validation") else TEST
        with_path = file_range._replace(name=str(file_range.path))  # Rejected records are listed with the whole path.
        for item in parse_file_range(with_path, parser, parse, _FIELD):
            if isinstance(item, Rejected):
                yield item
                continue
            location, attributes = item
            place = f"{file_range.path}:{line_in_file(file_range, location)}"
            yield SourceQuestion(Question(**attributes, place=place), part)


def _text(record: Mapping[str, Any], field: str) -> str:
    """Return a text that is not empty. Raises: InvalidRecordError."""
    text = text_of_value(find_field(record, field, _FIELD), field)
    if not text.strip():
        raise InvalidRecordError(f"no {field}", f"has nothing in its field '{field}'.")
    return text


def _options(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts of the options. Raises: InvalidRecordError."""
    options = find_field(record, "options", _FIELD)
    if not isinstance(options, list) or not options:
        raise InvalidRecordError("no options", "has no list of options in its field 'options'.")
    return tuple(text_of_value(option, "options") for option in options)
