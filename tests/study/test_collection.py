"""The scores of a study from the summaries of evaluations."""

from __future__ import annotations

from rpt_jax.study.collection import suite_scores
from rpt_jax.study.outcome import Score


def test_scores_have_the_name_of_their_evaluation():
    average = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}
    evaluation = {"suite": "questions", "scores": {"avg@4": {"micro": average}}}
    assert suite_scores("gsm8k", evaluation) == {"gsm8k/avg@4": Score(0.5, 0.25, 0.75, 8)}


def test_next_token_accuracies_have_a_name_only_if_it_is_another():
    accuracy = {"hard": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "positions": 8}, "easy": {"positions": 0}}
    summary = {"difficulties": {"direct/prefix": accuracy, "reasoning/prefix/random@1": accuracy}}
    evaluation = {"suite": "next_token", "summary": summary, "scores": {}}
    score = Score(0.5, 0.25, 0.75, 8)
    assert suite_scores("next_token", evaluation) == {"direct/hard": score, "reasoning/hard": score}
    assert suite_scores("unseen", evaluation) == {"unseen/direct/hard": score, "unseen/reasoning/hard": score}
