"""Questions from files: formats, fields, answers, options, and what is wrong with a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.errors import UserError
from rpt_jax.questions.files import check_question_files, read_question_files
from rpt_jax.questions.question import TEST, TRAIN, Question
from tests.helpers.corpora import json_lines, write_every_format

RECORDS = [
    {"problem": "What is $1 + 1$?", "solution": "2", "subject": "sums", "number": 17},
    {"problem": "Halve it: {x}\nx = 漢字", "solution": "\\frac{x}{2}", "subject": "halves", "number": 18},
    {"problem": "What is $2^3$?", "solution": "8", "subject": "powers", "number": 19},
]
FIELDS = {"question_field": "problem", "answer_field": "solution"}


def read(path: Path | str, **fields: Any) -> list[Question | Rejected]:
    items = read_question_files(QuestionsConfig(path=str(path), **fields))
    return [item if isinstance(item, Rejected) else item.question for item in items]


def read_records(folder: Path, *records: dict[str, Any], **fields: Any) -> list[Question | Rejected]:
    (folder / "questions.jsonl").write_bytes(json_lines(records))
    return read(folder / "questions.jsonl", **fields)


def reason(folder: Path, record: dict[str, Any], **fields: Any) -> str:
    """Return why a record is rejected, after checking that the file and the line are named."""
    _, item = read_records(
        folder, {"question": "?", "answer": "1", "options": ["1", "2"], "kind": "a", "id": 1}, record, **fields
    )
    assert isinstance(item, Rejected)
    assert (item.file, item.line) == (str(folder / "questions.jsonl"), 2)
    assert f"{folder / 'questions.jsonl'}:2 " in item.detail
    return item.reason


def test_every_format_holds_the_same_questions(tmp_path: Path):
    for file in write_every_format(tmp_path, RECORDS):
        questions = read(file, **FIELDS, category_field="subject", id_field="number")
        assert [(q.text, q.answers, q.category, q.id) for q in questions] == [
            (r["problem"], (r["solution"],), r["subject"], str(r["number"])) for r in RECORDS
        ], file


def test_a_table_of_text_holds_questions_with_options(tmp_path: Path):
    (tmp_path / "a.csv").write_text(
        'question,answer,options\nWhich?,B,"[""Mars"", ""Venus""]"\n"How\nmany?",3,"[""3"", ""4""]"\n'
    )
    first, second = read(tmp_path / "a.csv", choices_field="options")
    assert (first.text, first.answers, first.choices) == ("Which?", ("B",), ("Mars", "Venus"))
    assert (second.text, second.answers, second.choices) == ("How\nmany?", ("A",), ("3", "4"))


def test_a_question_without_an_id_is_named_by_its_file_and_line(tmp_path: Path):
    first, second, _ = read_records(tmp_path, *RECORDS, **FIELDS)
    assert (first.id, second.id) == ("questions.jsonl:1", "questions.jsonl:2")
    assert second.place == f"{tmp_path / 'questions.jsonl'}:2"


def test_a_template_joins_fields(tmp_path: Path):
    record = {"doc": {"context": "It is {red}."}, "question": "What color?", "answer": "red"}
    [question] = read_records(tmp_path, record, question_template="{doc.context} {question}")
    assert question.text == "It is {red}. What color?"


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({"answer": ["1/2", "0.5"]}, ("1/2", "0.5")),
        ({"answer": 18}, ("18",)),
        ({"answer": 0.25}, ("0.25",)),
        ({"answer": [1, "one"]}, ("1", "one")),
        ({"answer": "a", "other": ["b", "c"]}, ("a", "b", "c")),
        ({"answer": None, "other": "b"}, ("b",)),
    ],
)
def test_several_answers_are_accepted(tmp_path: Path, values: dict[str, Any], answers: tuple[str, ...]):
    fields = "answer, other" if "other" in values else "answer"
    [question] = read_records(tmp_path, {"question": "?", **values}, answer_field=fields)
    assert question.answers == answers


def test_a_number_that_is_no_index_is_the_text_of_an_option(tmp_path: Path):
    [question] = read_records(tmp_path, {"question": "?", "answer": 7, "options": [5, 7]}, choices_field="options")
    assert question.answers == ("B",)


@pytest.mark.parametrize("answer", ["C", "c", "(C)", "C.", "(C) comet", "comet", 2])
def test_the_answer_is_a_letter_a_text_or_a_number(tmp_path: Path, answer: str | int):
    record = {"question": "?", "answer": answer, "options": ["star", "planet", "comet"]}
    [question] = read_records(tmp_path, record, choices_field="options")
    assert (question.answers, question.choices) == (("C",), ("star", "planet", "comet"))


def test_a_saved_dataset_holds_options_as_a_list_of_strings(tmp_path: Path):
    """The published form of MMLU-Pro: parquet, with up to ten options and a letter."""
    options = [f"option {n}" for n in range(10)]
    columns = {
        "question_id": [70],
        "question": ["Which?"],
        "options": [options],
        "answer": ["J"],
        "answer_index": [9],
        "category": ["business"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "test-00000-of-00001.parquet")
    fields = {"choices_field": "options", "category_field": "category", "id_field": "question_id"}
    [by_letter] = read(tmp_path / "test-00000-of-00001.parquet", **fields)
    [by_number] = read(tmp_path / "test-00000-of-00001.parquet", answer_field="answer_index", **fields)
    assert (by_letter.answers, by_letter.choices, by_letter.category, by_letter.id) == (
        ("J",),
        tuple(options),
        "business",
        "70",
    )
    assert by_number == by_letter


def test_training_and_test_files_are_kept_apart(tmp_path: Path):
    (tmp_path / "a,b.jsonl").write_bytes(json_lines(RECORDS[:2]))
    (tmp_path / "c.jsonl").write_bytes(json_lines(RECORDS[2:]))
    config = QuestionsConfig(path=str(tmp_path / "a,b.jsonl"), test_path=str(tmp_path / "c.jsonl"), **FIELDS)
    assert [item.part for item in read_question_files(config)] == [TRAIN, TRAIN, TEST]


def test_several_files_are_read(tmp_path: Path):
    for name, record in zip("abc", RECORDS, strict=True):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([record]))
    several = read(f"{tmp_path / 'c.jsonl'}, {tmp_path / 'a.jsonl'}", **FIELDS)
    assert [question.text for question in several] == [RECORDS[2]["problem"], RECORDS[0]["problem"]]
    assert len(read(tmp_path / "*.jsonl", **FIELDS)) == len(read(tmp_path, **FIELDS)) == 3
    # More than a file name may have.
    assert len(read(",".join([str(tmp_path / "a.jsonl")] * 200), **FIELDS)) == 200


VALID = {"question": "?", "answer": "1", "options": ["1", "2"], "kind": "a", "id": 2}


@pytest.mark.parametrize(
    ("change", "fields", "expected"),
    [
        ({"question": None}, {}, "not a string"),
        ({"question": 3}, {}, "not a string"),
        ({"answer": None}, {}, "no answer"),
        ({"answer": []}, {}, "no answer"),
        ({"answer": True}, {}, "not a string"),
        ({"answer": {"a": 1}}, {}, "not a string"),
        ({"answer": float("nan")}, {}, "not a finite number"),
        ({"answer": 10**2000}, {}, "not a finite number"),
        ({"answer": "a", "options": ["a", float("inf")]}, {"choices_field": "options"}, "not a finite number"),
        ({"answer": "3"}, {"choices_field": "options"}, "answer not an option"),
        ({"answer": 3}, {"choices_field": "options"}, "answer not an option"),
        ({"answer": 1}, {"choices_field": "options"}, "ambiguous answer"),
        ({"answer": "b", "options": ["b", "a"]}, {"choices_field": "options"}, "ambiguous answer"),
        ({"answer": "1", "options": ["1", "1"]}, {"choices_field": "options"}, "ambiguous answer"),
        ({"answer": -1}, {"choices_field": "options"}, "answer not an option"),
        ({"options": []}, {"choices_field": "options"}, "no options"),
        ({"options": "1 or 2"}, {"choices_field": "options"}, "no options"),
        ({"options": None}, {"choices_field": "options"}, "no options"),
        ({"kind": " "}, {"category_field": "kind"}, "no category"),
        ({"kind": None}, {"category_field": "kind"}, "not a string"),
        ({"id": ""}, {"id_field": "id"}, "no id"),
    ],
)
def test_a_record_is_rejected_with_its_file_line_and_reason(
    tmp_path: Path, change: dict[str, Any], fields: dict[str, str], expected: str
):
    assert reason(tmp_path, VALID | change, **fields) == expected


@pytest.mark.parametrize("field", ["question_field", "answer_field", "choices_field", "category_field", "id_field"])
def test_a_field_that_does_not_exist_is_named(tmp_path: Path, field: str):
    [item] = read_records(tmp_path, VALID, **{field: "missing"})
    assert item.reason == "no such field"
    assert f"questions.{field}='missing'" in item.detail


def test_a_line_that_is_not_json_is_rejected(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"question": "?", "answer": "1"}\nnot JSON\n[1]\n')
    assert [getattr(item, "reason", "") for item in read(tmp_path / "a.jsonl")] == ["", "not JSON", "not a JSON object"]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda folder: {}, "questions.path"),
        (lambda folder: {"path": str(folder / "missing.jsonl")}, "questions.path"),
        (lambda folder: {"path": str(folder / "empty.jsonl")}, "questions.path"),
        (lambda folder: {"path": f"{folder / 'ok.jsonl'},"}, "questions.path"),
        (lambda folder: {"path": str(folder / "damaged")}, "questions.path"),
        (
            lambda folder: {"path": str(folder / "ok.jsonl"), "test_path": str(folder / "x.jsonl")},
            "questions.test_path",
        ),
        (lambda folder: {"path": str(folder / "ok.jsonl"), "question_template": "?"}, "questions.question_template"),
    ],
)
def test_missing_and_empty_files_are_refused_before_anything_is_read(tmp_path: Path, make: Any, field: str):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "damaged").mkdir()
    for name in ("data.arrow", "state.json"):
        (tmp_path / "damaged" / name).write_text("{")
    (tmp_path / "ok.jsonl").write_bytes(json_lines([VALID]))
    with pytest.raises(UserError) as raised:
        check_question_files(QuestionsConfig(**make(tmp_path)))
    assert raised.value.field == field


def test_plain_text_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("What is 1 + 1?\n")
    with pytest.raises(UserError) as raised:
        read(tmp_path / "a.txt")
    assert raised.value.field == "questions.path"


def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 this is not compressed")
    with pytest.raises(UserError) as raised:
        read(tmp_path / "a.jsonl.gz")
    assert raised.value.field == "questions.path" and "a.jsonl.gz:1" in str(raised.value)
