"""Which questions are rejected, trained on and tested with."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.questions.loading import QuestionSets, load_questions
from rpt_jax.questions.question import Question
from tests.helpers.corpora import json_lines

RECORDS = [{"question": f"What is {a} plus {b}?", "answer": a + b} for a in range(10) for b in range(10)]


def write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_bytes(json_lines(records))
    return str(path)


def load(folder: Path, records: Sequence[dict[str, Any]] = RECORDS, **fields: Any) -> QuestionSets:
    fields = {"test_questions": 20} | fields
    return load_questions(QuestionsConfig(path=write(folder / "questions.jsonl", records), **fields))


def texts(questions: Sequence[Question]) -> set[str]:
    return {question.text for question in questions}


def refused(folder: Path, records: Sequence[dict[str, Any]] = RECORDS, **fields: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        load(folder, records, **fields)
    return raised.value


def test_test_questions_are_held_out(tmp_path: Path):
    sets = load(tmp_path)
    assert (len(sets.train), len(sets.test)) == (80, 20)
    assert texts(sets.train) | texts(sets.test) == {record["question"] for record in RECORDS}
    assert sets.rejected == {}


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_lines(tmp_path: Path):
    first = load(tmp_path, train_questions=30)
    again = load(tmp_path, random.Random(0).sample(RECORDS, len(RECORDS)), train_questions=30)
    other = load(tmp_path, train_questions=30, seed=1)
    assert [question.text for question in first.train] == [question.text for question in again.train]
    assert [question.text for question in first.test] == [question.text for question in again.test]
    assert texts(first.train) != texts(other.train) and texts(first.test) != texts(other.test)


def test_the_same_text_is_on_one_side_only(tmp_path: Path):
    repeated = [
        {"question": f"  {record['question'].upper()}\n", "answer": record["answer"]} for record in RECORDS[:50]
    ]
    sets = load(tmp_path, RECORDS + repeated)
    assert (len(sets.train), len(sets.test), sets.rejected) == (80, 20, {"repeated question": 50})
    normal = [{" ".join(text.lower().split()) for text in texts(side)} for side in (sets.train, sets.test)]
    assert not normal[0] & normal[1]


def test_a_training_question_that_is_also_in_the_test_part_is_not_trained_on(tmp_path: Path):
    test_path = write(tmp_path / "test.jsonl", RECORDS[:40])
    sets = load(tmp_path, RECORDS, test_path=test_path, test_questions=10)
    test_texts = {record["question"] for record in RECORDS[:40]}
    assert texts(sets.test) <= test_texts and len(sets.test) == 10
    assert not texts(sets.train) & test_texts and len(sets.train) == 60
    assert sets.rejected == {"repeated question": 40}
    assert len(load(tmp_path, RECORDS, test_path=test_path, test_questions=0).test) == 40


def test_questions_with_other_options_are_different(tmp_path: Path):
    records = [{"question": "Which is true?", "answer": "A", "options": [f"{n}", f"{n + 1}"]} for n in range(8)]
    sets = load(tmp_path, records, choices_field="options", test_questions=4)
    assert (len(sets.train), len(sets.test), sets.rejected) == (4, 4, {})


def test_near_duplicates_are_reported(tmp_path: Path):
    story = "A farmer has a red barn with many brown cows and he sells every one of them at the market of the next town in May"
    train = [{"question": f"{story}. How many of them are left?", "answer": 1}, *RECORDS[:9]]
    test = [
        {"question": f"{story}. How many of them remain?", "answer": 1},
        {"question": "What color is the sky?", "answer": 1},
    ]
    sets = load(tmp_path, train, test_path=write(tmp_path / "test.jsonl", test), test_questions=2)
    [(of_test, of_train)] = sets.near_duplicates
    assert (of_test.text, of_train.text) == (test[0]["question"], train[0]["question"])


def test_questions_of_other_difficulty_are_not_trained_on_but_tested_with(tmp_path: Path):
    config = QuestionsConfig(path=write(tmp_path / "a.jsonl", RECORDS), test_questions=20)
    sets = load_questions(config, choose=lambda questions: [q for q in questions if q.answers == ("9",)])
    assert {question.answers for question in sets.train} == {("9",)}
    assert len({question.answers for question in sets.test}) > 1


def test_files_of_test_questions_alone_are_enough_to_evaluate(tmp_path: Path):
    config = QuestionsConfig(test_path=write(tmp_path / "test.jsonl", RECORDS), test_questions=0, train_questions=9)
    sets = load_questions(config, for_training=False)
    assert (len(sets.train), len(sets.test)) == (0, 100)
    with pytest.raises(UserError) as raised:
        load_questions(config)
    assert raised.value.field == "questions.train_questions"


@pytest.mark.parametrize(
    ("record", "fields", "reason"),
    [
        ({"question": " \n", "answer": 1}, {}, "empty question"),
        ({"question": "?", "answer": " "}, {}, "no answer"),
        ({"question": "?", "answer": ["1", ""]}, {}, "no answer"),
        ({"question": "? \ud800", "answer": "1"}, {}, "unpaired surrogate"),
        ({"question": "?", "answer": "A", "options": ["1"]}, {"choices_field": "options"}, "number of options"),
        ({"question": "?", "answer": "A", "options": ["1", " "]}, {"choices_field": "options"}, "empty option"),
        ({"question": "?", "answer": "A", "options": ["1"] * 27}, {"choices_field": "options"}, "number of options"),
        ({"question": "?", "answer": "1", "id": "7"}, {"id_field": "id"}, "duplicate id"),
    ],
)
def test_a_question_that_cannot_be_used_is_counted_and_listed(
    tmp_path: Path, record: dict[str, Any], fields: dict[str, str], reason: str
):
    valid = [record | {"id": n, "options": ["1", "2"], "answer": "1"} for n, record in enumerate(RECORDS)]
    config = QuestionsConfig(path=write(tmp_path / "a.jsonl", [*valid, record]), test_questions=20, **fields)
    sets = load_questions(config, listing=tmp_path / "rejected.jsonl")
    assert sets.rejected == {reason: 1}
    [listed] = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (listed["line"], listed["reason"]) == (101, reason)
    assert f"{tmp_path / 'a.jsonl'}:101 " in listed["detail"]


def test_a_repeated_question_is_listed_with_the_one_that_is_used(tmp_path: Path):
    training = write(tmp_path / "a.jsonl", [*RECORDS[:30], RECORDS[0]])
    test = write(tmp_path / "test.jsonl", RECORDS[:1] + RECORDS[30:])
    config = QuestionsConfig(path=training, test_path=test, strict=True)
    load_questions(dataclasses.replace(config, test_questions=20), listing=tmp_path / "rejected.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {(line["file"], line["line"], line["reason"]) for line in listed} == {
        (training, 1, "repeated question"),
        (training, 31, "repeated question"),
    }
    assert listed[-1]["detail"].endswith(f"{test}:1.")


def test_a_question_whose_answer_cannot_be_verified_is_rejected(tmp_path: Path):
    config = QuestionsConfig(path=write(tmp_path / "a.jsonl", RECORDS), test_questions=20)
    sets = load_questions(config, lambda question: "is odd." if int(question.answers[0]) % 2 else "")
    assert sets.rejected == {"answer cannot be verified": 50}
    assert len(sets.train) == 30


def test_the_first_rejected_question_ends_a_strict_run(tmp_path: Path):
    error = refused(tmp_path, [*RECORDS, {"question": "", "answer": 1}], strict=True)
    assert error.field == "questions.strict" and "questions.jsonl:101" in str(error)


@pytest.mark.parametrize(
    ("records", "fields", "field"),
    [
        (RECORDS, {"test_questions": 51}, "questions.test_questions"),
        (RECORDS, {"test_questions": 0}, "questions.test_questions"),
        (RECORDS, {"train_questions": 81}, "questions.train_questions"),
        (RECORDS[:1], {"test_questions": 1}, "questions.test_questions"),
        ([{"question": "?", "answer": None}], {}, "questions.path"),
    ],
)
def test_too_few_questions_are_refused(
    tmp_path: Path, records: list[dict[str, Any]], fields: dict[str, Any], field: str
):
    assert refused(tmp_path, records, **fields).field == field


def test_more_test_questions_than_there_are_is_refused(tmp_path: Path):
    error = refused(tmp_path, test_path=write(tmp_path / "test.jsonl", RECORDS[:5]), test_questions=6)
    assert error.field == "questions.test_questions"
