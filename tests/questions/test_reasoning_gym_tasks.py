"""Questions of reasoning-gym: the same in every process, and scored by their own tasks without executing an answer."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.errors import UserError
from rpt_jax.questions.question import Question
from rpt_jax.questions.reasoning_gym_tasks import (
    ReasoningGymOptions,
    check_tasks,
    generate_reasoning_gym,
    is_plain_formula,
    score_entry,
)

FORMULA_TASKS = (
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
)
LITERAL_TASKS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
TASKS = (*FORMULA_TASKS, *LITERAL_TASKS, "rubiks_cube")


def config(seed: int = 5, **options: Any) -> QuestionsConfig:
    return QuestionsConfig(source="reasoning_gym", seed=seed, source_options=ReasoningGymOptions(**options))


def generate(**options: Any) -> list[Question]:
    return [item.question for item in generate_reasoning_gym(config(**options))]


@pytest.fixture(scope="module")
def entries() -> dict[str, Question]:
    """A question of each of the tasks above; generating takes a process."""
    questions = generate(task=",".join(TASKS), size=4)
    return {question.data["task"]: question for question in questions if "Integral(" not in "".join(question.answers)}


def test_several_tasks_are_categories_and_have_the_same_parameters():
    questions = generate(task="chain_sum, decimal_chain_sum", size=2, parameters='{"min_terms": 9, "max_terms": 9}')
    assert [question.category for question in questions] == ["chain_sum"] * 2 + ["decimal_chain_sum"] * 2
    assert len(questions[0].data["entry"]["metadata"]["expression"].split()) == 17


def test_the_task_scores_an_answer(entries: dict[str, Question]):
    question = entries["countdown"]
    numbers = question.data["entry"]["metadata"]["numbers"]
    assert score_entry(question.answers[0], question.data) == 1.0
    assert 0 < score_entry(" + ".join(map(str, numbers)), question.data) < 1.0, "another value of the same numbers"


def test_an_answer_is_scored_by_a_task_without_a_reference_answer(entries: dict[str, Question]):
    question = entries["rubiks_cube"]
    assert question.answers == ()
    assert score_entry(question.data["entry"]["metadata"]["example_correct_answer"], question.data) == 1.0
    assert score_entry("R", question.data) < 1.0


@pytest.mark.parametrize("task", FORMULA_TASKS + LITERAL_TASKS)
def test_no_answer_is_executed(tmp_path: Path, entries: dict[str, Question], task: str):
    question = entries[task]
    answer = f"__import__('pathlib').Path('{tmp_path / 'executed'}').touch()"
    assert score_entry(answer, question.data) < 0.5
    assert score_entry(f"[{answer}]", question.data) < 0.5
    assert not list(tmp_path.iterdir())
    assert score_entry(question.answers[0], question.data) == 1.0, "its own answer is still correct"


def test_a_list_of_letters_is_read_as_a_literal(entries: dict[str, Question]):
    """The task gives a tenth of the score for the right letters as a Python list."""
    question = entries["string_insertion"]
    assert score_entry(repr(list(question.answers[0])), question.data) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "text", ["94*4 - 61 - 6", "-34*x**8/15 - 5*x/4 + C", "sqrt(2)*exp(x)*sin(3*x)", "0.5 + .25", ""]
)
def test_formulas_are_read(text: str):
    assert is_plain_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "eval(x)",
        "x.y",
        "(1).y",
        "x .y",
        "x. y",
        "__x__",
        "lambda: 1",
        "[1]",
        "{1}",
        "1 if 2 else 3",
        "x; y",
        "x = 1",
        "x @ y",
        "𝐞𝐯𝐚𝐥(x)",
        "exec(chr(112))",
        "1__class__",
    ],
)
def test_what_could_be_executed_is_not_a_formula(text: str):
    assert not is_plain_formula(text)


def test_every_scorer_that_evaluates_answers_is_known():
    """Of the scorers of reasoning-gym that call `eval` and the like, only those above are given an answer of a policy."""
    from reasoning_gym.factory import DATASETS

    others = {"number_sorting", "bitwise_arithmetic"}  # They evaluate the reference answer, and the problem.
    evaluating = set()
    for task, (dataset, _) in DATASETS.items():
        scorer = ast.parse(textwrap.dedent(inspect.getsource(dataset.score_answer)))
        names = {node.id for node in ast.walk(scorer) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(scorer) if isinstance(node, ast.Attribute)}
        if names & {"eval", "exec", "parse_expr", "sympify"}:
            evaluating.add(task)
    assert evaluating - others == {*FORMULA_TASKS, *LITERAL_TASKS}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"task": "chain_sums"}, "questions.source_options.task"),
        ({"parameters": "max_terms=3"}, "questions.source_options.parameters"),
        ({"parameters": "[1]"}, "questions.source_options.parameters"),
        ({"parameters": '{"max_term": 3}'}, "questions.source_options.parameters"),
        ({"parameters": '{"min_terms": 5, "max_terms": 3}'}, "questions.source_options.parameters"),
        ({"parameters": '{"seed": 3}'}, "questions.source_options.parameters"),
        ({"size": 0}, "questions.source_options.size"),
    ],
)
def test_a_task_or_a_setting_that_does_not_exist_is_refused(options: dict[str, Any], field: str):
    with pytest.raises(UserError) as raised:
        check_tasks(config(**options))
    assert raised.value.field == field


def test_a_mixture_of_tasks_is_refused_as_a_task():
    with pytest.raises(UserError) as raised:
        check_tasks(config(task="composite"))
    assert raised.value.field == "questions.source_options.task"
