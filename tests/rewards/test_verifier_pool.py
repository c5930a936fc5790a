"""The worker processes of verifiers: time limits, crashes, order, and that `submit` does not wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.questions.question import Question
from rpt_jax.rewards import verifier_pool
from rpt_jax.rewards.verifier_pool import CRASHED, DONE, TIMED_OUT, VerifierPool
from tests.helpers import hostile_verifier

QUESTION = Question(id="q", text="?", answers=("right",))


@pytest.fixture(scope="module", autouse=True)
def verifiers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier_pool, "VERIFIERS", hostile_verifier.VERIFIERS)
        yield


@pytest.fixture(scope="module")
def pool(verifiers: None) -> Iterator[VerifierPool]:
    with VerifierPool("hostile", workers=2, seconds=60.0) as pool:
        yield pool


def verify(pool: VerifierPool, *answers: str) -> list[tuple[float, str]]:
    verdicts = [verdict.result() for verdict in pool.submit((answer, QUESTION) for answer in answers)]
    assert all(verdict.seconds >= 0 for verdict in verdicts)
    return [(verdict.score, verdict.outcome) for verdict in verdicts]


def test_verdicts_come_in_the_order_of_the_answers(pool: VerifierPool):
    answers = ["right", "wrong"] * 20 + ["right"]
    expected = [(float(answer == "right"), DONE) for answer in answers]
    assert verify(pool, *answers) == expected


def test_a_crash_costs_the_answer_at_fault_only(pool: VerifierPool):
    answers = ("right", "die", "right 2", "segfault", "raise", "allocate", "right")
    crashed = (0.0, CRASHED)
    assert verify(pool, *answers) == [(1.0, DONE), crashed, (0.0, DONE), crashed, crashed, crashed, (1.0, DONE)]


def test_an_answer_is_tried_again_if_its_worker_dies(pool: VerifierPool, tmp_path: Path):
    assert verify(pool, f"die_once {tmp_path / 'died'}") == [(1.0, DONE)]


def test_an_answer_that_hangs_is_abandoned_after_the_time_limit():
    with VerifierPool("hostile", workers=1, seconds=0.5) as pool:
        assert verify(pool, "hang", "right") == [(0.0, TIMED_OUT), (1.0, DONE)]


def test_submitting_does_not_wait(pool: VerifierPool, tmp_path: Path):
    go = tmp_path / "go"
    [waiting] = pool.submit([(f"wait {go}", QUESTION)])
    assert not waiting.done()
    assert verify(pool, "right") == [(1.0, DONE)], "the other worker goes on"
    assert not waiting.done()
    go.touch()
    assert waiting.result().score == 1.0


def test_equal_answers_to_a_question_are_verified_once(pool: VerifierPool):
    other = Question(id="other", text="?", answers=("right",))
    first, second, third = pool.submit([("right", QUESTION), ("right", QUESTION), ("right", other)])
    assert first is second
    assert first is not third


def test_a_worker_does_not_import_jax_and_verifies_on_its_main_thread(pool: VerifierPool):
    assert verify(pool, "imported jax", "imported os", "main_thread") == [(0.0, DONE), (1.0, DONE), (1.0, DONE)]


def test_what_is_left_is_canceled_when_the_pool_is_closed(tmp_path: Path):
    pool = VerifierPool("hostile", workers=1, seconds=60.0)
    [running] = pool.submit([(f"wait {tmp_path / 'never'}", QUESTION)])
    verdicts = pool.submit([("right", QUESTION), ("wrong", QUESTION)])
    pool.close()
    assert running.cancelled()
    assert all(verdict.cancelled() for verdict in verdicts)


def test_a_verifier_without_its_package_is_refused():
    with pytest.raises(UserError) as raised:
        VerifierPool("unusable")
    assert raised.value.field == "questions.verifier"
