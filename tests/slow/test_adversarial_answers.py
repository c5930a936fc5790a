"""A thousand answers that are made to break verifiers, through each of them."""

from __future__ import annotations

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.questions.question import Question
from rpt_jax.questions.reasoning_gym_tasks import ReasoningGymOptions, generate_reasoning_gym
from rpt_jax.registry import VERIFIERS
from rpt_jax.rewards.verifier_pool import DONE, TIMED_OUT, VerifierPool
from tests.helpers.adversarial_answers import adversarial_answers

pytestmark = pytest.mark.slow
TASKS = (
    "countdown,simple_integration,polynomial_multiplication,n_queens,number_sorting,jugs,propositional_logic,chain_sum"
)


def questions_of(verifier: str) -> list[Question]:
    if verifier == "choice":
        return [Question(id="q", text="?", answers=("B",), choices=("Mars", "Venus", "a comet"))]
    if verifier == "reasoning_gym":
        options = ReasoningGymOptions(task=TASKS, size=1)
        return [item.question for item in generate_reasoning_gym(QuestionsConfig(seed=3, source_options=options))]
    answers = (r"\frac{17}{3}", r"x^2 + \sqrt{2}", r"\{1, 2\}", "Evelyn")
    return [Question(id=answer, text="?", answers=(answer,)) for answer in answers]


@pytest.mark.parametrize("verifier", list(VERIFIERS))
def test_no_answer_makes_a_verifier_hang_or_crash(verifier: str):
    questions = questions_of(verifier)
    answers = [(answer, questions[i % len(questions)]) for i, answer in enumerate(adversarial_answers(1000))]
    with VerifierPool(verifier, workers=2, seconds=3.0) as pool:
        verdicts = [verdict.result(timeout=300) for verdict in pool.submit(answers)]
        own = [(question.answers[0], question) for question in questions if question.answers]
        assert all(verdict.result().score == 1.0 for verdict in pool.submit(own)), "the workers still work"
    accepted = [answer for (answer, _), verdict in zip(answers, verdicts, strict=True) if verdict.score >= 1.0]
    assert not accepted
    assert {verdict.outcome for verdict in verdicts} <= {DONE, TIMED_OUT}
