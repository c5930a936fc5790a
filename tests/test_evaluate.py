"""Entropies and direct guesses against NumPy, and accuracies with their intervals against numbers worked out by hand."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.entropy import Scores, _buckets, score_documents, top_k_entropy, top_k_values
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.evaluate import (
    EvaluationSet,
    Evaluator,
    Held,
    by_split,
    choose_evaluation_set,
    direct_accuracy,
    evaluation_metrics,
)
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import POLICY, SHAPE, random_params

# --- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 37])
def test_top_k_entropy(k):
    """Of the k likeliest, renormalized; with k the whole vocabulary it is the entropy."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    top = -np.sort(-logits.astype(np.float64), axis=-1)[:, :k]
    shares = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    np.testing.assert_allclose(top_k_entropy(top_k_values(logits, k)), -(shares * np.log(shares)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("k", [2, 37])
def test_top_k_entropy_without_renormalizing(k):
    """What the k likeliest contribute to the entropy over all; with k the whole vocabulary both are that."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    shares = -np.sort(-reference.softmax(logits.astype(np.float64)), axis=-1)[:, :k]
    found = top_k_entropy(top_k_values(logits, k), jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(found, -(shares * np.log(shares)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "k"), [(1024, 16), (300, 16), (17, 16), (16, 16), (5, 2), (2, 2), (151, 3), (700, 40)]
)
def test_the_largest_are_those_of_sorting(size, k):
    rng = np.random.default_rng(size)
    values = np.round(rng.normal(size=(40, size)), 1).astype(np.float32)  # With equal ones,
    values[:, rng.random(size) < 0.1] = -np.inf  # and ids that stand for no token.
    np.testing.assert_array_equal(top_k_values(values, k), -np.sort(-values, axis=1)[:, :k])


def test_top_k_entropy_at_its_ends():
    uniform, certain = np.zeros((1, 20), np.float32), np.full((1, 20), -1e4, np.float32)
    certain[0, 7] = 1e4
    np.testing.assert_allclose(top_k_entropy(top_k_values(uniform, 16)), np.log(16), rtol=1e-6)
    np.testing.assert_array_equal(top_k_entropy(top_k_values(certain, 16)), 0.0)


@pytest.fixture(scope="module")
def params():
    return random_params(POLICY, 0)


DOCUMENTS = [np.random.default_rng(n).integers(0, SHAPE.vocab, n).tolist() for n in (1, 7, 4, 8, 2)]
BOS = 5


@pytest.fixture(scope="module")
def scored(params):
    """Return a function of (size, batch, chunk)."""

    def score(size, batch, chunk):
        sizes = {"size": size, "batch": batch, "top_k": 6, "chunk": chunk}
        return score_documents(POLICY, params, DOCUMENTS, bos_id=BOS, mesh=make_mesh(-1, 1, 1), **sizes)

    return score


def test_scores_are_those_of_every_document_alone(params, scored):
    scores = scored(size=8, batch=2, chunk=5)
    for ids, score in zip(DOCUMENTS, scores, strict=True):
        logits = reference.logits(params, SHAPE, [BOS, *ids[:-1]])
        shares = reference.softmax(-np.sort(-logits, axis=-1)[:, :6])
        assert score.entropy_S.shape == score.right_S.shape == (len(ids),)
        np.testing.assert_allclose(score.entropy_S, -(shares * np.log(shares)).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(score.right_S, logits.argmax(-1) == ids)


def test_scores_know_a_right_guess(params, scored, monkeypatch):
    """Documents that say what the policy would say next are right at every position."""
    greedy = []
    for _ in range(3):
        greedy.append(int(reference.logits(params, SHAPE, [BOS, *greedy])[-1].argmax()))
    monkeypatch.setattr(f"{__name__}.DOCUMENTS", [greedy, [*greedy[:2], (greedy[2] + 1) % SHAPE.vocab]])
    first, second = scored(size=8, batch=2, chunk=5)
    assert first.right_S.tolist() == [True, True, True] and second.right_S.tolist() == [True, True, False]


def test_padding_batch_and_chunk_change_nothing(scored):
    for ours, theirs in zip(scored(size=12, batch=3, chunk=100), scored(size=8, batch=2, chunk=5), strict=True):
        np.testing.assert_allclose(ours.entropy_S, theirs.entropy_S, atol=1e-5)
        np.testing.assert_array_equal(ours.right_S, theirs.right_S)


def test_lengths_share_buckets_and_every_document_is_in_one():
    lengths = [1, 64, 65, 128, 129, 256, 200, 3, 70]
    buckets = list(_buckets(np.array(lengths), 256, 1))
    assert [(padded, numbers) for padded, numbers in buckets] == [
        (64, [0, 1, 7]), (128, [2, 3]), (128, [8]), (256, [4]), (256, [5]), (256, [6])
    ]  # fmt: skip
    assert [padded for padded, _ in _buckets(np.array([1, 100]), 100, 8)] == [100]


# --- accuracies --------------------------------------------------------------------------------------


def positions(documents, entropies) -> list[Position]:
    pairs = zip(documents, np.broadcast_to(entropies, len(documents)), strict=True)
    return [Position(document, i, float(entropy)) for i, (document, entropy) in enumerate(pairs)]


def test_splits_are_nested_and_their_thresholds_are_excluded():
    right = np.array([0.0, 1, 0, 1, 0.25])
    result = by_split(right, positions([0, 1, 2, 3, 4], [0.5, 0.6, 1.0, 1.5, 1.51]))
    assert {name: split["positions"] for name, split in result.items()} == {"easy": 4, "medium": 2, "hard": 1}
    accuracies = [result[name]["accuracy"] for name in ("easy", "medium", "hard")]
    np.testing.assert_allclose(accuracies, [2.25 / 4, 1.25 / 2, 0.25])


def test_the_interval_counts_documents_not_positions():
    """Ten documents of ten positions, five right throughout and five wrong throughout.

    Each document's residuals add up to 5 or -5: variance 10/9 · 10 · 25 / 100², standard error 1/6. Positions taken as
    independent would give 1/20.
    """
    right = np.repeat([1.0] * 5 + [0.0] * 5, 10)
    easy = by_split(right, positions(np.repeat(np.arange(10), 10), 2.0))["easy"]
    np.testing.assert_allclose([easy["accuracy"], easy["low"], easy["high"]], [0.5, 0.5 - 1.96 / 6, 0.5 + 1.96 / 6])


def test_the_interval_of_independent_positions_is_the_textbooks():
    """30 of 100 right, each in a document of its own: the standard error is sqrt(p (1 - p) / (n - 1))."""
    right = np.arange(100) < 30
    easy = by_split(right.astype(float), positions(np.random.default_rng(0).permutation(100), 2.0))["easy"]
    np.testing.assert_allclose(easy["high"] - 0.3, 1.96 * np.sqrt(0.3 * 0.7 / 99))
    np.testing.assert_allclose(0.3 - easy["low"], 1.96 * np.sqrt(0.3 * 0.7 / 99))


def test_an_interval_ends_at_0_and_1():
    easy = by_split(np.array([1.0, 0, 1, 1]), positions([0, 0, 1, 2], 2.0))["easy"]
    assert easy["low"] >= 0 and easy["high"] == 1.0


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("documents", [[7], [7] * 40, [0, 1, 2], [0] * 5 + [1] * 5])
def test_documents_that_show_no_variance_get_the_interval_of_so_many_observations(right, documents):
    """Wilson's, as he defines it: the p whose own standard error, for n documents, reaches the mean at 1.96."""
    easy = by_split(np.full(len(documents), right), positions(documents, 2.0))["easy"]
    count = len(set(documents))
    for end in (easy["low"], easy["high"]):
        np.testing.assert_allclose(abs(end - right), 1.96 * np.sqrt(end * (1 - end) / count), atol=1e-7)
    assert easy["low"] <= right <= easy["high"] and easy["high"] - easy["low"] > 0.5


def test_one_document_of_mixed_positions_is_one_observation():
    easy = by_split(np.arange(50) % 2 * 1.0, positions([3] * 50, 2.0))["easy"]
    assert easy["positions"] == 50 and easy["low"] < 0.06 and easy["high"] > 0.94


def test_an_empty_split_knows_nothing():
    result = by_split(np.ones(2), positions([0, 1], 0.7))
    assert result["hard"] == {"accuracy": 0.0, "low": 0.0, "high": 1.0, "positions": 0}
    assert by_split(np.zeros(0), [])["easy"] == result["hard"]


def test_direct_accuracy_reads_the_position_it_is_asked_for():
    scores = [
        Scores(np.zeros(3), np.array(right), np.zeros(3)) for right in ([True, False, False], [False, False, True])
    ]
    asked = [Position(1, 2, 1.0), Position(0, 0, 1.0), Position(0, 1, 1.0), Position(1, 0, 1.0)]
    assert direct_accuracy(EvaluationSet(asked, []), scores).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_evaluation_metrics():
    empty = {"accuracy": 0.0, "positions": 0}
    reasoning = {"easy": {"accuracy": 0.5, "positions": 2}, "hard": empty}
    direct = {"easy": {"accuracy": 0.25, "positions": 2}, "hard": empty}
    assert evaluation_metrics(reasoning) == {"eval/reasoning/easy": 0.5}
    assert evaluation_metrics(reasoning, direct) == {"eval/reasoning/easy": 0.5, "eval/direct/easy": 0.25}


# --- the evaluation set ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """Return a function of (count, batch, seed) that chooses among 20 positions of two documents."""
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Ann has {n} apples and {n + 3} pears, {2 * n + 3} in all." for n in range(40)]
    train_sentencepiece(texts, 300, directory / "tokenizer.model")
    tokenizer = load_tokenizer(directory)
    documents = [tokenizer.encode(text) for text in texts[:2]]
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), tokenizer)
    asked = [Position(i % 2, i, 1.0 + i) for i in range(20)]
    return lambda count, batch, seed=0: choose_evaluation_set(
        builder, documents, asked, count=count, batch=batch, seed=seed
    )


def test_an_evaluation_set_is_a_sample_in_whole_batches(choose):
    chosen = choose(count=10, batch=4)
    assert len(chosen.positions) == len(set(chosen.positions)) == 10 and len(chosen.batches) == 3
    asked = np.concatenate([batch.position_P for batch in chosen.batches])
    assert asked[:10].tolist() == [p.position for p in chosen.positions] and (asked[10:] == asked[9]).all()
    # The number of a prompt fixes its noise: each has its own.
    assert np.concatenate([batch.ids_P for batch in chosen.batches])[:10].tolist() == list(range(10))
    assert {b.tokens_PxS.shape for b in chosen.batches} == {(4, 16)}


def test_an_evaluation_set_is_a_function_of_the_seed(choose):
    assert choose(10, 4).positions == choose(10, 5).positions
    assert len({tuple(choose(10, 4, seed).positions) for seed in range(5)}) == 5
    assert set(choose(8, 4).positions) < set(choose(10, 4).positions), "a smaller set is not part of a larger one"


def test_fewer_positions_than_asked_for_are_all_taken(choose):
    assert [p.position for p in choose(50, 8).positions] == list(range(20))


def test_what_fills_up_a_batch_is_not_counted(choose):
    """Three batches of four for ten positions; a stand-in for the sampler tells rows and samples apart."""
    chosen = choose(count=10, batch=4)

    def sample(params, prompts, step):
        value = 10 * prompts.position_P[:, None] + np.arange(3)
        rollouts = types.SimpleNamespace(lengths_PxG=value + 2)
        return types.SimpleNamespace(reward_PxG=value, status_PxG=value + 1, rollouts=rollouts)

    sample.weights = lambda params: params
    evaluator = types.SimpleNamespace(_sample=sample)
    reward, status, length = Evaluator.predictions(evaluator, None, Held([], [], chosen))
    expected = 10 * np.array([p.position for p in chosen.positions])[:, None] + np.arange(3)
    np.testing.assert_array_equal(reward, expected)
    np.testing.assert_array_equal(status, expected + 1)
    np.testing.assert_array_equal(length, expected + 2)
