"""Question source "path": files of records, in the formats and compressions that a corpus may have."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping
from typing import Any

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.corpus.files import FileRange, check_patterns, list_file_ranges
from rpt_jax.corpus.folders import file_format
from rpt_jax.corpus.mixture import split_paths
from rpt_jax.corpus.readers import line_in_file, name_prefix, parse_file_range
from rpt_jax.corpus.records import InvalidRecordError, RecordParser, fill, find_field, placeholders, text_of_value
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.questions.text import read_letter
from rpt_jax.registry import QUESTION_SOURCES

MAX_QUESTION_BYTES = 2**20


def check_question_files(config: QuestionsConfig) -> None:
    """Check that the files exist, and the fields that say what a question is, without reading any. Raises: UserError."""
    if config.question_template and not placeholders(config.question_template):
        raise UserError(
            f"questions.question_template={config.question_template!r} has no field in braces, so that all questions would be "
            "equal: write, e.g., '{context}\\n{question}'.",
            field="questions.question_template",
        )
    for field, patterns in _patterns(config).items():
        check_patterns(patterns, field)


@QUESTION_SOURCES.register(
    "path",
    check=check_question_files,
    fields=(
        "path",
        "test_path",
        "question_field",
        "question_template",
        "answer_field",
        "id_field",
        "category_field",
        "choices_field",
    ),
)
def read_question_files(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read the questions of the files that `questions.path` and `questions.test_path` name."""
    for field, patterns in _patterns(config).items():
        if field == "questions.test_path":
            part = TEST
        else:
            part = TRAIN if config.test_path else ""
        for file_range in list_file_ranges(patterns, getattr(config, field.partition(".")[2]), field):
            for item in read_question_file(file_range, config, field):
                yield item if isinstance(item, Rejected) else SourceQuestion(item, part)


def read_question_file(file_range: FileRange, config: QuestionsConfig, field: str) -> Iterator[Question | Rejected]:
    """Yield the questions and rejected records of a file range.

    Args:
      file_range: the range.
      config: the fields of a record.
      field: the config field that names the file, for messages.

    Raises: UserError, naming the file, the line and the reason, if the file cannot be read to its end.
    """
    if file_format(file_range.path) == ".txt":
        raise UserError(
            f"{field}: {file_range.path} is plain text, and questions are records with fields: give a .jsonl, .json, .csv, .tsv, "
            ".parquet, .arrow or .array_record file.",
            field=field,
        )
    parser = RecordParser(_record_fields(config), lambda record: record, MAX_QUESTION_BYTES)
    with_path = file_range._replace(name=str(file_range.path))  # Rejected records are listed with the whole path.
    for item in parse_file_range(with_path, parser, lambda record: question_values(record, config), field):
        if isinstance(item, Rejected):
            yield item
            continue
        location, values = item
        values["id"] = values["id"] or f"{name_prefix(file_range)}:{location}"
        yield Question(**values, place=f"{file_range.path}:{line_in_file(file_range, location)}")


def question_values(record: Any, config: QuestionsConfig) -> dict[str, Any]:
    """Return the attributes of the question that a record holds; its `id` is "" if no field has it.

    Args:
      record: values by field name.
      config: names the fields.

    Raises: InvalidRecordError, if a field is missing or has a value of another type.
    """
    if not isinstance(record, Mapping):
        raise InvalidRecordError("not a JSON object", f"is a JSON {type(record).__name__}: expected an object.")

    def text_of(field: str, option: str) -> str:
        return text_of_value(find_field(record, field, f"questions.{option}"), field)

    if config.question_template:
        fields = placeholders(config.question_template)
        text = fill(config.question_template, {field: text_of(field, "question_template") for field in fields})
    else:
        text = text_of(config.question_field, "question_field")
    choices = ()
    if config.choices_field:
        choices = _choices(find_field(record, config.choices_field, "questions.choices_field"), config.choices_field)
    return {
        "id": _label(record, config.id_field, "id_field"),
        "text": text,
        "answers": tuple(_answers(record, config, choices)),
        "choices": choices,
        "category": _label(record, config.category_field, "category_field"),
    }


def _patterns(config: QuestionsConfig) -> dict[str, list[str]]:
    """Return the paths that each field names. Raises: UserError, if both fields are empty."""
    if not (config.path.strip() or config.test_path.strip()):
        raise UserError(
            "questions.path is empty: questions.source='path' needs a file of records, a folder of them, or a glob.",
            field="questions.path",
        )
    given = {"questions.path": config.path, "questions.test_path": config.test_path}
    return {field: split_paths(path, field) for field, path in given.items() if path}


def _record_fields(config: QuestionsConfig) -> list[str]:
    text_fields = placeholders(config.question_template) or [config.question_field]
    others = (*_answer_fields(config), config.id_field, config.category_field, config.choices_field)
    return [*text_fields, *(field for field in others if field)]


def _answer_fields(config: QuestionsConfig) -> list[str]:
    return [field.strip() for field in config.answer_field.split(",")]


def _label(record: Mapping[str, Any], field: str, option: str) -> str:
    """Return the value of a field that identifies or groups questions; "" if no field is named. Raises: InvalidRecordError."""
    if not field:
        return ""
    value = find_field(record, field, f"questions.{option}")
    label = _scalar_text(value, field).strip()
    if not label:
        what = "category" if option == "category_field" else "id"
        raise InvalidRecordError(f"no {what}", f"has nothing in its field '{field}' of questions.{option}.")
    return label


def _answers(record: Mapping[str, Any], config: QuestionsConfig, choices: tuple[str, ...]) -> Iterator[str]:
    """Yield the accepted answers. Raises: InvalidRecordError, if there is none."""
    found = False
    for field in _answer_fields(config):
        value = find_field(record, field, "questions.answer_field")
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            found = True
            yield _letter(item, field, choices) if choices else _scalar_text(item, field)
    if not found:
        raise InvalidRecordError("no answer", f"has no answer in its field '{config.answer_field}'.")


def _letter(value: Any, field: str, choices: tuple[str, ...]) -> str:
    """Return the letter of the option that an answer names by letter (`B`, `(B)`, `B: text`), text or number from 0.

    Raises: InvalidRecordError, if it names none, or one by its text and another by its letter or number.
    """
    letters = string.ascii_uppercase[: len(choices)]
    text = _scalar_text(value, field).strip()
    named = {letter for letter, choice in zip(letters, choices, strict=False) if choice.strip() == text}
    if isinstance(value, int) and not isinstance(value, bool):
        named |= set(letters[value : value + 1]) if value >= 0 else set()
    elif letter := read_letter(text, choices):
        named.add(letter)
    if len(named) == 1:
        return named.pop()
    if named:
        raise InvalidRecordError(
            "ambiguous answer",
            f"has the answer {value!r} in its field '{field}', which may name the options {', '.join(sorted(named))}: it is the "
            "text of one, and the letter or number of another. Give the letter or number of the right option, and options that "
            "do not look like one.",
        )
    raise InvalidRecordError(
        "answer not an option",
        f"has the answer {value!r} in its field '{field}', which is none of the {len(choices)} options: expected a letter, the "
        "text of an option or its number from 0.",
    )


def _choices(value: Any, field: str) -> tuple[str, ...]:
    """Return the texts of the options. Raises: InvalidRecordError."""
    if isinstance(value, str | bytes):
        # A table of text holds the list as JSON.
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, list) or not value:
        raise InvalidRecordError("no options", f"has no list of options in its field '{field}'.")
    return tuple(_scalar_text(item, field) for item in value)


def _scalar_text(value: Any, field: str) -> str:
    """Return a string or a finite number as text. Raises: InvalidRecordError, for other values."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRecordError("not a finite number", f"has {value!r} in its field '{field}'.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, list | Mapping):
        raise InvalidRecordError("not a string", f"has a {type(value).__name__} in its field '{field}'.")
    return text_of_value(value, field)
