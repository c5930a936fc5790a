"""Entropies and direct guesses, compared with NumPy."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
import pytest

from rpt_jax.config import DataConfig, Experiment, TrainingConfig
from rpt_jax.corpus.entropy import (
    BIN_NATS,
    BINS,
    Scorer,
    Scores,
    fraction_above,
    length_buckets,
    stored_entropies,
    top_k_entropy,
    top_k_values,
)
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.model.transformer import Params
from rpt_jax.tokenizers.tokenizer import Tokenizer
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import POLICY, SHAPE, random_params

TOP_K = 6
BOS = 5
WINDOWS = [np.random.default_rng(n).integers(0, SHAPE.vocab, n).tolist() for n in (1, 7, 4, 8, 2)]

Score = Callable[..., list[Scores]]


# --- entropies of logits ---


@pytest.mark.parametrize("k", [2, 5, 37])
def test_top_k_entropy_is_renormalized(k: int) -> None:
    """With k the size of the vocabulary, it is the entropy."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    top = -np.sort(-logits.astype(np.float64), axis=-1)[:, :k]
    probabilities = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    expected = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(top_k_entropy(top_k_values(logits, k)), expected, rtol=1e-5)


@pytest.mark.parametrize("k", [2, 37])
def test_top_k_entropy_without_renormalization_is_a_part_of_the_entropy(k: int) -> None:
    """With k the size of the vocabulary, it is all of it."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    probabilities = -np.sort(-reference.softmax(logits.astype(np.float64)), axis=-1)[:, :k]
    found = top_k_entropy(top_k_values(logits, k), jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(found, -(probabilities * np.log(probabilities)).sum(-1), rtol=1e-5)


def test_top_k_entropy_of_uniform_and_certain_predictions() -> None:
    uniform, certain = np.zeros((1, 20), np.float32), np.full((1, 20), -1e4, np.float32)
    certain[0, 7] = 1e4
    np.testing.assert_allclose(top_k_entropy(top_k_values(uniform, 16)), np.log(16), rtol=1e-6)
    np.testing.assert_array_equal(top_k_entropy(top_k_values(certain, 16)), 0.0)


@pytest.mark.parametrize(
    ("size", "k"), [(1024, 16), (300, 16), (17, 16), (16, 16), (5, 2), (2, 2), (151, 3), (700, 40)]
)
def test_top_k_values_are_those_of_sorting(size: int, k: int) -> None:
    """Also with equal values, and ids that have no token."""
    rng = np.random.default_rng(size)
    values = np.round(rng.normal(size=(40, size)), 1).astype(np.float32)
    values[:, rng.random(size) < 0.1] = -np.inf
    np.testing.assert_array_equal(top_k_values(values, k), -np.sort(-values, axis=1)[:, :k])


# --- scores of windows ---


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(POLICY, 0)


@pytest.fixture(scope="module")
def score(params: Params) -> Score:
    """Return a function that scores windows with the given sizes."""
    tokenizer = cast(Tokenizer, types.SimpleNamespace(bos_id=BOS))

    def run(
        windows: Sequence[Sequence[int]], *, max_tokens: int, batch: int, chunk: int, **others: Any
    ) -> list[Scores]:
        data = DataConfig(max_document_tokens=max_tokens, score_batch_windows=batch, entropy_top_k=TOP_K)
        config = Experiment(data=data, training=TrainingConfig(logit_chunk_tokens=chunk))
        return Scorer(POLICY, params, tokenizer, make_mesh(-1, 1, 1), config).score(windows, **others)

    return run


def test_scores_of_a_batch_are_those_of_each_window_alone(params: Params, score: Score) -> None:
    for ids, scores in zip(WINDOWS, score(WINDOWS, max_tokens=8, batch=2, chunk=5), strict=True):
        logits = reference.logits(params, SHAPE, [BOS, *ids[:-1]])
        probabilities = reference.softmax(-np.sort(-logits, axis=-1)[:, :TOP_K])
        partial = -np.sort(-reference.softmax(logits), axis=-1)[:, :TOP_K]
        assert scores.entropy_S.shape == scores.top1_correct_S.shape == scores.partial_entropy_S.shape == (len(ids),)
        np.testing.assert_allclose(scores.entropy_S, -(probabilities * np.log(probabilities)).sum(-1), atol=1e-5)
        np.testing.assert_allclose(scores.partial_entropy_S, -(partial * np.log(partial)).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(scores.top1_correct_S, logits.argmax(-1) == ids)


def test_the_policys_own_continuation_is_correct_at_every_position(params: Params, score: Score) -> None:
    greedy: list[int] = []
    for _ in range(3):
        greedy.append(int(reference.logits(params, SHAPE, [BOS, *greedy])[-1].argmax()))
    wrong_at_end = [*greedy[:2], (greedy[2] + 1) % SHAPE.vocab]
    first, second = score([greedy, wrong_at_end], max_tokens=8, batch=2, chunk=5)
    assert first.top1_correct_S.tolist() == [True, True, True]
    assert second.top1_correct_S.tolist() == [True, True, False]


def test_padding_batch_and_chunk_sizes_make_no_difference(score: Score) -> None:
    ours = score(WINDOWS, max_tokens=12, batch=3, chunk=100)
    theirs = score(WINDOWS, max_tokens=8, batch=2, chunk=5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.entropy_S, b.entropy_S, atol=1e-5)
        np.testing.assert_array_equal(a.top1_correct_S, b.top1_correct_S)


def test_progress_counts_batches(score: Score) -> None:
    batches: list[None] = []
    score(WINDOWS, max_tokens=8, batch=2, chunk=5, advance=lambda: batches.append(None))
    assert len(batches) == 3
    assert score([], max_tokens=8, batch=2, chunk=5) == []


def test_every_window_is_in_one_batch_with_windows_of_similar_length() -> None:
    lengths = [1, 64, 65, 128, 129, 256, 200, 3, 70]
    assert list(length_buckets(np.array(lengths), 256, 1)) == [
        (64, [0, 1, 7]), (128, [2, 3]), (128, [8]), (256, [4]), (256, [5]), (256, [6])
    ]  # fmt: skip
    assert [padded for padded, _ in length_buckets(np.array([1, 100]), 100, 8)] == [100]


def test_special_tokens_are_stored_without_entropies() -> None:
    scores = Scores(np.array([1.0, 2.0]), np.array([True, False]), np.array([0.5, 1.5]))
    renormalized, partial = stored_entropies(scores, np.array([0, 3]))
    assert renormalized.tolist() == [-1, 2] and partial.tolist() == [-1, 1.5]


def test_the_fraction_above_a_threshold_is_read_from_the_histogram() -> None:
    histogram = np.zeros(BINS, int)
    histogram[[9, 10, 79]] = [1, 2, 1]  # 0.45 to 0.5, 0.5 to 0.55, and 3.95 nats or more.
    assert fraction_above(histogram, 10 * BIN_NATS) == 0.75
    assert fraction_above(np.zeros(BINS), 0.5) == 0
    with pytest.raises(ValueError, match="multiple"):
        fraction_above(histogram, 0.51)
