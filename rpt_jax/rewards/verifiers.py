r"""Verifiers: whether an answer to a question is correct.

A verifier is a function of the text that it reads and the `Question`. It returns a score, 1 for a correct answer and 0 for a
wrong one; a scorer of reasoning-gym may give partial credit. It reads the content of the last box or, if it is registered with
`box=False`, all that follows the end of thinking. It runs in a worker process with a time limit (`verifier_pool`), so it may be
slow, and this module must not import JAX.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from typing import Any

from rpt_jax.questions.question import Question
from rpt_jax.questions.reasoning_gym_tasks import score_entry
from rpt_jax.questions.text import last_box, read_letter
from rpt_jax.registry import VERIFIERS

# What is longer or nested deeper is compared as text only, because parsing it takes seconds. The longest answer of MATH has 81
# characters, the deepest three levels of brackets.
_LONGEST_EXPRESSION = 500
_DEEPEST_EXPRESSION = 10
_BRACKETS = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)


@VERIFIERS.register("boxed_math", imports=("math_verify",))
def boxed_math(answer: str, question: Question) -> float:
    """The box and an accepted answer are the same text, or symbolically or numerically equal (by math-verify).

    `\\frac{1}{2}`, `0.5` and `x = 1/2` are equal. Letters are variables, so that words with the same letters are equal too.
    An answer of more than 500 characters or ten levels of brackets is compared as text only.
    """
    if boxed_exact(answer, question):
        return 1.0
    if not _is_small_expression(answer):
        return 0.0
    import math_verify

    parsed = _parse_math(answer)
    return float(
        any(
            # The time limit is that of the worker process. The order of the arguments matters.
            math_verify.verify(_parse_math(accepted), parsed, timeout_seconds=None)
            for accepted in question.answers
        )
    )


def _is_small_expression(text: str) -> bool:
    if len(text) > _LONGEST_EXPRESSION:
        return False
    depths = itertools.accumulate(_BRACKETS.get(character, 0) for character in text)
    return max(depths, default=0) <= _DEEPEST_EXPRESSION


@functools.lru_cache(maxsize=1024)
def _parse_math(text: str) -> list[Any]:
    """Return the expressions that math-verify reads in `text`; the accepted answers of a question are read again and again."""
    import math_verify

    # It warns that its own time limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    formats = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]
    return math_verify.parse(f"\\boxed{{{text}}}", formats, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


@VERIFIERS.register("boxed_exact")
def boxed_exact(answer: str, question: Question) -> float:
    """The box holds an accepted answer, character by character; white space at its ends does not count."""
    return float(answer.strip() in {accepted.strip() for accepted in question.answers})


@VERIFIERS.register("choice", choices=True)
def choice(answer: str, question: Question) -> float:
    """The box holds the letter of the right option, such as `B`, `(B)` or `B: text`, or the option's text."""
    return float(read_letter(answer, question.choices) in question.answers)


@VERIFIERS.register("contains", box=False)
def contains(answer: str, question: Question) -> float:
    """The text after the end of thinking contains an accepted answer as whole words, in upper or lower case."""
    text = " ".join(answer.split()).casefold()
    return float(any(_contains_words(text, accepted) for accepted in question.answers))


def _contains_words(text: str, accepted: str) -> bool:
    words = re.escape(" ".join(accepted.split()).casefold())
    # "5" does not match in "15", "a5", "5.2" or "1,5"; it does before the period that ends a sentence.
    return bool(words and re.search(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", text))


@VERIFIERS.register("reasoning_gym", answers=False, needs=(("source", "reasoning_gym"),), imports=("reasoning_gym",))
def reasoning_gym(answer: str, question: Question) -> float:
    """The score that the question's own task of reasoning-gym gives the box; it may be partial."""
    return score_entry(answer, question.data)


def why_unreadable(verifier: str, question: Question) -> str:
    """Return why a verifier would call every answer to a question wrong, even its own; "" if it would not.

    Args:
      verifier: name of the verifier.
      question: the question.
    """
    registered = VERIFIERS[verifier]
    if registered.requirements.choices and not question.choices:
        return f"has no options, which the verifier '{verifier}' needs."
    if registered.requirements.answers and not question.answers:
        return f"has no accepted answer, which the verifier '{verifier}' needs."
    for answer in question.answers:
        if registered.requirements.box and last_box(f"\\boxed{{{answer}}}".encode()) != answer.encode():
            return f"has the answer {answer!r}, which no box can hold: its braces are not balanced."
        if registered.function(answer, question) < 1.0:
            return f"has the answer {answer!r}, which the verifier '{verifier}' does not accept as correct."
    return ""
