"""MMLU-Pro and SuperGPQA, from files of the form in which they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TEST, TRAIN
from rpt_jax.registry import QUESTION_SOURCES

MMLU_PRO = {
    "question_id": 70,
    "question": "Which of these is a prime number?",
    "options": ["8", "9", "10", "11", "12", "14", "15", "16", "18", "20"],
    "answer": "D",
    "answer_index": 3,
    "cot_content": "",
    "category": "math",
    "src": "ori_mmlu-elementary_mathematics",
}
SUPER_GPQA = {
    "uuid": "001b51d076b14b2e9c8ab7aa2b1a0ff5",
    "question": "Which gas has the lowest boiling point?",
    "options": ["Oxygen", "Nitrogen", "Helium", "Argon"],
    "answer": "Helium",
    "answer_letter": "C",
    "discipline": "Science",
    "field": "Physics",
    "subfield": "Thermodynamics",
    "difficulty": "easy",
    "is_calculation": False,
}


def write_mmlu_pro(folder: Path, **changes: Any) -> Path:
    """Write both files of the set, the first test question with some fields changed; return their folder."""
    schema = pa.schema(
        [
            ("question_id", pa.int64()),
            ("question", pa.string()),
            ("options", pa.list_(pa.string())),
            ("answer", pa.string()),
            ("answer_index", pa.int64()),
            ("cot_content", pa.string()),
            ("category", pa.string()),
            ("src", pa.string()),
        ]
    )
    test = [MMLU_PRO | changes, MMLU_PRO | {"question_id": 71, "answer": "A", "answer_index": 0}]
    validation = [MMLU_PRO | {"question_id": 0, "cot_content": "A: Let's think step by step."}]
    for name, rows in (("test", test), ("validation", validation)):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}-00000-of-00001.parquet")
    return folder


def write_super_gpqa(folder: Path, **changes: Any) -> Path:
    """Write the file of the set, its second question with some fields changed; return it."""
    path = folder / "SuperGPQA-all.jsonl"
    rows = [SUPER_GPQA, SUPER_GPQA | {"uuid": "f" * 32} | changes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source: str, path: Path) -> tuple[list[Any], list[Rejected]]:
    items = list(QUESTION_SOURCES[source].function(QuestionsConfig(source=source, path=str(path))))
    return [i for i in items if not isinstance(i, Rejected)], [i for i in items if isinstance(i, Rejected)]


def test_mmlu_pro_is_read_with_its_categories_and_its_parts(tmp_path: Path):
    questions, rejected = read("mmlu_pro", write_mmlu_pro(tmp_path))
    assert not rejected
    assert {(item.question.id, item.part) for item in questions} == {
        ("mmlu_pro:70", TEST),
        ("mmlu_pro:71", TEST),
        ("mmlu_pro:0", TRAIN),
    }
    question = next(item.question for item in questions if item.question.id == "mmlu_pro:70")
    assert question.choices == tuple(MMLU_PRO["options"]) and question.answers == ("D",)
    assert question.category == "math" and question.place.endswith("test-00000-of-00001.parquet:1")


def test_super_gpqa_is_read_by_discipline(tmp_path: Path):
    questions, rejected = read("super_gpqa", write_super_gpqa(tmp_path))
    assert not rejected and [item.part for item in questions] == [TEST, TEST]
    question = questions[0].question
    assert question.answers == ("C",) and question.category == "Science" and len(question.choices) == 4
    assert question.data["difficulty"] == "easy" and question.data["subfield"] == "Thermodynamics"
    assert questions[1].question.place.endswith("SuperGPQA-all.jsonl:2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": []}, "no options"),
        ({"options": None}, "no options"),
        ({"category": ""}, "no category"),
        ({"answer": "E"}, "answer not an option"),
        ({"answer_index": None}, "unknown form"),
        ({"question": " "}, "no question"),
    ],
)
def test_damaged_questions_of_mmlu_pro_are_rejected_with_their_place(changes, reason, tmp_path: Path):
    questions, rejected = read("mmlu_pro", write_mmlu_pro(tmp_path, **changes))
    assert len(questions) == 2 and [r.reason for r in rejected] == [reason]
    assert rejected[0].detail.startswith(f"{tmp_path / 'test-00000-of-00001.parquet'}:1 ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": ["Oxygen"]}, "answer not an option"),
        ({"answer_letter": "A"}, "answer not an option"),
        ({"answer_letter": "Q"}, "answer not an option"),
        ({"options": "Oxygen"}, "no options"),
        ({"discipline": ""}, "no discipline"),
        ({"options": [1, 2, 3, 4]}, "not a string"),
    ],
)
def test_damaged_questions_of_super_gpqa_are_rejected_with_their_place(changes, reason, tmp_path: Path):
    questions, rejected = read("super_gpqa", write_super_gpqa(tmp_path, **changes))
    assert len(questions) == 1 and [r.reason for r in rejected] == [reason]
    assert rejected[0].line == 2


@pytest.mark.parametrize("source", ["mmlu_pro", "super_gpqa"])
@pytest.mark.parametrize("path", ["", "missing.parquet"])
def test_missing_files_are_reported(source, path):
    with pytest.raises(UserError) as raised:
        QUESTION_SOURCES[source].requirements.check(QuestionsConfig(source=source, path=path))
    assert raised.value.field == "questions.path"
