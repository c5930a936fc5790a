"""Log-probabilities of given tokens: in chunks, at a temperature, with a float32 head, and with absent ids."""

from __future__ import annotations

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.transformer import Head
from rpt_jax.objective.logprobs import (
    chosen_logprobs,
    over_row_chunks,
    over_token_chunks,
    scaled_logits,
    scores,
    token_logprobs,
)
from tests.helpers import policy_reference as reference


def logprob_inputs(tokens: int, vocab: int = 11, width: int = 4):
    rng = np.random.default_rng(tokens)
    head_VxD, hidden_MxD = rng.standard_normal((vocab, width)), rng.standard_normal((tokens, width)) * 3
    return head_VxD.astype(np.float32), hidden_MxD.astype(np.float32), rng.integers(0, vocab, tokens).astype(np.int32)


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.5, 0.8, 1.0, 2.0]))
@settings(deadline=None, max_examples=12)
def test_token_logprobs_equal_numpy_for_any_chunk(tokens, chunk, temperature):
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(tokens)
    ours = token_logprobs(Head(head_VxD), hidden_MxD, tokens_M, temperature, chunk)
    logits = hidden_MxD.astype(np.float64) @ head_VxD.T.astype(np.float64) / temperature
    np.testing.assert_allclose(ours, reference.log_softmax(logits)[np.arange(tokens), tokens_M], atol=1e-5)


def test_logits_are_float32_for_a_bfloat16_trunk():
    """Logits in bfloat16 would have errors of about 1e-2."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(5, width=64)
    rounded = jnp.asarray(hidden_MxD, jnp.bfloat16)
    logits = scaled_logits(Head(head_VxD), rounded, 0.8)
    assert logits.dtype == jnp.float32
    expected = np.asarray(rounded, np.float64) @ head_VxD.T.astype(np.float64) / 0.8
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    ours = chosen_logprobs(logits, tokens_M)
    np.testing.assert_allclose(ours, reference.log_softmax(expected)[np.arange(5), tokens_M], atol=1e-4)


def test_absent_ids_have_no_probability():
    """The other ids are normalized without them, and masked padding with an absent id leaves gradients finite."""
    head_VxD, hidden_MxD, _ = logprob_inputs(6)
    absent_V = np.isin(np.arange(11), [0, 4, 9, 10])
    head_VxD[absent_V] *= 100  # They would be the most likely by far.
    tokens_M, mask_M = np.array([1, 2, 3, 8, 0, 10], np.int32), np.array([1, 1, 1, 1, 0, 0], np.float32)

    def loss(head_VxD, hidden_MxD):
        logprobs_M = token_logprobs(Head(head_VxD, absent_V), hidden_MxD, tokens_M, 0.8, 4)
        return jnp.sum(logprobs_M * mask_M), logprobs_M

    grads, ours = jax.grad(loss, argnums=(0, 1), has_aux=True)(head_VxD, hidden_MxD)
    logits = hidden_MxD.astype(np.float64) @ head_VxD[~absent_V].T.astype(np.float64) / 0.8
    index_M = np.cumsum(~absent_V)[tokens_M] - 1
    np.testing.assert_allclose(ours[:4], reference.log_softmax(logits)[np.arange(4), index_M[:4]], atol=1e-5)
    assert (jnp.exp(ours[4:]) == 0).all() and all(jnp.isfinite(grad).all() for grad in grads)
    assert (grads[0][absent_V] == 0).all() and (grads[0][~absent_V] != 0).all()
    assert (jax.nn.softmax(scaled_logits(Head(head_VxD, absent_V), hidden_MxD, 0.8))[:, absent_V] == 0).all()


def test_over_token_chunks_concatenates_trees_of_outputs():
    """Outputs may have any rank and dtype, sizes need not be a multiple of the chunk, and gradients pass through."""
    x, n = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32), np.arange(7, dtype=np.int32)

    def fn(x, n):
        return {"sum": x.sum(-1) * n, "both": (jnp.sin(x), n > 3)}

    for chunk in (1, 2, 3, 7, 100):
        ours = over_token_chunks(fn, chunk, x, n)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, fn(x, n))
        assert ours["both"][1].dtype == bool
    gradient = jax.grad(lambda x: over_token_chunks(fn, 3, x, n)["both"][0].sum())(x)
    np.testing.assert_allclose(gradient, np.cos(x), rtol=1e-5)


def largest_logits(jaxpr: jax.extend.core.Jaxpr, vocab: int) -> int:
    """Return the largest number of tokens that any intermediate array holds logits of."""
    largest = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.outvars]
        largest = max([largest, *(int(np.prod(s[:-1])) for s in shapes if s and s[-1] == vocab)])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            largest = max(largest, largest_logits(inner, vocab))
    return largest


def test_logits_exist_for_one_chunk_at_a_time():
    """For 64 tokens in chunks of 8, no array of the forward or backward pass holds logits of more than 8 tokens."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(64, vocab=97)

    def loss(head, hidden, chunk):
        return token_logprobs(Head(head), hidden, tokens_M, 0.8, chunk).sum()

    for chunk in (8, 64):
        program = jax.make_jaxpr(jax.grad(functools.partial(loss, chunk=chunk), argnums=(0, 1)))(head_VxD, hidden_MxD)
        assert largest_logits(program.jaxpr, 97) == chunk


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=10)
def test_over_row_chunks_equals_the_function_on_filled_tokens(rows, size, chunk, data):
    """This holds for outputs and gradients. Outputs of skipped chunks are zeros."""
    filled = np.array(data.draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows)))
    x = np.random.default_rng(size).standard_normal((rows, size, 2)).astype(np.float32)
    counts = np.arange(size) < filled[:, None]

    def total(x):
        ours = over_row_chunks(lambda x: jnp.exp(x).sum(-1), chunk, jnp.asarray(filled), x)
        return jnp.sum(ours * counts), ours

    gradient, ours = jax.grad(total, has_aux=True)(x)
    np.testing.assert_allclose(np.where(counts, ours, 0), np.where(counts, np.exp(x).sum(-1), 0), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.where(counts[..., None], np.exp(x), 0), rtol=1e-5)
    width = max(1, chunk // rows)
    assert (np.asarray(ours)[:, -(-filled.max() // width) * width :] == 0).all()


def test_entropies_equal_their_definition():
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(7)
    score = functools.partial(scores, Head(head_VxD), temperature=0.8, entropies=True)
    logprobs, entropies = over_token_chunks(score, 3, hidden_MxD, tokens_M)
    theirs = reference.log_softmax(hidden_MxD.astype(np.float64) @ head_VxD.T / 0.8)
    np.testing.assert_allclose(entropies, -(np.exp(theirs) * theirs).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(logprobs, theirs[np.arange(7), tokens_M], atol=1e-4)
