"""Accuracies with confidence intervals against hand-computed numbers, and the choice of the evaluation set."""

from __future__ import annotations

import types

import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.entropy import Scores
from rpt_jax.evaluate import (
    EvaluationSet,
    by_difficulty,
    choose_evaluation_set,
    direct_accuracy,
    evaluation_metrics,
    sample_predictions,
)
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece


def positions(documents, entropies) -> list[Position]:
    pairs = zip(documents, np.broadcast_to(entropies, len(documents)), strict=True)
    return [Position(document, i, float(entropy)) for i, (document, entropy) in enumerate(pairs)]


def test_difficulties_are_nested_and_exclude_their_thresholds():
    right = np.array([0.0, 1, 0, 1, 0.25])
    result = by_difficulty(right, positions([0, 1, 2, 3, 4], [0.5, 0.6, 1.0, 1.5, 1.51]))
    assert {name: part["positions"] for name, part in result.items()} == {"easy": 4, "medium": 2, "hard": 1}
    accuracies = [result[name]["accuracy"] for name in ("easy", "medium", "hard")]
    np.testing.assert_allclose(accuracies, [2.25 / 4, 1.25 / 2, 0.25])


def test_interval_treats_documents_as_the_independent_units():
    """Ten documents have ten positions each. In five documents all are right, in the other five all are wrong.

    The residuals of each document sum to 5 or -5, so the variance is 10/9 · 10 · 25 / 100² and the standard error 1/6.
    With independent positions it would be 1/20.
    """
    right = np.repeat([1.0] * 5 + [0.0] * 5, 10)
    easy = by_difficulty(right, positions(np.repeat(np.arange(10), 10), 2.0))["easy"]
    np.testing.assert_allclose([easy["accuracy"], easy["low"], easy["high"]], [0.5, 0.5 - 1.96 / 6, 0.5 + 1.96 / 6])


def test_interval_of_one_position_per_document_has_the_binomial_standard_error():
    """With 30 of 100 right it is sqrt(p (1 - p) / (n - 1))."""
    right = np.arange(100) < 30
    easy = by_difficulty(right.astype(float), positions(np.random.default_rng(0).permutation(100), 2.0))["easy"]
    np.testing.assert_allclose(easy["high"] - 0.3, 1.96 * np.sqrt(0.3 * 0.7 / 99))
    np.testing.assert_allclose(0.3 - easy["low"], 1.96 * np.sqrt(0.3 * 0.7 / 99))


def test_interval_is_clipped_to_0_and_1():
    easy = by_difficulty(np.array([1.0, 0, 1, 1]), positions([0, 0, 1, 2], 2.0))["easy"]
    assert easy["low"] >= 0 and easy["high"] == 1.0


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("documents", [[7], [7] * 40, [0, 1, 2], [0] * 5 + [1] * 5])
def test_documents_without_variance_have_the_wilson_interval(right, documents):
    """Its ends are the p whose own standard error, for n documents, times 1.96 reaches the mean."""
    easy = by_difficulty(np.full(len(documents), right), positions(documents, 2.0))["easy"]
    count = len(set(documents))
    for end in (easy["low"], easy["high"]):
        np.testing.assert_allclose(abs(end - right), 1.96 * np.sqrt(end * (1 - end) / count), atol=1e-7)
    assert easy["low"] <= right <= easy["high"] and easy["high"] - easy["low"] > 0.5


def test_a_single_document_is_one_observation():
    easy = by_difficulty(np.arange(50) % 2 * 1.0, positions([3] * 50, 2.0))["easy"]
    assert easy["positions"] == 50 and easy["low"] < 0.06 and easy["high"] > 0.94


def test_interval_without_positions_is_0_to_1():
    result = by_difficulty(np.ones(2), positions([0, 1], 0.7))
    assert result["hard"] == {"accuracy": 0.0, "low": 0.0, "high": 1.0, "positions": 0}
    assert by_difficulty(np.zeros(0), [])["easy"] == result["hard"]


def test_direct_accuracy_is_that_of_the_given_positions():
    scores = [
        Scores(np.zeros(3), np.array(right), np.zeros(3)) for right in ([True, False, False], [False, False, True])
    ]
    positions = [Position(1, 2, 1.0), Position(0, 0, 1.0), Position(0, 1, 1.0), Position(1, 0, 1.0)]
    assert direct_accuracy(EvaluationSet(positions=positions, batches=[]), scores).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_evaluation_metrics_omit_difficulties_without_positions():
    empty = {"accuracy": 0.0, "positions": 0}
    reasoning = {"easy": {"accuracy": 0.5, "positions": 2}, "hard": empty}
    direct = {"easy": {"accuracy": 0.25, "positions": 2}, "hard": empty}
    assert evaluation_metrics(reasoning) == {"eval/reasoning/easy": 0.5}
    assert evaluation_metrics(reasoning, direct) == {"eval/reasoning/easy": 0.5, "eval/direct/easy": 0.25}


# --- the evaluation set ---


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """Return a function of (count, batch, seed) that draws from 20 positions of two documents."""
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Ann has {n} apples and {n + 3} pears, {2 * n + 3} in all." for n in range(40)]
    train_sentencepiece(texts, 300, directory / "tokenizer.model")
    tokenizer = load_tokenizer(directory)
    documents = [tokenizer.encode(text) for text in texts[:2]]
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), tokenizer)
    candidates = [Position(i % 2, i, 1.0 + i) for i in range(20)]
    return lambda count, batch, seed=0: choose_evaluation_set(
        builder, documents, candidates, count=count, batch=batch, seed=seed
    )


def test_evaluation_set_is_a_sample_in_whole_batches(choose):
    chosen = choose(count=10, batch=4)
    assert len(chosen.positions) == len(set(chosen.positions)) == 10 and len(chosen.batches) == 3
    position = np.concatenate([batch.position_P for batch in chosen.batches])
    assert position[:10].tolist() == [p.position for p in chosen.positions]
    assert (position[10:] == position[9]).all()
    # The id of a prompt determines its noise, so ids are different.
    assert np.concatenate([batch.ids_P for batch in chosen.batches])[:10].tolist() == list(range(10))
    assert {b.tokens_PxS.shape for b in chosen.batches} == {(4, 16)}


def test_evaluation_set_is_a_function_of_the_seed(choose):
    assert choose(10, 4).positions == choose(10, 5).positions
    assert len({tuple(choose(10, 4, seed).positions) for seed in range(5)}) == 5
    assert set(choose(8, 4).positions) < set(choose(10, 4).positions), "a smaller set is a subset of a larger one"


def test_all_positions_are_used_if_there_are_fewer_than_requested(choose):
    assert [p.position for p in choose(50, 8).positions] == list(range(20))


class StubSampler:
    """Returns rollouts whose lengths identify the prompt and the sample."""

    def __call__(self, weights, prompts, step):
        value = 10 * prompts.position_P[:, None] + np.arange(3)
        return types.SimpleNamespace(lengths_PxG=value + 2), None


class StubRewarder:
    """Returns rewards and statuses that identify the prompt and the sample."""

    def prefix_match(self, prompts, rollouts):
        value = rollouts.lengths_PxG - 2
        return types.SimpleNamespace(reward_PxG=value, status_PxG=value + 1)


def test_padding_of_the_last_batch_is_not_counted(choose):
    """Ten positions take three batches of four."""
    chosen = choose(count=10, batch=4)
    reward, status, length = sample_predictions(StubSampler(), StubRewarder(), None, chosen)
    expected = 10 * np.array([p.position for p in chosen.positions])[:, None] + np.arange(3)
    np.testing.assert_array_equal(reward, expected)
    np.testing.assert_array_equal(status, expected + 1)
    np.testing.assert_array_equal(length, expected + 2)
