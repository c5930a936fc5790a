"""The boxed-letter protocol: the rule of the reference harness on written-out responses, and hard inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rpt_jax.evaluation.multiple_choice import (
    LETTERS,
    boxed_letter_text,
    letter_prompt,
    likelihood_choices,
    random_letter,
    read_letter,
    text_prompt,
    why_unusable,
)
from rpt_jax.questions.question import Question

QUESTION = Question(id="q1", text="What is 2 + 2?", choices=("3", "4", "5"), answers=("B",), place="math.jsonl:7")


def test_message_lists_the_options_and_asks_for_a_boxed_letter():
    text = boxed_letter_text(QUESTION)
    assert text.startswith("What is 2 + 2?\nOptions are:\n(A): 3\n(B): 4\n(C): 5\n\n")
    assert "\\boxed{A}" in text


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"<think>\boxed{A}</think> so \boxed{C}.", "C"),
        (r"<think>I believe \boxed{D}", "D"),  # The reasoning counts, as in the reference.
        (r"\boxed{(C): 5}", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{\text{\textbf{E}}}", "E"),
        (r"\boxed{\a{\b{\c{E}}}}", None),  # Four levels of braces.
        (r"\boxed{B} then \boxed{\a{\b{\c{E}}}}", "B"),
        (r"\boxed{C or B}", "B"),  # The first letter in the order of the alphabet, not of the text.
        (r"\boxed{a}", None),
        (r"\boxed{}", None),
        (r"\boxed{42} Final Answer: B", None),  # A box, even without a letter, is what is read.
        (r"\boxed{K}", None),
        ("Final Answer: B", "B"),
        ("Final Answer: B\nThe answer is: C.\nBye", "C"),
        ("The answer is: (C)\nFinal Answer: 42", None),
        ("The answer is B", None),
        ("so The answer is: D. Final Answer: H", "H"),
        ("", None),
        (r"\boxed{B", None),
    ],
)
def test_letter_of_a_response(response, letter):
    assert read_letter(response) == letter


def test_reading_agrees_with_a_plain_search_for_boxes():
    """A plain reading: open boxes from left to right, count braces, skip a box that has more than three levels."""

    def plain(text: str) -> str | None:
        found, start = None, 0
        while (start := text.find("\\boxed{", start)) >= 0:
            depth, deepest = 0, 0
            for end in range(start + 6, len(text)):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                deepest = max(deepest, depth)
                if depth == 0 or deepest > 3:
                    break
            if depth == 0 and deepest <= 3:
                found = text[start + 7 : end]
                start = end
            else:
                start += 1
        return found

    rng = np.random.default_rng(0)
    parts = ["\\boxed{", "{", "}", "A", "C", "x", "\n", "\\boxed{B}"]
    for _ in range(3000):
        text = "".join(rng.choice(parts, rng.integers(1, 14)))
        content = plain(text)
        expected = None if content is None else next((c for c in LETTERS if c in content), None)
        assert read_letter(text) == expected, text


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{" * 20_000, None),
        (r"\boxed{" + "{}" * 40_000, None),
        (r"\boxed{{" * 10_000 + "A" + "}" * 20_000, "A"),
        (r"\boxed{A}" * 20_000, "A"),
        ("Final Answer:" * 20_000 + "C", "C"),
        ("{" * 10**6, None),
    ],
)
def test_hard_responses_are_read(response, letter):
    """An expression that backtracks, or a search from every character, would not end."""
    assert read_letter(response) == letter


def test_random_letters_are_uniform_and_the_same_every_time():
    letters = [random_letter(QUESTION, sample, seed=0) for sample in range(2000)]
    counts = [letters.count(letter) for letter in LETTERS]
    assert min(counts) > 140 and max(counts) < 260
    assert letters[:5] == [random_letter(QUESTION, sample, seed=0) for sample in range(5)]
    assert letters != [random_letter(QUESTION, sample, seed=1) for sample in range(2000)]


@pytest.mark.parametrize(
    "change",
    [
        {"choices": ()},
        {"choices": tuple("abcdefghijk")},
        {"answers": ("D",)},
        {"answers": ("4",)},
        {"answers": ()},
    ],
)
def test_questions_that_are_no_multiple_choice_cannot_be_used(change):
    assert why_unusable(QUESTION) == ""
    assert why_unusable(dataclasses.replace(QUESTION, **change)).startswith("has ")


def test_prompts_of_likelihoods():
    assert letter_prompt(QUESTION) == "Question: What is 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    assert text_prompt(QUESTION) == "Question: What is 2 + 2?\nAnswer:"


def test_options_are_chosen_by_each_likelihood():
    choices = likelihood_choices([-1.0, -2.0, -3.0], [-9.0, -8.0, -10.0], [2, 2, 5])
    assert choices == {"letter": "A", "text": "B", "text_per_byte": "C"}
