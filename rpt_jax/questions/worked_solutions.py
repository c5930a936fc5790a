"""Question source "worked_solutions": a grade-school problem with its worked solution up to the result of the last calculation.

The documents are those of the corpus source "gsm_symbolic". A small policy that was trained on them can be asked such a question
in the form that it knows.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from rpt_jax.config import DataConfig, QuestionsConfig
from rpt_jax.corpus.documents import SPLITS, Document
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions, generate_gsm_symbolic, load_templates
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.registry import QUESTION_SOURCES

# The last result of a document: digits after "=", that no decimals or other calculation follow.
_LAST_RESULT = re.compile(r"(?s)(?P<text>.*=[ $€£]*)(?P<result>\d+)(?![\d.,/%]*\d)[^=]*")


@dataclasses.dataclass(frozen=True)
class WorkedSolutionOptions:
    """Settings of the generator."""

    # Number of documents to generate for training questions; those without a last calculation give none.
    documents: int = 1000
    # Number of documents to generate for test questions, from other numbers; a third as many more are of other templates.
    test_documents: int = 300
    # Number of problem templates that no training question is of; their test questions are a category of their own.
    held_out_templates: int = 10

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("test_documents", 1), ("held_out_templates", 0)):
            value = getattr(self, name)
            if value < least:
                field = f"questions.source_options.{name}"
                raise UserError(f"{field}={value} must be at least {least}.", field=field)


@QUESTION_SOURCES.register(
    "worked_solutions", options=WorkedSolutionOptions, check=lambda config: load_templates("questions.source")
)
def generate_worked_solutions(config: QuestionsConfig) -> Iterator[SourceQuestion]:
    """Generate problems with worked solutions, and ask for the result of the last calculation."""
    options = config.source_options or WorkedSolutionOptions()
    data = DataConfig(
        seed=config.seed,
        held_out_documents=options.test_documents,
        source_options=GsmSymbolicOptions(documents=options.documents, held_out_templates=options.held_out_templates),
    )
    asked = set()
    for document in generate_gsm_symbolic(data, collections.Counter(), "questions"):
        question = ask_for_last_result(document)
        # Documents may differ only in what follows the last result.
        if question and question.text not in asked:
            asked.add(question.text)
            yield SourceQuestion(question, TRAIN if SPLITS[document.split] == "train" else TEST)


def ask_for_last_result(document: Document) -> Question | None:
    """Return the question for the last result in the solution of a problem; None if its last line has no whole number as one."""
    problem, _, solution = document.text.partition("\n")
    match = _LAST_RESULT.fullmatch(solution)
    if match is None:
        return None
    return Question(
        id=document.name,
        text=f"{problem}\n{match['text']}",
        answers=(match["result"],),
        category="unseen templates" if SPLITS[document.split] == "unseen" else "seen templates",
        place=document.name,
    )
