"""Prompts of questions: what is tokenized, left out, shuffled and batched."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from rpt_jax.config import Experiment, PromptConfig, TrainingConfig
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.question_prompts import (
    QuestionPrompts,
    question_batches,
    question_stream,
    question_text,
    questions_fingerprint,
    tokenize_questions,
)
from rpt_jax.questions.question import Question
from rpt_jax.tokenizers.tokenizer import Tokenizer

PROMPT = PromptConfig(template="boxed_answer", max_tokens=200)
QUESTIONS = [Question(id=f"q{i}", text=f"What is {i} + {2 * i}?", answers=(str(3 * i),)) for i in range(10)]


def prompts_of(questions: list[Question], tokenizer: Tokenizer) -> tuple[QuestionPrompts, PromptBuilder]:
    builder = PromptBuilder(PROMPT, tokenizer, "question")
    return tokenize_questions(questions, builder, tokenizer, "training"), builder


def experiment(prompts_per_step: int) -> Experiment:
    return dataclasses.replace(Experiment(), training=TrainingConfig(prompts_per_step=prompts_per_step))


def test_a_prompt_is_the_question_in_its_template_and_has_no_continuation(tokenizer: Tokenizer) -> None:
    prompts, builder = prompts_of(QUESTIONS, tokenizer)
    [batch] = question_batches(prompts, builder, 10)
    for i, question in enumerate(QUESTIONS):
        text = tokenizer.token_bytes(batch.tokens_PxS[i, : batch.lengths_P[i]]).decode()
        assert text == question.text + "\n\nReason step by step, and put your final answer in \\boxed{}."
    assert not batch.boundaries_PxRp1.any() and not batch.reference_PxR.any()
    assert prompts.of(batch) == QUESTIONS and batch.ids_P.tolist() == list(range(10))


def test_a_question_that_is_too_long_is_left_out_whole(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rpt_jax")
    long = Question(id="long", text="Add " * 300, answers=("1",))
    prompts, _ = prompts_of([QUESTIONS[0], long, QUESTIONS[1]], tokenizer)
    assert prompts.questions == QUESTIONS[:2] and prompts.left_out == 1
    assert "1 of 3 training questions are left out" in caplog.text
    with pytest.raises(UserError) as raised:
        prompts_of([long], tokenizer)
    assert raised.value.field == "prompt.max_tokens"


def test_options_follow_the_question() -> None:
    question = Question(id="q", text="Which?", answers=("B",), choices=("one", "two"))
    assert question_text(question) == "Which?\nOptions:\n(A) one\n(B) two"


def test_every_epoch_asks_every_question_once_and_a_stream_resumes_where_it_was(tokenizer: Tokenizer) -> None:
    prompts, builder = prompts_of(QUESTIONS, tokenizer)
    stream = question_stream(experiment(5), prompts, builder)
    batches = [next(stream) for _ in range(4)]
    for epoch in (batches[:2], batches[2:]):
        assert sorted(i for batch in epoch for i in batch.window_P.tolist()) == list(range(10))
    assert [i for batch in batches for i in batch.ids_P.tolist()] == list(range(20)), "ids, which decide on the noise"
    assert batches[0].window_P.tolist() != batches[2].window_P.tolist()

    other = question_stream(experiment(5), prompts, builder)
    next(other)
    resumed = question_stream(experiment(5), prompts, builder)
    resumed.set_state(other.get_state())
    for batch in batches[1:]:
        assert next(resumed).window_P.tolist() == batch.window_P.tolist()


def test_fewer_questions_than_a_step_needs_are_refused(tokenizer: Tokenizer) -> None:
    prompts, builder = prompts_of(QUESTIONS, tokenizer)
    with pytest.raises(UserError) as raised:
        question_stream(experiment(11), prompts, builder)
    assert raised.value.field == "training.prompts_per_step"


def test_the_last_batch_of_an_evaluation_is_padded(tokenizer: Tokenizer) -> None:
    batches = question_batches(*prompts_of(QUESTIONS, tokenizer), 4)
    assert [batch.window_P.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]


def test_the_fingerprint_changes_with_texts_answers_and_order() -> None:
    changed = [dataclasses.replace(QUESTIONS[0], answers=("7",)), *QUESTIONS[1:]]
    prints = {questions_fingerprint(questions) for questions in (QUESTIONS, QUESTIONS[::-1], QUESTIONS[1:], changed)}
    assert len(prints) == 4


def test_a_template_without_the_question_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="boxed_answer") as raised:
        PromptBuilder(PromptConfig(template="plain"), tokenizer, "question")
    assert raised.value.field == "prompt.template"
