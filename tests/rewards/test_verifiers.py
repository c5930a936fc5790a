"""Verifiers: which answers they accept. The right values are plain mathematics, or what the question says."""

from __future__ import annotations

import pytest

from rpt_jax.questions.question import Question
from rpt_jax.registry import VERIFIERS
from rpt_jax.rewards.verifiers import why_unreadable
from tests.helpers.adversarial_answers import ODD_ANSWERS


def question(*answers: str, choices: tuple[str, ...] = (), **attributes: object) -> Question:
    return Question(id="q", text="?", answers=answers, choices=choices, **attributes)


def accepts(verifier: str, answer: str, asked: Question) -> bool:
    score = VERIFIERS[verifier].function(answer, asked)
    assert isinstance(score, float)
    return score == 1.0


# An accepted answer, an answer, and whether they are the same in mathematics.
EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("1,000", "1000"),
    (r"10\%", "0.1"),
    ("5", "x = 5"),
    (r"30^\circ", "30"),
    (r"\$18", "18"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    (r"\frac{1}{3}", "0.33"),
    ("(1,2)", "[1,2]"),
    ("x+1", "x-1"),
    (r"\{1,2\}", r"\{1\}"),
    ("Paris", "London"),
    ("5", ""),
    ("5", "I do not know"),
]


@pytest.mark.parametrize(("accepted", "answer"), EQUAL)
def test_equal_expressions_are_correct(accepted: str, answer: str):
    assert accepts("boxed_math", answer, question(accepted))


@pytest.mark.parametrize(("accepted", "answer"), DIFFERENT)
def test_different_expressions_are_wrong(accepted: str, answer: str):
    assert not accepts("boxed_math", answer, question(accepted))


def test_any_of_several_accepted_answers_is_correct():
    several = question("4", r"\frac{7}{2}")
    assert accepts("boxed_math", "3.5", several)
    assert accepts("boxed_exact", "4", several)
    assert not accepts("boxed_math", "3", several)


def test_exact_answers_are_compared_character_by_character():
    assert accepts("boxed_exact", " blue cat\n", question("blue cat"))
    assert not accepts("boxed_exact", "Blue cat", question("blue cat"))
    assert not accepts("boxed_exact", "0.5", question("1/2"))
    assert not accepts("boxed_exact", "", question("1/2"))


PLANETS = ("Mars", "Venus", "A comet", "A, B or C")


@pytest.mark.parametrize(
    "answer",
    ["B", "b", " (B) ", "B.", r"\text{B}", r"\textbf{(B)}", "$B$", "B: Venus", "(B) Venus", "B) Venus", "venus"],
)
def test_a_letter_or_the_text_of_an_option_is_read(answer: str):
    assert accepts("choice", answer, question("B", choices=PLANETS))


@pytest.mark.parametrize(
    "answer", ["", "C", "E", "Z", "AB", "B or C", "Venus or Mars", "Be", "A comet", "A, B or C", "$", "Ⓑ"]
)
def test_another_letter_or_text_is_not_read_as_the_right_option(answer: str):
    assert not accepts("choice", answer, question("B", choices=PLANETS))


def test_an_option_that_begins_with_a_letter_is_read_as_a_text():
    assert accepts("choice", "A comet", question("C", choices=PLANETS))
    assert accepts("choice", "A, B or C", question("D", choices=PLANETS))


def test_an_option_that_occurs_twice_is_not_read_by_its_text():
    assert not accepts("choice", "Venus", question("B", choices=("Mars", "Venus", "Venus")))


@pytest.mark.parametrize("answer", ["It is 5.", "5", "the answer is 5, I think", "(5)", "x=5"])
def test_a_text_contains_an_answer_as_a_word(answer: str):
    assert accepts("contains", answer, question("5"))


@pytest.mark.parametrize("answer", ["15", "5.2", "1,5", "1.5", "52", "5,000", "v5", "five", ""])
def test_a_part_of_another_number_or_word_is_not_contained(answer: str):
    assert not accepts("contains", answer, question("5"))


def test_contained_answers_may_have_several_words_and_signs():
    assert accepts("contains", "They met in NEW\n  york (city).", question("New York"))
    assert accepts("contains", "It costs $3.50.", question("$3.50"))
    assert not accepts("contains", "anything", question(" "))


@pytest.mark.parametrize("verifier", ["boxed_exact", "boxed_math", "choice", "contains"])
def test_odd_answers_are_wrong(verifier: str):
    asked = question("B", choices=PLANETS) if verifier == "choice" else question(r"\frac{17}{3}")
    assert not [answer for answer in ODD_ANSWERS if accepts(verifier, answer, asked)]


def test_a_long_or_deep_expression_is_compared_as_a_text():
    long = "1" + " + 1" * 999
    deep = "(" * 30 + "5" + ")" * 30
    for expression in (long, deep):
        assert accepts("boxed_math", f" {expression}", question(expression))
    assert not accepts("boxed_math", long, question("1000"))
    assert not accepts("boxed_math", deep, question("5"))


def test_only_a_verifier_of_boxes_needs_one():
    assert [name for name in VERIFIERS if not VERIFIERS[name].requirements.box] == ["contains"]


def test_the_own_answer_of_a_question_is_read():
    assert why_unreadable("boxed_math", question(r"\frac{1}{2}", "0.5")) == ""
    assert why_unreadable("boxed_exact", question(r"\{1, 2\}")) == ""
    assert why_unreadable("choice", question("B", choices=PLANETS)) == ""
    assert why_unreadable("contains", question("New York")) == ""


def test_an_answer_that_no_box_can_hold_is_unreadable():
    assert "no box can hold" in why_unreadable("boxed_exact", question("}{"))
    assert why_unreadable("contains", question("}{")) == ""


def test_an_answer_that_its_verifier_refuses_is_unreadable():
    assert "does not accept" in why_unreadable("choice", question("C", choices=("yes", "no")))
    assert "has no options" in why_unreadable("choice", question("C"))


def test_only_a_scorer_of_reasoning_gym_needs_no_accepted_answer():
    assert [name for name in VERIFIERS if not why_unreadable(name, question(choices=PLANETS))] == ["reasoning_gym"]
