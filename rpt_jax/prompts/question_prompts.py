"""Prompts of questions: tokenized once, in a shuffled order for training and in whole batches for evaluation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from rpt_jax.config import Experiment
from rpt_jax.errors import UserError
from rpt_jax.infra.digest import digest
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import Position
from rpt_jax.questions.question import Question
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionPrompts:
    """Questions that fit in a prompt. The index of a question is `PromptBatch.window_P`.

    Attributes:
      questions: the questions.
      token_ids: of each question, without the template.
      left_out: number of questions that are left out, because they are too long.
    """

    questions: Sequence[Question]
    token_ids: Sequence[Sequence[int]]
    left_out: int

    def position(self, index: int) -> Position:
        """Return the end of a question, the position that a response is sampled at."""
        return Position(window=index, position=len(self.token_ids[index]), entropy=0.0)

    def positions(self) -> list[Position]:
        """Return the end of every question."""
        return [self.position(i) for i in range(len(self.token_ids))]

    def of(self, prompts: PromptBatch) -> list[Question]:
        """Return the questions of a batch on the host."""
        return [self.questions[i] for i in prompts.window_P]


def question_text(question: Question) -> str:
    """Return the text of a question, followed by a line for each of its options."""
    if not question.choices:
        return question.text
    lines = [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(question.choices)]
    return "\n".join([question.text, "Options:", *lines])


def tokenize_questions(
    questions: Sequence[Question],
    builder: PromptBuilder,
    tokenizer: Tokenizer,
    name: str,
    text_of: Callable[[Question], str] = question_text,
) -> QuestionPrompts:
    """Tokenize questions, and leave out those that are too long for a prompt: a question cannot be cut.

    Args:
      questions: the questions.
      builder: of the prompts.
      tokenizer: encodes the questions.
      name: of the questions in messages, such as "training".
      text_of: returns the text that stands in the prompt for a question.

    Raises: UserError, if none is left.
    """
    token_ids = [tokenizer.encode(text_of(question)) for question in questions]
    limit = builder.max_context_tokens
    kept = [i for i, ids in enumerate(token_ids) if len(ids) <= limit]
    left_out = len(questions) - len(kept)
    if left_out:
        longest = max(range(len(questions)), key=lambda i: len(token_ids[i]))
        message = (
            f"{left_out:,} of {len(questions):,} {name} questions are left out: they have more than the {limit:,} tokens that "
            f"the template leaves of prompt.max_tokens. The longest, {questions[longest].place or questions[longest].id}, has "
            f"{len(token_ids[longest]):,}."
        )
        if not kept:
            raise UserError(f"{message} None is left: raise prompt.max_tokens.", field="prompt.max_tokens")
        logger.info(message)
    return QuestionPrompts(
        questions=[questions[i] for i in kept], token_ids=[token_ids[i] for i in kept], left_out=left_out
    )


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """Return a SHA-256 of the ids, texts and answers of questions, in their order."""
    return digest([[question.id, question_text(question), question.answers] for question in questions])


def question_stream(experiment: Experiment, prompts: QuestionPrompts, builder: PromptBuilder) -> PromptStream:
    """Return the stream of training prompts: every question once an epoch, shuffled anew in each.

    Raises: UserError, if there are fewer questions than prompts in a step.
    """
    batch = experiment.training.prompts_per_step
    if len(prompts.questions) < batch:
        raise UserError(
            f"training.prompts_per_step={batch} is more than the {len(prompts.questions):,} training questions: lower it, or "
            "give more questions (questions.train_questions).",
            field="training.prompts_per_step",
        )
    order = position_order([prompts.positions()], [], batch=batch, per_window=0, seed=(experiment.seed, 0))
    return PromptStream(builder, prompts.token_ids, [order], batch=batch, workers=experiment.data.workers)


def question_batches(
    prompts: QuestionPrompts, builder: PromptBuilder, batch: int, chosen: Sequence[int] | None = None
) -> list[PromptBatch]:
    """Return the prompts of questions in whole batches; the last one is padded by repeating the last prompt.

    The id of a prompt, on which the noise of its samples depends, is the index of its question, whichever are chosen.

    Args:
      prompts: the questions.
      builder: of the prompts.
      batch: prompts in a batch.
      chosen: indices of the questions to ask; None for all.
    """
    indices = range(len(prompts.questions)) if chosen is None else chosen
    built = [builder.build(i, prompts.token_ids[i], prompts.position(i)) for i in indices]
    built += built[-1:] * (-len(built) % batch)
    return [stack(built[i : i + batch]) for i in range(0, len(built), batch)]
