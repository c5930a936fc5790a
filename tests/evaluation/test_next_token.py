"""Accuracies with confidence intervals against hand-computed numbers, and the choice of the evaluation set."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.entropy import Scores
from rpt_jax.evaluation.next_token import (
    EvaluationSet,
    by_difficulty,
    choose_evaluation_set,
    direct_accuracy,
    evaluation_metrics,
    sample_predictions,
)
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.rewards.rewarder import RewardedRollouts
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece


def positions(entropies) -> list[Position]:
    return [Position(0, i, float(entropy)) for i, entropy in enumerate(entropies)]


def accuracy_of_easy(right, clusters) -> dict:
    """Return the accuracy, with its interval, at positions of the given clusters."""
    return by_difficulty(np.asarray(right, float), positions(np.full(len(right), 2.0)), np.asarray(clusters))["easy"]


def test_difficulties_are_nested_and_exclude_their_thresholds():
    right = np.array([0.0, 1, 0, 1, 0.25])
    result = by_difficulty(right, positions([0.5, 0.6, 1.0, 1.5, 1.51]), np.arange(5))
    assert {name: part["positions"] for name, part in result.items()} == {"easy": 4, "medium": 2, "hard": 1}
    accuracies = [result[name]["accuracy"] for name in ("easy", "medium", "hard")]
    np.testing.assert_allclose(accuracies, [2.25 / 4, 1.25 / 2, 0.25])


def test_interval_treats_clusters_as_the_independent_units():
    """Ten documents have ten positions each. In five documents all are right, in the other five all are wrong.

    The residuals of each document sum to 5 or -5, so the variance is 10/9 · 10 · 25 / 100² and the standard error 1/6.
    With independent positions it would be 1/20.
    """
    easy = accuracy_of_easy(np.repeat([1.0] * 5 + [0.0] * 5, 10), np.repeat(np.arange(10), 10))
    half_width = scipy.stats.t.ppf(0.975, df=9) / 6
    np.testing.assert_allclose([easy["accuracy"], easy["low"], easy["high"]], [0.5, 0.5 - half_width, 0.5 + half_width])


def test_interval_of_one_position_per_cluster_is_that_of_a_t_test():
    right = np.arange(100) < 30
    easy = accuracy_of_easy(right, np.random.default_rng(0).permutation(100))
    interval = scipy.stats.ttest_1samp(right, popmean=0).confidence_interval(0.95)
    np.testing.assert_allclose([easy["low"], easy["high"]], [interval.low, interval.high])


def test_interval_is_clipped_to_0_and_1():
    easy = accuracy_of_easy([1.0, 0, 1, 1], [0, 0, 1, 2])
    assert easy["low"] >= 0 and easy["high"] == 1.0


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("documents", [[7], [7] * 40, [0, 1, 2], [0] * 5 + [1] * 5])
def test_documents_without_variance_have_the_wilson_interval(right, documents):
    """Its ends are the p whose own standard error, for n documents, times 1.96 reaches the mean."""
    easy = accuracy_of_easy(np.full(len(documents), right), documents)
    count = len(set(documents))
    for end in (easy["low"], easy["high"]):
        np.testing.assert_allclose(abs(end - right), 1.96 * np.sqrt(end * (1 - end) / count), atol=1e-7)
    assert easy["low"] <= right <= easy["high"] and easy["high"] - easy["low"] > 0.5


def test_a_single_document_is_one_observation():
    easy = accuracy_of_easy(np.arange(50) % 2 * 1.0, [3] * 50)
    assert easy["positions"] == 50 and easy["low"] < 0.06 and easy["high"] > 0.94


def test_interval_without_positions_is_0_to_1():
    result = by_difficulty(np.ones(2), positions([0.7, 0.7]), np.arange(2))
    assert result["hard"] == {"accuracy": 0.0, "low": 0.0, "high": 1.0, "positions": 0}
    assert by_difficulty(np.zeros(0), [], np.zeros(0, int))["easy"] == result["hard"]


@pytest.mark.parametrize(("clusters", "windows", "least"), [(10, 40, 0.93), (40, 30, 0.93), (300, 2, 0.93)])
def test_intervals_cover_the_true_accuracy_as_often_as_they_say(clusters, windows, least):
    """Simulated evaluations: clusters differ in their difficulty, and so do the windows of a cluster, a little.

    Ten clusters are as many as there are templates that training never sees. Clusters of windows, instead of documents, make
    the intervals too narrow.
    """
    rng = np.random.default_rng(0)
    trials = 500
    cluster_N = np.repeat(np.arange(clusters), windows)
    of_cluster_TxC = 0.4 + 0.2 * rng.choice([-1.0, 1.0], (trials, clusters))
    of_window_TxN = of_cluster_TxC[:, cluster_N] + 0.1 * rng.uniform(-1, 1, (trials, len(cluster_N)))
    # Each window has a position, of which eight samples are right with the window's probability.
    right_TxN = rng.binomial(8, of_window_TxN) / 8

    all_easy = positions(np.full(len(cluster_N), 0.7))

    def coverage(units_N: np.ndarray) -> float:
        intervals = [by_difficulty(right_N, all_easy, units_N)["easy"] for right_N in right_TxN]
        return float(np.mean([easy["low"] <= 0.4 <= easy["high"] for easy in intervals]))

    assert least <= coverage(cluster_N) <= 0.97
    if windows >= 30:
        assert coverage(np.arange(len(cluster_N))) < 0.6


def test_direct_accuracy_is_that_of_the_given_positions():
    scores = [
        Scores(np.zeros(3), np.array(right), np.zeros(3)) for right in ([True, False, False], [False, False, True])
    ]
    positions = [Position(1, 2, 1.0), Position(0, 0, 1.0), Position(0, 1, 1.0), Position(1, 0, 1.0)]
    assert direct_accuracy(EvaluationSet(positions=positions, batches=[]), scores).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_evaluation_metrics_omit_difficulties_without_positions():
    empty = {"accuracy": 0.0, "low": 0.0, "high": 1.0, "positions": 0}
    reasoning = {"easy": {"accuracy": 0.5, "low": 0.1, "high": 0.9, "positions": 2}, "hard": empty}
    direct = {"easy": {"accuracy": 0.25, "low": 0.0, "high": 0.7, "positions": 2}, "hard": empty}
    of_reasoning = {"eval/reasoning/easy": 0.5, "eval/reasoning/easy/low": 0.1, "eval/reasoning/easy/high": 0.9}
    of_direct = {"eval/direct/easy": 0.25, "eval/direct/easy/low": 0.0, "eval/direct/easy/high": 0.7}
    assert evaluation_metrics(reasoning) == of_reasoning
    assert evaluation_metrics(reasoning, direct) == of_reasoning | of_direct


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
        return Rollouts(tokens_PxGxT=value, lengths_PxG=value + 2, logprobs_PxGxT=value, ended_PxG=value), None


class StubRewarder:
    """Returns rewards and statuses that identify the prompt and the sample."""

    def prefix_match(self, prompts, rollouts):
        value = rollouts.lengths_PxG - 2
        return RewardedRollouts(prompts=prompts, rollouts=rollouts, reward_PxG=value, status_PxG=value + 1)


def test_padding_of_the_last_batch_is_not_counted(choose):
    """Ten positions take three batches of four."""
    chosen = choose(count=10, batch=4)
    rewarded = sample_predictions(StubSampler(), StubRewarder(), None, chosen)
    expected = 10 * np.array([p.position for p in chosen.positions])[:, None] + np.arange(3)
    np.testing.assert_array_equal(rewarded.reward_PxG, expected)
    np.testing.assert_array_equal(rewarded.status_PxG, expected + 1)
    np.testing.assert_array_equal(rewarded.rollouts.lengths_PxG, expected + 2)
    np.testing.assert_array_equal(rewarded.prompts.position_P, [p.position for p in chosen.positions])
