"""Entropies and correctness of next-token predictions against NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rpt_jax.corpus.entropy import _buckets, score_documents, top_k_entropy, top_k_values
from rpt_jax.distributed.sharding import make_mesh
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import POLICY, SHAPE, random_params


@pytest.mark.parametrize("k", [2, 5, 37])
def test_top_k_entropy_is_that_of_the_renormalized_tokens(k):
    """With k equal to the vocabulary size it is the entropy."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    top = -np.sort(-logits.astype(np.float64), axis=-1)[:, :k]
    shares = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    np.testing.assert_allclose(top_k_entropy(top_k_values(logits, k)), -(shares * np.log(shares)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("k", [2, 37])
def test_top_k_entropy_without_renormalizing(k):
    """It is the contribution of the k most likely tokens to the entropy over the vocabulary."""
    logits = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32) * 3
    shares = -np.sort(-reference.softmax(logits.astype(np.float64)), axis=-1)[:, :k]
    found = top_k_entropy(top_k_values(logits, k), jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(found, -(shares * np.log(shares)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "k"), [(1024, 16), (300, 16), (17, 16), (16, 16), (5, 2), (2, 2), (151, 3), (700, 40)]
)
def test_top_k_values_equal_sorting(size, k):
    rng = np.random.default_rng(size)
    values = np.round(rng.normal(size=(40, size)), 1).astype(np.float32)  # With ties.
    values[:, rng.random(size) < 0.1] = -np.inf  # Absent ids.
    np.testing.assert_array_equal(top_k_values(values, k), -np.sort(-values, axis=1)[:, :k])


def test_top_k_entropy_of_uniform_and_certain_distributions():
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


def test_scores_of_a_batch_equal_scores_of_single_documents(params, scored):
    scores = scored(size=8, batch=2, chunk=5)
    for ids, score in zip(DOCUMENTS, scores, strict=True):
        logits = reference.logits(params, SHAPE, [BOS, *ids[:-1]])
        shares = reference.softmax(-np.sort(-logits, axis=-1)[:, :6])
        assert score.entropy_S.shape == score.right_S.shape == (len(ids),)
        np.testing.assert_allclose(score.entropy_S, -(shares * np.log(shares)).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(score.right_S, logits.argmax(-1) == ids)


def test_documents_of_greedy_tokens_are_right_at_every_position(params, scored, monkeypatch):
    greedy = []
    for _ in range(3):
        greedy.append(int(reference.logits(params, SHAPE, [BOS, *greedy])[-1].argmax()))
    monkeypatch.setattr(f"{__name__}.DOCUMENTS", [greedy, [*greedy[:2], (greedy[2] + 1) % SHAPE.vocab]])
    first, second = scored(size=8, batch=2, chunk=5)
    assert first.right_S.tolist() == [True, True, True] and second.right_S.tolist() == [True, True, False]


def test_scores_do_not_depend_on_padding_batch_and_chunk(scored):
    for ours, theirs in zip(scored(size=12, batch=3, chunk=100), scored(size=8, batch=2, chunk=5), strict=True):
        np.testing.assert_allclose(ours.entropy_S, theirs.entropy_S, atol=1e-5)
        np.testing.assert_array_equal(ours.right_S, theirs.right_S)


def test_every_document_is_in_one_bucket_of_similar_lengths():
    lengths = [1, 64, 65, 128, 129, 256, 200, 3, 70]
    buckets = list(_buckets(np.array(lengths), 256, 1))
    assert [(padded, numbers) for padded, numbers in buckets] == [
        (64, [0, 1, 7]), (128, [2, 3]), (128, [8]), (256, [4]), (256, [5]), (256, [6])
    ]  # fmt: skip
    assert [padded for padded, _ in _buckets(np.array([1, 100]), 100, 8)] == [100]
