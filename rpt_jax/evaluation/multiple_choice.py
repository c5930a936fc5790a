r"""Multiple choice: the texts that a question becomes, and the reading of a response.

Generative: the policy reasons and puts the letter of an option into a box, as in the harness that the paper refers to for its
zero-shot results (section 4.4; General-Reasoner, arXiv 2505.14652). The rule is that harness's, the wording is ours.

By likelihood: the policy does not reason. Either the letters of the options are compared, or their texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from rpt_jax.infra.digest import digest
from rpt_jax.questions.question import Question

LETTERS = "ABCDEFGHIJ"  # Of the options; a response is searched for them in this order.

# A box with at most three levels of braces. The quantifiers are possessive, so that no response takes long.
_BOX = re.compile(r"\\boxed\{((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}")
_FINAL_ANSWER = re.compile("Final Answer:|The answer is:")


def why_unusable(question: Question) -> str:
    """Return why a question cannot be asked as multiple choice, to follow its place; "" if it can."""
    if not 2 <= len(question.choices) <= len(LETTERS):
        return (
            f"has {len(question.choices)} options, and multiple choice needs 2 to {len(LETTERS)} "
            "(questions.choices_field names the field that holds them)."
        )
    valid = LETTERS[: len(question.choices)]
    wrong = [answer for answer in question.answers if len(answer) != 1 or answer not in valid]
    if wrong or not question.answers:
        return f"has the answer {wrong[0] if wrong else ''!r}, and its options are {valid[0]} to {valid[-1]}."
    return ""


# --- generative ---------------------------------------------------------------------------------------


def boxed_letter_text(question: Question) -> str:
    """Return the user's message for a question: its options by letter, and how to answer."""
    options = "\n".join(f"({letter}): {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
    return (
        f"{question.text}\nOptions are:\n{options}\n\n"
        "Think step by step. Then give your answer inside \\boxed{}: only the letter of an option, such as \\boxed{A}. Exactly "
        "one of the options is correct."
    )


def read_letter(response: str) -> str | None:
    r"""Return the letter that a response answers with; None if there is none.

    The answer is the content of the last `\boxed{}` of the whole response, reasoning included, with at most three levels of
    braces; without a box, what follows "Final Answer:" or "The answer is:" in the last line that has one of them. The letter is
    the first of A, B, …, J that occurs anywhere in the answer.
    """
    boxes = _BOX.findall(response)
    answer = boxes[-1] if boxes else _final_answer(response)
    return next((letter for letter in LETTERS if letter in answer), None)


def _final_answer(response: str) -> str:
    """Return the rest of the line after the last "Final Answer:" or "The answer is:"; "" if there is neither."""
    parts = _FINAL_ANSWER.split(response)
    return parts[-1].partition("\n")[0] if len(parts) > 1 else ""


def random_letter(question: Question, sample: int, seed: int) -> str:
    """Return a uniformly random letter of A to J, the reference harness's answer where it can read none.

    It is a function of the seed, the question and the sample, and the same in every run.
    """
    rng = np.random.default_rng(int(digest(seed, question.id, sample)[:16], 16))
    return LETTERS[rng.integers(len(LETTERS))]


# --- by likelihood ------------------------------------------------------------------------------------


def letter_prompt(question: Question) -> str:
    """Return the text that the letter of an option continues: the question, all options, and "Answer:"."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
    return f"Question: {question.text}\n{options}\nAnswer:"


def text_prompt(question: Question) -> str:
    """Return the text that the text of an option continues: the question, without the options, and "Answer:"."""
    return f"Question: {question.text}\nAnswer:"


def likelihood_choices(
    letters_C: Sequence[float], texts_C: Sequence[float], text_bytes_C: Sequence[int]
) -> dict[str, str]:
    """Return the letter of the most likely option by each measure.

    Args:
      letters_C: log-likelihood of the letter of each option, after `letter_prompt`.
      texts_C: log-likelihood of its text, after `text_prompt`.
      text_bytes_C: length of that text in bytes.

    Returns: the letters by the name of the measure: "letter", "text", and "text_per_byte", which divides by the length.
    """
    measures = {
        "letter": np.asarray(letters_C),
        "text": np.asarray(texts_C),
        "text_per_byte": np.asarray(texts_C) / np.asarray(text_bytes_C),
    }
    return {name: LETTERS[int(np.argmax(values_C))] for name, values_C in measures.items()}
