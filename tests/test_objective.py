"""Log-probabilities, the gradient of a batch, and one update as a whole, each against its equation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.objective import update
from rpt_jax.objective.logprobs import (
    chosen_logprobs,
    over_token_chunks,
    scaled_logits,
    token_logprobs,
    token_logprobs_and_entropies,
)
from rpt_jax.objective.loss import Bounds
from rpt_jax.objective.update import (
    Documents,
    TrainState,
    UpdateBatch,
    UpdateConfig,
    document_gradient,
    policy_gradient,
    update_policy,
)
from rpt_jax.policy.transformer import Head, Params, head
from tests import policy_reference as reference
from tests.policy_reference import SHALLOW, SHAPE, random_params

# --- log-probabilities -------------------------------------------------------------------------------


def logprob_inputs(tokens: int, vocab: int = 11, width: int = 4):
    rng = np.random.default_rng(tokens)
    head_VxD, hidden_MxD = rng.standard_normal((vocab, width)), rng.standard_normal((tokens, width)) * 3
    return head_VxD.astype(np.float32), hidden_MxD.astype(np.float32), rng.integers(0, vocab, tokens).astype(np.int32)


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.5, 0.8, 1.0, 2.0]))
@settings(deadline=None, max_examples=12)
def test_token_logprobs_for_any_chunk(tokens, chunk, temperature):
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(tokens)
    ours = token_logprobs(Head(head_VxD), hidden_MxD, tokens_M, temperature, chunk)
    logits = hidden_MxD.astype(np.float64) @ head_VxD.T.astype(np.float64) / temperature
    np.testing.assert_allclose(ours, reference.log_softmax(logits)[np.arange(tokens), tokens_M], atol=1e-5)


def test_the_head_is_float32_whatever_the_trunk():
    """With logits of a bfloat16 head "on-policy" would be off by about 1e-2."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(5, width=64)
    rounded = jnp.asarray(hidden_MxD, jnp.bfloat16)
    logits = scaled_logits(Head(head_VxD), rounded, 0.8)
    assert logits.dtype == jnp.float32
    expected = np.asarray(rounded, np.float64) @ head_VxD.T.astype(np.float64) / 0.8
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    ours = chosen_logprobs(logits, tokens_M)
    np.testing.assert_allclose(ours, reference.log_softmax(expected)[np.arange(5), tokens_M], atol=1e-4)


def test_absent_ids_have_no_probability():
    """Not a little: none, for the others as if they did not exist; and padding of an absent id does no harm under a mask."""
    head_VxD, hidden_MxD, _ = logprob_inputs(6)
    absent_V = np.isin(np.arange(11), [0, 4, 9, 10])
    head_VxD[absent_V] *= 100  # The likeliest by far, if they could be.
    tokens_M, mask_M = np.array([1, 2, 3, 8, 0, 10], np.int32), np.array([1, 1, 1, 1, 0, 0], np.float32)

    def loss(head_VxD, hidden_MxD):
        logprobs_M = token_logprobs(Head(head_VxD, absent_V), hidden_MxD, tokens_M, 0.8, 4)
        return jnp.sum(logprobs_M * mask_M), logprobs_M

    grads, ours = jax.grad(loss, argnums=(0, 1), has_aux=True)(head_VxD, hidden_MxD)
    logits = hidden_MxD.astype(np.float64) @ head_VxD[~absent_V].T.astype(np.float64) / 0.8
    places = np.cumsum(~absent_V)[tokens_M] - 1
    np.testing.assert_allclose(ours[:4], reference.log_softmax(logits)[np.arange(4), places[:4]], atol=1e-5)
    assert (jnp.exp(ours[4:]) == 0).all() and all(jnp.isfinite(grad).all() for grad in grads)
    assert (grads[0][absent_V] == 0).all() and (grads[0][~absent_V] != 0).all()
    assert (jax.nn.softmax(scaled_logits(Head(head_VxD, absent_V), hidden_MxD, 0.8))[:, absent_V] == 0).all()


def test_over_token_chunks_glues_any_tree_together():
    """Sizes that are no multiple of the chunk, outputs of several ranks and dtypes, and gradients through both."""
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
    """Forward and backward: 64 tokens in chunks of 8, by the shapes of everything that the program computes."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(64, vocab=97)

    def loss(head, hidden, chunk):
        return token_logprobs(Head(head), hidden, tokens_M, 0.8, chunk).sum()

    for chunk in (8, 64):
        program = jax.make_jaxpr(jax.grad(functools.partial(loss, chunk=chunk), argnums=(0, 1)))(head_VxD, hidden_MxD)
        assert largest_logits(program.jaxpr, 97) == chunk


# --- the gradient of a batch -------------------------------------------------------------------------

LOW, HIGH = 0.2, 0.3
P, G, S, T = 8, 3, 6, 5
ZERO_VARIANCE, UNCOUNTED = (1, 5), (2, 6)
CONFIG = UpdateConfig(minibatches=1, microbatch=8, chunk=16, temperature=0.8, bounds=Bounds(LOW, HIGH))
gradient = jax.jit(policy_gradient, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def params():
    return random_params(SHALLOW, 0)


@pytest.fixture(scope="module")
def batch() -> UpdateBatch:
    """Every group counts, two have no variance, and all that is not real is poison."""
    rng = np.random.default_rng(0)
    advantages = rng.standard_normal((P, G)).astype(np.float32)
    advantages[list(ZERO_VARIANCE)] = 0
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G))[..., None]
    return UpdateBatch(
        prompts_PxS=rng.integers(0, SHAPE.vocab, (P, S)).astype(np.int32),
        lengths_P=np.array([1, 6, 3, 4, 6, 2, 5, 1], np.int32),
        tokens_PxGxT=rng.integers(0, SHAPE.vocab, (P, G, T)).astype(np.int32),
        mask_PxGxT=mask,
        sampler_logprobs_PxGxT=np.where(mask, rng.standard_normal((P, G, T)) - 3, -np.inf).astype(np.float32),
        advantages_PxG=advantages,
        counted_P=np.ones(P, bool),
    )


class Dense(NamedTuple):
    logprobs_PxGxT: jax.Array
    loss: jax.Array  # The clipped one,
    gradient: Params  # and its gradient.
    reinforce: Params  # The gradient of A · log-probability.


@pytest.fixture(scope="module")
def scores(batch) -> Callable[[Params], tuple[jax.Array, jax.Array]]:
    """Return a function of the parameters: log-probabilities and entropies [P · G, T] of every full sequence on its own.

    No prompt is shared, nothing is chunked or skipped.
    """
    sequences = np.zeros((P * G, 1, S + T), np.int32)
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        sequence = [*batch.prompts_PxS[p, : batch.lengths_P[p]], *batch.tokens_PxGxT[p, g]]
        sequences[row, 0, : len(sequence)] = sequence
    places = np.repeat(batch.lengths_P, G)[:, None] + np.arange(T) - 1
    tokens = batch.tokens_PxGxT.reshape(-1, T)

    def score(params):
        positions = jnp.broadcast_to(jnp.arange(S + T, dtype=jnp.int32), sequences.shape)
        hidden, _ = SHALLOW.apply({"params": params}, sequences, positions)
        logits = jnp.einsum("bsd,vd->bsv", hidden[:, 0], head(SHALLOW, params).matrix_VxD) / CONFIG.temperature
        predicting = jnp.take_along_axis(logits, places[..., None], axis=1)
        logprobs = jax.nn.log_softmax(predicting)
        entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.take_along_axis(logprobs, tokens[..., None], axis=2)[..., 0], entropies

    return score


@pytest.fixture(scope="module")
def dense(params, batch, scores) -> Callable[[np.ndarray, np.ndarray], Dense]:
    """Return a function of (old_logprobs, counted_P): the default's equations, where the token mean is one division."""
    mask, advantages = batch.mask_PxGxT.reshape(-1, T), jnp.asarray(batch.advantages_PxG).reshape(-1, 1)

    def clipped(params, old, counted):
        current = scores(params)[0]
        ratio = jnp.exp(current - old.reshape(-1, T))
        objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages)
        return -jnp.sum(objective * counted) / counted.sum(), current.reshape(P, G, T)

    def reinforce(params, counted):
        return -jnp.sum(scores(params)[0] * advantages * counted) / counted.sum()

    @jax.jit
    def everything(old, counted_P):
        counted = mask & jnp.repeat(counted_P, G)[:, None]
        (loss, current), gradient = jax.value_and_grad(clipped, has_aux=True)(params, old, counted)
        return Dense(current, loss, gradient, jax.grad(reinforce)(params, counted))

    return everything


@pytest.fixture(scope="module")
def current(dense, batch) -> np.ndarray:
    """Return the policy's log-probabilities."""
    return np.asarray(dense(np.zeros((P, G, T), np.float32), batch.counted_P).logprobs_PxGxT)


@pytest.fixture(scope="module")
def old(current) -> np.ndarray:
    """Return log-probabilities of an older policy: the current ones, moved by enough to be clipped both ways."""
    return (current + 0.4 * np.random.default_rng(1).standard_normal((P, G, T))).astype(np.float32)


@pytest.fixture(scope="module")
def expected(dense, batch, old) -> Dense:
    return dense(old, batch.counted_P)


def assert_close(ours, theirs, tolerance=1e-5):
    """Up to float32's rounding, of the largest entry: the terms of small ones are as large as that."""
    scale = max(1.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), ours, theirs)


@pytest.mark.parametrize("microbatch", [1, 4, 8])
def test_gradient_is_that_of_the_dense_equation(params, batch, old, expected, microbatch):
    """For any microbatch, groups without variance skipped or not."""
    grads, metrics = gradient(SHALLOW, params, batch, old, CONFIG._replace(microbatch=microbatch))
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)
    assert metrics["ratio/clipped"] > 0.05, "the fixture tests too little"


def test_group_order_changes_nothing(params, batch, old, expected):
    order = np.random.default_rng(2).permutation(P)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    grads, metrics = gradient(SHALLOW, params, shuffled, old[order], CONFIG._replace(microbatch=4))
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)


@pytest.mark.parametrize(("prompt", "response", "microbatch"), [(3, 2, 8), (2, 3 * T - 4, 1), (2, 3 * T - 4, 4)])
def test_padding_changes_nothing(params, batch, old, expected, monkeypatch, prompt, response, microbatch):
    """Longer prompts and responses, filled up with other tokens and with log-probabilities that are no numbers.

    Where there is much of it, microbatches of short groups run in less room than others.
    """
    if response > T:
        monkeypatch.setattr(update, "_SMALLEST_PROMPT", 1)
        monkeypatch.setattr(update, "_SMALLEST_RESPONSE", 1)
        fits = [(batch.lengths_P <= (S + prompt) // 2), (batch.longest_P <= (T + response) // 4)]
        rooms = {(bool(s), bool(t)) for s, t in zip(*fits, strict=True)}
        assert len(rooms) >= 3, "the fixture tests too little"
    rng = np.random.default_rng(3)
    real_PxS = np.arange(S + prompt) < batch.lengths_P[:, None]
    mask = np.pad(batch.mask_PxGxT, ((0, 0), (0, 0), (0, response)))

    def widen(x, more, real):
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
        poison = rng.integers(0, SHAPE.vocab, x.shape) if x.dtype == np.int32 else np.nan
        return np.where(real, x, poison).astype(x.dtype)

    wider = batch._replace(
        prompts_PxS=widen(batch.prompts_PxS, prompt, real_PxS),
        tokens_PxGxT=widen(batch.tokens_PxGxT, response, mask),
        mask_PxGxT=mask,
        sampler_logprobs_PxGxT=widen(batch.sampler_logprobs_PxGxT, response, mask),
    )
    config = CONFIG._replace(microbatch=microbatch)
    grads, metrics = gradient(SHALLOW, params, wider, widen(old, response, mask), config)
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)
    assert np.isfinite(metrics["mismatch/max"])


@pytest.mark.parametrize("microbatch", [1, 4, 8])
def test_groups_that_do_not_count_leave_numerator_and_denominator(params, batch, old, dense, microbatch):
    counted = ~np.isin(np.arange(P), UNCOUNTED)
    theirs = dense(old, counted)
    part = batch._replace(counted_P=counted)
    grads, metrics = gradient(SHALLOW, params, part, old, CONFIG._replace(microbatch=microbatch))
    assert_close(grads, theirs.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], theirs.loss, rtol=1e-5)


@pytest.mark.parametrize("microbatch", [1, 4, 8])
def test_metrics_are_those_of_the_groups_that_can_teach_something(params, batch, old, current, microbatch):
    used = batch.mask_PxGxT & ~np.isin(np.arange(P), ZERO_VARIANCE)[:, None, None]
    _, metrics = gradient(SHALLOW, params, batch, old, CONFIG._replace(microbatch=microbatch))
    distance = np.abs(current - batch.sampler_logprobs_PxGxT)[used]
    np.testing.assert_allclose(metrics["mismatch/mean"], distance.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["mismatch/max"], distance.max(), rtol=1e-4)
    p99 = np.quantile(distance, 0.99, method="inverted_cdf")
    assert p99 <= metrics["mismatch/p99"] * (1 + 1e-4) and metrics["mismatch/p99"] < 1.13 * p99
    np.testing.assert_allclose(metrics["ratio/mean"], np.exp(current - old)[used].mean(), rtol=1e-4)
    assert metrics["update/tokens"] == used.sum()


def test_a_batch_without_anything_to_learn_has_no_gradient(params, batch, old):
    """All groups without variance, and no group that counts: zeros, and nothing divided by zero."""
    nothing = batch._replace(advantages_PxG=np.zeros((P, G), np.float32))
    for part in (nothing, batch._replace(counted_P=np.zeros(P, bool))):
        grads, metrics = gradient(SHALLOW, params, part, old, CONFIG)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
        assert all(np.isfinite(value) for value in metrics.values()) and metrics["ratio/mean"] == 1.0


# --- what is off by default ----------------------------------------------------------------------------


OPTIONS = {
    "gspo, masked": {"loss": "gspo", "aggregation": "sequence_mean", "importance": "mask"},
    "cispo, k3, entropy": {
        "loss": "cispo",
        "aggregation": "constant",
        "kl": "k3",
        "kl_weight": 0.3,
        "entropy_weight": 0.2,
    },
    "dual clip, truncated, k1": {"loss": "dual_clip", "importance": "truncate", "kl": "k1", "kl_weight": 0.1},
    "reinforce, masked": {"loss": "reinforce", "importance": "mask", "entropy_weight": 0.1},
}
BAND, LIMIT = (0.7, 1.4), 9


def objective(scores, params, batch, old, theirs, counted, options):
    """The loss of one batch, written down once more: one sum over all counted tokens and one division."""
    current, entropies = (x.reshape(P, G, T) for x in scores(params))
    mask, advantages = batch.mask_PxGxT & counted[:, None, None], batch.advantages_PxG[..., None]
    ratio, x = jnp.exp(current - old), jnp.where(mask, current, 0.0)
    if options["loss"] == "gspo":
        share = jnp.where(mask, current - old, 0.0)
        ratio = jnp.exp(share.sum(-1, keepdims=True) / batch.mask_PxGxT.sum(-1, keepdims=True)) * jnp.ones(T)
        # As in its paper every sequence counts once: its tokens share one gradient.
        ratio = jax.lax.stop_gradient(ratio) * jnp.exp(share - jax.lax.stop_gradient(share))
    bounded = jnp.clip(ratio, 1 - LOW, 1 + HIGH)
    terms = -jnp.minimum(ratio * advantages, bounded * advantages)
    if options["loss"] == "dual_clip":
        terms = jnp.where(advantages < 0, jnp.minimum(terms, -3.0 * advantages), terms)
    if options["loss"] in ("cispo", "reinforce"):
        terms = -advantages * x * (jax.lax.stop_gradient(bounded) if options["loss"] == "cispo" else 1.0)
    kept, importance = mask, jnp.exp(jnp.where(mask, old - batch.sampler_logprobs_PxGxT, 0.0))
    if options.get("importance") == "truncate":
        terms = terms * jnp.minimum(importance, BAND[1])
    if options.get("importance") == "mask":
        kept = mask & (importance > BAND[0]) & (importance < BAND[1])
        terms = terms * importance
    if options.get("kl"):
        difference = current - theirs
        k1 = jax.lax.stop_gradient(difference) * current
        kl = k1 if options["kl"] == "k1" else jnp.exp(-difference) - 1 + difference
        terms = terms + options["kl_weight"] * kl
    terms = jnp.where(kept, terms - options.get("entropy_weight", 0) * entropies, 0.0)
    if options.get("aggregation") == "sequence_mean":
        per_sequence = terms.sum(-1) / jnp.maximum(kept.sum(-1), 1)
        return per_sequence.sum() / kept.any(-1).sum()
    return terms.sum() / (LIMIT * kept.any(-1).sum() if options.get("aggregation") == "constant" else kept.sum())


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_every_option(params, batch, old, current, scores, name):
    """In microbatches, and in another order of the groups: numerators add up, and one denominator divides.

    Tokens that are rejected, of groups without variance too, and groups that do not count leave both.
    """
    rng = np.random.default_rng(4)
    sampler = np.where(batch.mask_PxGxT, old + 0.4 * rng.standard_normal(old.shape), -np.inf).astype(np.float32)
    batch = batch._replace(sampler_logprobs_PxGxT=sampler, counted_P=~np.isin(np.arange(P), UNCOUNTED))
    reference_params = random_params(SHALLOW, 5)
    theirs = scores(reference_params)[0].reshape(P, G, T)
    loss = functools.partial(
        objective, scores, batch=batch, old=old, theirs=theirs, counted=batch.counted_P, options=OPTIONS[name]
    )
    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    band = {"importance_low": BAND[0], "importance_high": BAND[1]}
    options = CONFIG._replace(microbatch=2, response_limit=LIMIT, **band, **OPTIONS[name])
    order = rng.permutation(P)
    part = jax.tree.map(lambda x: x[order], batch)
    grads, metrics = gradient(SHALLOW, params, part, old[order], options, reference_params)
    assert_close(grads, expected)
    if "k1" not in name:  # Whose value is not what its gradient is of.
        np.testing.assert_allclose(metrics["loss/policy"], value, rtol=1e-4)
    if options.importance == "mask":
        assert 0.2 < metrics["importance/rejected"] < 0.8, "the example tests too little"


def test_entropies():
    """Against the definition, in chunks, with a token that cannot be drawn."""
    head_VxD, hidden_MxD, tokens_M = logprob_inputs(7)
    logprobs, entropies = token_logprobs_and_entropies(Head(head_VxD), hidden_MxD, tokens_M, 0.8, 3)
    theirs = reference.log_softmax(hidden_MxD.astype(np.float64) @ head_VxD.T / 0.8)
    np.testing.assert_allclose(entropies, -(np.exp(theirs) * theirs).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(logprobs, theirs[np.arange(7), tokens_M], atol=1e-4)


def test_document_gradient(params):
    """Equation 1 as a mean over all documents' tokens, whatever the microbatch and the padding."""
    rng = np.random.default_rng(6)
    tokens, lengths = rng.integers(0, SHAPE.vocab, (P, S + 1)).astype(np.int32), rng.integers(1, S + 1, P)
    documents = jax.tree.map(jnp.asarray, Documents(tokens[:, :-1], tokens[:, 1:], np.arange(S) < lengths[:, None]))
    total = 0.0
    for row, length in zip(tokens, lengths, strict=True):
        logits = reference.logits(params, SHALLOW.shape, row[:length].tolist())
        total -= reference.log_softmax(logits)[np.arange(length), row[1 : length + 1]].sum()
    learn = jax.jit(document_gradient, static_argnums=(0, 3))
    results = [learn(SHALLOW, params, documents, CONFIG._replace(microbatch=m)) for m in (2, 8)]
    for _, loss in results:
        np.testing.assert_allclose(loss, total / lengths.sum(), rtol=1e-5)
    assert_close(results[0][0], results[1][0])
    assert optax.tree.norm(results[0][0]) > 0.1


# --- the update --------------------------------------------------------------------------------------

SGD = optax.sgd(0.5, momentum=0.9)  # State that must be carried along, and steps large enough to leave the old policy.


def start(params) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # The update donates them.
    return TrainState(params, SGD.init(params))


def test_one_minibatch_is_one_step_of_reinforce(params, batch, expected):
    """Exactly on-policy the ratio is 1, not nearly 1, and its gradient is the score function's."""
    state, metrics = update_policy(SHALLOW, SGD, CONFIG, start(params), batch)
    assert metrics["ratio/mean"] == 1.0 and metrics["ratio/clipped"] == 0.0
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, expected.reinforce))
    np.testing.assert_allclose(metrics["gradient/norm"], optax.tree.norm(expected.reinforce), rtol=1e-4)


def test_two_minibatches_are_two_steps_against_the_sampler(params, batch, current):
    """The old log-probabilities are those from before the first step, so the second step's ratio is not 1."""
    state, metrics = update_policy(SHALLOW, SGD, CONFIG._replace(minibatches=2, microbatch=4), start(params), batch)
    by_hand, steps = start(params), []
    for half in (np.arange(P) < P // 2, np.arange(P) >= P // 2):
        part = batch._replace(counted_P=half)
        grads, step = gradient(SHALLOW, by_hand.params, part, current, CONFIG._replace(microbatch=4))
        updates, optimizer = SGD.update(grads, by_hand.optimizer, by_hand.params)
        by_hand = TrainState(optax.apply_updates(by_hand.params, updates), optimizer)
        steps.append(step)
    assert_close(state, by_hand)
    np.testing.assert_allclose(steps[0]["ratio/mean"], 1, atol=1e-6)
    assert abs(steps[1]["ratio/mean"] - 1) > 1e-3
    for name in ("ratio/mean", "loss/policy"):
        np.testing.assert_allclose(metrics[name], np.mean([step[name] for step in steps]), rtol=1e-4, atol=1e-6)


def test_documents_and_average(params, batch, current):
    """λ times the documents' gradient is added; the average follows after the step, τ φ + (1 - τ) θ."""
    tokens = np.arange(P * (S + 1)).reshape(P, S + 1).astype(np.int32) % SHAPE.vocab
    documents = jax.tree.map(jnp.asarray, Documents(tokens[:, :-1], tokens[:, 1:], np.ones((P, S), bool)))
    config = CONFIG._replace(document_weight=0.5, average_decay=0.75)
    average = random_params(SHALLOW, 7)
    begin = start(params)._replace(average=jax.tree.map(jnp.copy, average))
    state, metrics = update_policy(SHALLOW, SGD, config, begin, batch._replace(documents=documents))
    policy_part, _ = gradient(SHALLOW, params, batch, None, CONFIG)
    document_part, loss = document_gradient(SHALLOW, params, documents, CONFIG)
    stepped = jax.tree.map(lambda p, g, d: p - 0.5 * (g + 0.5 * d), params, policy_part, document_part)
    assert_close(state.params, stepped)
    assert_close(state.average, jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, stepped))
    np.testing.assert_allclose(metrics["loss/document"], loss, rtol=1e-5)
