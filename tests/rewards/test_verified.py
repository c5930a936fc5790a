"""Rewards of questions: a batch of responses against the verifier by hand."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.questions.question import Question
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rewards.verified import AnswerStatus, BatchVerifier, PendingBatch
from rpt_jax.rewards.verifier_pool import CRASHED, DONE, TIMED_OUT, Verdict
from rpt_jax.rollout.rollouts import Ended, Rollouts
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.paths import TINY

QUESTIONS = [Question(id=name, text=name, answers=answers) for name, answers in (("a", ("7", "seven")), ("b", ("12",)))]
# The text after the end of thinking of each response, None if thinking does not end, and what it earns.
RESPONSES = [
    [("\\boxed{7}", AnswerStatus.CORRECT), ("\\boxed{ seven }", AnswerStatus.CORRECT), (None, AnswerStatus.NO_BOX)],
    [("\\boxed{7}", AnswerStatus.WRONG), ("it is 12", AnswerStatus.NO_BOX), ("\\boxed{}", AnswerStatus.EMPTY)],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def verify(tokenizer: Tokenizer) -> Iterator[BatchVerifier]:
    verifier = BatchVerifier(QuestionsConfig(verifier="boxed_exact", verifier_workers=1), tokenizer)
    yield verifier
    verifier.close()


def rollouts_of(texts: list[list[str | None]], tokenizer: Tokenizer, ended: Ended = Ended.STOP) -> Rollouts:
    def ids(text: str | None) -> list[int]:
        reasoning = tokenizer.encode("so \\boxed{7} ")
        return reasoning if text is None else [*reasoning, tokenizer.end_think_id, *tokenizer.encode(text)]

    rows = [[ids(text) for text in group] for group in texts]
    lengths = np.array([[len(row) for row in group] for group in rows], np.int32)
    tokens = np.zeros((*lengths.shape, 60), np.int32)
    for p, group in enumerate(rows):
        for g, row in enumerate(group):
            tokens[p, g, : len(row)] = row
    return Rollouts(tokens, lengths, np.zeros(tokens.shape, np.float32), np.full(lengths.shape, ended))


def test_the_reward_of_a_batch_is_that_of_each_response(verify: BatchVerifier, tokenizer: Tokenizer) -> None:
    """A box in the reasoning does not count."""
    texts = [[text for text, _ in group] for group in RESPONSES]
    verified = verify.submit(QUESTIONS, rollouts_of(texts, tokenizer)).result()
    expected = [[status for _, status in group] for group in RESPONSES]
    assert verified.status_PxG.tolist() == expected
    assert verified.score_PxG.tolist() == [
        [float(status == AnswerStatus.CORRECT) for status in group] for group in expected
    ]
    assert verified.timed_out == verified.crashed == 0 and verified.seconds > 0


def test_a_response_that_is_cut_earns_nothing(verify: BatchVerifier, tokenizer: Tokenizer) -> None:
    verified = verify.submit(QUESTIONS[:1], rollouts_of([["\\boxed{7}"]], tokenizer, Ended.LENGTH)).result()
    assert verified.status_PxG.tolist() == [[AnswerStatus.NOT_FINISHED]] and not verified.score_PxG.any()


def test_a_verification_that_takes_too_long_or_crashes_is_wrong_and_counted() -> None:
    """The second and the third response have the same answer, which was verified once."""
    futures: list[Future[Verdict]] = [Future(), Future(), Future()]
    for future, score, outcome in zip(futures, (0.0, 0.0, 0.5), (TIMED_OUT, CRASHED, DONE), strict=True):
        future.set_result(Verdict(score=score, outcome=outcome, seconds=2.0))
    verdicts = [futures[0], futures[1], futures[1], futures[2]]
    status = np.array(
        [[AnswerStatus.WRONG, AnswerStatus.WRONG, AnswerStatus.WRONG, AnswerStatus.NO_BOX, AnswerStatus.WRONG]]
    )
    verified = PendingBatch(status, verdicts, 1).result()
    unverified = AnswerStatus.UNVERIFIED
    assert verified.status_PxG.tolist() == [[unverified] * 3 + [AnswerStatus.NO_BOX, AnswerStatus.WRONG]]
    assert verified.score_PxG.tolist() == [[0, 0, 0, 0, 0.5]], "a scorer may give partial credit"
    assert (verified.timed_out, verified.crashed, verified.seconds) == (1, 2, 6.0)


def test_statuses_that_the_format_term_reads_have_the_numbers_of_equation_3() -> None:
    for name in ("CORRECT", "EMPTY", "NO_BOX", "NOT_FINISHED"):
        assert AnswerStatus[name] == Status[name]
