"""Log-probabilities of given tokens: in chunks, at a temperature, with a float32 head, and with absent ids."""

from __future__ import annotations

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.model.precision import head_product
from rpt_jax.model.transformer import Head
from rpt_jax.objective.logprobs import over_token_chunks, scaled_logits, token_logprobs, token_scores
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
    ours = token_logprobs(Head(head_VxD), rounded, tokens_M, 0.8, 5)
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


@pytest.mark.parametrize("precision", ["tensorfloat32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 6, 14])
def test_scores_of_rows_and_their_gradients_equal_the_dense_ones(chunk, precision):
    """This holds for filled tokens, with logits that are kept (a chunk of all tokens) and recomputed, and with absent ids."""
    rows, size, filled_N = 2, 7, np.array([5, 2])
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(rows * size)
    hidden_NxWxD, tokens_NxW = hidden_MxD.reshape(rows, size, -1), tokens_M.reshape(rows, size)
    absent_V = np.arange(11) == 11 - 1
    weights_2xNxW = np.random.default_rng(1).standard_normal((2, rows, size)).astype(np.float32)
    weights_2xNxW *= (np.arange(size) < filled_N[:, None]) & (tokens_NxW != 10)

    def total(head_VxD, hidden_NxWxD):
        ours = token_scores(
            Head(head_VxD, absent_V, precision),
            jnp.asarray(filled_N),
            hidden_NxWxD,
            tokens_NxW,
            temperature=0.8,
            logit_chunk_tokens=chunk,
            entropies=True,
        )
        return jnp.sum(jnp.stack(ours) * weights_2xNxW)

    def dense_total(head_VxD, hidden_NxWxD):
        logits = head_product(hidden_NxWxD.reshape(rows * size, -1), head_VxD[:10], precision).reshape(rows, size, 10)
        logprobs = jax.nn.log_softmax(logits / 0.8)
        chosen = jnp.take_along_axis(logprobs, np.minimum(tokens_NxW, 9)[..., None], axis=-1)[..., 0]
        entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.sum(jnp.stack([chosen, entropies]) * weights_2xNxW)

    ours, our_gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(head_VxD, hidden_NxWxD)
    theirs, their_gradients = jax.jit(jax.value_and_grad(dense_total, argnums=(0, 1)))(head_VxD, hidden_NxWxD)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    tolerance = 2e-2 if precision == "bfloat16" else 1e-4  # Derivatives of logits are rounded to bfloat16.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), our_gradients, their_gradients
    )


def test_chunks_without_a_needed_token_are_skipped():
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(12)
    scores = token_scores(
        Head(head_VxD),
        jnp.array([0, 3]),
        hidden_MxD.reshape(2, 6, -1),
        tokens_M.reshape(2, 6),
        temperature=0.8,
        logit_chunk_tokens=4,
    )
    assert (scores.logprobs[:, 4:] == 0).all() and (scores.logprobs[:, :4] != 0).all()


def test_entropies_equal_their_definition():
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(7)
    logprobs, entropies = token_scores(
        Head(head_VxD), None, hidden_MxD[None], tokens_M[None], temperature=0.8, logit_chunk_tokens=3, entropies=True
    )
    theirs = reference.log_softmax(hidden_MxD.astype(np.float64) @ head_VxD.T / 0.8)
    np.testing.assert_allclose(entropies[0], -(np.exp(theirs) * theirs).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(logprobs[0], theirs[np.arange(7), tokens_M], atol=1e-4)


@pytest.mark.parametrize(("chunk", "count"), [(64, 3), (16, 4)])
def test_kept_logits_are_not_computed_again(chunk, count):
    """The backward pass has two products of the head, and one more if the logits do not all exist at once."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(64, vocab=97)

    def loss(head, hidden):
        return token_logprobs(Head(head), hidden, tokens_M, 0.8, chunk).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head_VxD, hidden_MxD).compile().as_text()
    assert program.count(" dot(") == count
