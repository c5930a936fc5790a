"""Question source "worked_solutions": the last result of a worked solution."""

from __future__ import annotations

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Document
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TRAIN, SourceQuestion
from rpt_jax.questions.worked_solutions import WorkedSolutionOptions, ask_for_last_result, generate_worked_solutions


@pytest.fixture(scope="module")
def questions() -> list[SourceQuestion]:
    options = WorkedSolutionOptions(documents=60, test_documents=30, held_out_templates=3)
    return list(generate_worked_solutions(QuestionsConfig(source_options=options)))


@pytest.mark.parametrize(
    ("solution", "asked", "answer"),
    [
        ("2 + 3 = 5\nSo 5 * 4 = $20 in all.", "2 + 3 = 5\nSo 5 * 4 = $", "20"),
        ("x=138/2=69", "x=138/2=", "69"),
        ("1 / 3 = 0.33", None, None),  # No whole number.
        ("1/2 = 3/6", None, None),
        ("No calculation 5", None, None),
    ],
)
def test_the_question_ends_before_the_last_result(solution: str, asked: str | None, answer: str | None) -> None:
    question = ask_for_last_result(Document(text=f"Problem?\n{solution}", name="d", split=0))
    if asked is None:
        assert question is None
    else:
        assert question and question.text == f"Problem?\n{asked}" and question.answers == (answer,)


def test_training_questions_have_no_held_out_template(questions: list[SourceQuestion]) -> None:
    texts = [item.question.text for item in questions]
    assert len(set(texts)) == len(texts) > 60
    template = {item.question.id: item.question.id.split(":")[1] for item in questions}
    unseen = {template[item.question.id] for item in questions if item.question.category == "unseen templates"}
    others = {template[item.question.id] for item in questions if item.question.category == "seen templates"}
    assert len(unseen) == 3 and not unseen & others
    assert all(item.question.category == "seen templates" for item in questions if item.part == TRAIN)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError) as raised:
        WorkedSolutionOptions(documents=0)
    assert raised.value.field == "questions.source_options.documents"
    options = WorkedSolutionOptions(held_out_templates=500)
    with pytest.raises(
        UserError, match=r"questions\.source_options\.held_out_templates=500 leaves no template"
    ) as raised:
        list(generate_worked_solutions(QuestionsConfig(source_options=options)))
    assert raised.value.field == "questions.source_options.held_out_templates"
