"""The gradient of a batch, and a whole update, against a dense reference implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpt_jax.config import ObjectiveConfig
from rpt_jax.objective.batch import NextTokenBatch, UpdateLimits
from rpt_jax.objective.gradient import document_gradient, policy_gradient, response_logprobs
from rpt_jax.objective.minibatches import split_minibatches
from rpt_jax.objective.update import TrainState, update_policy
from tests.helpers import dense_objective
from tests.helpers import policy_reference as reference
from tests.helpers.dense_objective import (
    BAND,
    HIGH,
    LIMIT,
    LOW,
    TEMPERATURE,
    UNCOUNTED,
    ZERO_VARIANCE,
    Dense,
    G,
    P,
    S,
    T,
)
from tests.helpers.flops import token_flops
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import SHALLOW, SHAPE, random_params

OBJECTIVE = ObjectiveConfig(clip_low=LOW, clip_high=HIGH)
LIMITS = UpdateLimits(
    minibatches=1, rows=1, microbatch_tokens=24, logit_chunk_tokens=16, temperature=TEMPERATURE, max_new_tokens=LIMIT
)
# Rows per pass and tokens per row: the smallest rows, which repeat prefixes most often; several rows; and everything in
# one row.
ROWS = [(1, S - 1 + T), (2, 17), (1, 1000), (3, 40)]
jitted_gradient = jax.jit(policy_gradient, static_argnums=(0, 1, 2))


def gradient(params, batch, old, *, objective=OBJECTIVE, reference=None, **limits):
    """Return the gradient and the metrics, with the given changes of `LIMITS`."""
    return jitted_gradient(SHALLOW, objective, dataclasses.replace(LIMITS, **limits), params, batch, old, reference)


@pytest.fixture(scope="module")
def params():
    return random_params(SHALLOW, 0)


@pytest.fixture(scope="module")
def batch():
    return dense_objective.make_batch()


@pytest.fixture(scope="module")
def scores(batch):
    return dense_objective.make_scores(batch)


@pytest.fixture(scope="module")
def dense(params, batch, scores):
    return dense_objective.make_dense(params, batch, scores)


@pytest.fixture(scope="module")
def current(dense, batch) -> np.ndarray:
    """Return the log-probabilities of the current policy."""
    return np.asarray(dense(np.zeros((P, G, T), np.float32), batch.counted_P).logprobs_PxGxT)


@pytest.fixture(scope="module")
def old(current) -> np.ndarray:
    """Return log-probabilities of an older policy, different enough from the current ones to clip ratios at both bounds."""
    return (current + 0.4 * np.random.default_rng(1).standard_normal((P, G, T))).astype(np.float32)


@pytest.fixture(scope="module")
def expected(dense, batch, old) -> Dense:
    return dense(old, batch.counted_P)


def assert_close(ours, theirs, tolerance=1e-5):
    """Compare up to float32 rounding of the largest entry, since small entries are sums of terms of that size."""
    scale = max(1.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), ours, theirs)


@pytest.mark.parametrize(("rows", "microbatch_tokens"), mostly_slow(ROWS, *ROWS[1:3]))
def test_gradient_equals_the_dense_reference(params, batch, old, expected, rows, microbatch_tokens):
    """Rows of any size give the same gradient, although groups without variance are left out and prefixes are shared."""
    grads, metrics = gradient(params, batch, old, rows=rows, microbatch_tokens=microbatch_tokens)
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)
    assert metrics["ratio/clipped"] > 0.05, "the example hardly tests clipping"
    assert 0.1 < metrics["update/filled"] <= 1


def test_gradient_does_not_depend_on_prefix_sharing(params, batch, old, expected):
    """With every prompt from a different document, more tokens are run and the result is the same."""
    alone = batch._replace(window_P=np.arange(P, dtype=np.int32))
    (theirs, metrics), (_, shared) = (gradient(params, part, old, microbatch_tokens=1000) for part in (alone, batch))
    assert_close(theirs, expected.gradient)
    assert metrics["update/trunk_tokens"] > shared["update/trunk_tokens"]


@pytest.mark.parametrize("logit_chunk_tokens", mostly_slow([1, 7], 7))
def test_gradient_does_not_depend_on_logit_chunks(params, batch, old, expected, logit_chunk_tokens):
    grads, _ = gradient(params, batch, old, logit_chunk_tokens=logit_chunk_tokens)
    assert_close(grads, expected.gradient)


def test_gradient_does_not_depend_on_group_order(params, batch, old, expected):
    order = np.random.default_rng(2).permutation(P)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    grads, metrics = gradient(params, shuffled, old[order])
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)


def test_gradient_does_not_depend_on_padding(params, batch, old, expected):
    """Prompts and responses are padded with other tokens, and log-probabilities with NaN."""
    prompt, response = 3, 11
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
    grads, metrics = gradient(params, wider, widen(old, response, mask))
    assert_close(grads, expected.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], expected.loss, rtol=1e-5)
    assert np.isfinite(metrics["mismatch/max"])


def test_uncounted_groups_are_in_neither_numerator_nor_denominator(params, batch, old, dense):
    counted = ~np.isin(np.arange(P), UNCOUNTED)
    theirs = dense(old, counted)
    part = batch._replace(counted_P=counted)
    grads, metrics = gradient(params, part, old)
    assert_close(grads, theirs.gradient)
    np.testing.assert_allclose(metrics["loss/policy"], theirs.loss, rtol=1e-5)


@pytest.mark.parametrize(("rows", "microbatch_tokens"), mostly_slow(ROWS[:2], ROWS[1]))
def test_metrics_cover_groups_with_variance(params, batch, old, current, rows, microbatch_tokens):
    used = batch.mask_PxGxT & ~np.isin(np.arange(P), ZERO_VARIANCE)[:, None, None]
    _, metrics = gradient(params, batch, old, rows=rows, microbatch_tokens=microbatch_tokens)
    distance = np.abs(old - batch.sampler_logprobs_PxGxT)[used]
    np.testing.assert_allclose(metrics["mismatch/mean"], distance.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["mismatch/max"], distance.max(), rtol=1e-4)
    p99 = np.quantile(distance, 0.99, method="inverted_cdf")
    assert p99 <= metrics["mismatch/p99"] * (1 + 1e-4) and metrics["mismatch/p99"] < 1.13 * p99
    np.testing.assert_allclose(metrics["ratio/mean"], np.exp(current - old)[used].mean(), rtol=1e-4)
    assert metrics["update/tokens"] == used.sum()


def test_response_logprobs_equal_the_dense_reference(params, batch, current):
    for rows, microbatch_tokens in ROWS[:2]:
        limits = dataclasses.replace(LIMITS, rows=rows, microbatch_tokens=microbatch_tokens)
        ours, _ = jax.jit(response_logprobs, static_argnums=(0, 1))(SHALLOW, limits, params, batch)
        np.testing.assert_allclose(np.where(batch.mask_PxGxT, ours - current, 0), 0, atol=1e-5)


def test_gradient_of_a_batch_without_signal_is_zero(params, batch, old):
    """If all groups lack variance, or none counts, there is no division by zero."""
    nothing = batch._replace(advantages_PxG=np.zeros((P, G), np.float32))
    for part in (nothing, batch._replace(counted_P=np.zeros(P, bool))):
        grads, metrics = gradient(params, part, old)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
        assert all(np.isfinite(value) for value in metrics.values()) and metrics["ratio/mean"] == 1.0


# --- options that are off by default ---

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


@pytest.mark.parametrize("name", mostly_slow(OPTIONS, "gspo, masked", "cispo, k3, entropy"))
def test_gradient_of_every_option(params, batch, old, current, scores, name):
    """Sums over passes, in any order of the groups, are divided once by the total denominator.

    Rejected tokens and uncounted groups are in neither numerator nor denominator.
    """
    rng = np.random.default_rng(4)
    sampler = np.where(batch.mask_PxGxT, old + 0.4 * rng.standard_normal(old.shape), -np.inf).astype(np.float32)
    batch = batch._replace(sampler_logprobs_PxGxT=sampler, counted_P=~np.isin(np.arange(P), UNCOUNTED))
    reference_params = random_params(SHALLOW, 5)
    theirs = scores(reference_params)[0].reshape(P, G, T)
    loss = functools.partial(
        dense_objective.objective,
        scores,
        batch=batch,
        old=old,
        theirs=theirs,
        counted=batch.counted_P,
        options=OPTIONS[name],
    )
    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    band = {"importance_low": BAND[0], "importance_high": BAND[1]}
    objective = dataclasses.replace(OBJECTIVE, **band, **OPTIONS[name])
    order = rng.permutation(P)
    part = jax.tree.map(lambda x: x[order], batch)
    grads, metrics = gradient(params, part, old[order], objective=objective, reference=reference_params)
    assert_close(grads, expected)
    if "k1" not in name:  # The gradient of k1 is not that of its value.
        np.testing.assert_allclose(metrics["loss/policy"], value, rtol=1e-4)
    if objective.importance == "mask":
        assert 0.2 < metrics["importance/rejected"] < 0.8, "the example hardly tests rejection"


def test_document_gradient_is_that_of_the_mean_cross_entropy(params):
    """Equation 1 is a mean over the tokens of all documents, for any microbatch and padding."""
    rng = np.random.default_rng(6)
    tokens, lengths = rng.integers(0, SHAPE.vocab, (P, S + 1)).astype(np.int32), rng.integers(1, S + 1, P)
    documents = jax.tree.map(
        jnp.asarray, NextTokenBatch(tokens[:, :-1], tokens[:, 1:], np.arange(S) < lengths[:, None])
    )
    total = 0.0
    for row, length in zip(tokens, lengths, strict=True):
        logits = reference.logits(params, SHALLOW.config, row[:length].tolist())
        total -= reference.log_softmax(logits)[np.arange(length), row[1 : length + 1]].sum()
    jitted = jax.jit(document_gradient, static_argnums=(0, 1))
    results = [jitted(SHALLOW, dataclasses.replace(LIMITS, microbatch_tokens=S * m), params, documents) for m in (3, 8)]
    by_hand = 3 * sum(token_flops(SHALLOW.config, keys, head=True) for n in lengths for keys in range(1, n + 1))
    for _, loss, flops in results:
        np.testing.assert_allclose(loss, total / lengths.sum(), rtol=1e-5)
        np.testing.assert_allclose(flops, by_hand, rtol=1e-6)
    assert_close(results[0][0], results[1][0])
    assert optax.tree.norm(results[0][0]) > 0.1


# --- the update ---

SGD = optax.sgd(0.5, momentum=0.9)  # It has state, and its steps are large enough to change the ratio.


def start(params) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # The update donates them.
    return TrainState(params, SGD.init(params))


def test_one_minibatch_is_one_step_of_reinforce(params, batch, expected):
    """Exactly on-policy the ratio is exactly 1, and its gradient is that of the score function."""
    state, metrics = update_policy(SHALLOW, SGD, OBJECTIVE, LIMITS, start(params), batch)
    assert metrics["ratio/mean"] == 1.0 and metrics["ratio/clipped"] == 0.0
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, expected.reinforce))
    np.testing.assert_allclose(metrics["gradient/norm"], optax.tree.norm(expected.reinforce), rtol=1e-4)


def test_two_minibatches_are_two_steps_with_the_same_old_logprobs(params, batch, current):
    """The old log-probabilities are those before the first step, so the ratio of the second step is not 1.

    They are also what the sampler's log-probabilities are compared with.
    """
    limits = dataclasses.replace(LIMITS, minibatches=2)
    state, metrics = update_policy(SHALLOW, SGD, OBJECTIVE, limits, start(params), batch)
    by_hand, steps = start(params), []
    for half in (np.arange(P) < P // 2, np.arange(P) >= P // 2):
        part = batch._replace(counted_P=half)
        grads, step = gradient(by_hand.params, part, current)
        updates, optimizer = SGD.update(grads, by_hand.optimizer, by_hand.params)
        by_hand = TrainState(optax.apply_updates(by_hand.params, updates), optimizer)
        steps.append(step)
    assert_close(state, by_hand)
    np.testing.assert_allclose(steps[0]["ratio/mean"], 1, atol=1e-6)
    assert abs(steps[1]["ratio/mean"] - 1) > 1e-3
    for name in ("ratio/mean", "loss/policy"):
        np.testing.assert_allclose(metrics[name], np.mean([step[name] for step in steps]), rtol=1e-4, atol=1e-6)
    used = batch.mask_PxGxT & ~np.isin(np.arange(P), ZERO_VARIANCE)[:, None, None]
    distance = np.where(used, np.abs(current - batch.sampler_logprobs_PxGxT), 0)  # Padding is -inf.
    halves = [
        half.sum() / used_half.sum() for half, used_half in zip(np.split(distance, 2), np.split(used, 2), strict=True)
    ]
    np.testing.assert_allclose(metrics["mismatch/mean"], np.mean(halves), rtol=1e-3)
    np.testing.assert_allclose(metrics["mismatch/max"], distance.max(), rtol=1e-3)


def moving_start(params, batch) -> TrainState:
    """Return a state whose momentum is not zero, so that a step without a gradient would still move the parameters."""
    state, _ = update_policy(SHALLOW, SGD, OBJECTIVE, LIMITS, start(params), batch)
    return state


@pytest.mark.parametrize("objective", [OBJECTIVE, dataclasses.replace(OBJECTIVE, importance="mask")])
def test_an_update_without_any_token_changes_nothing(params, batch, objective):
    """Neither parameters nor optimizer state move, although momentum is left from the step before."""
    nothing = [batch._replace(advantages_PxG=np.zeros((P, G), np.float32)), batch._replace(counted_P=np.zeros(P, bool))]
    begin = moving_start(params, batch)
    for part in nothing:
        state, metrics = update_policy(SHALLOW, SGD, objective, LIMITS, jax.tree.map(jnp.copy, begin), part)
        jax.tree.map(np.testing.assert_array_equal, state, begin)
        assert metrics["update/skipped"] == 1 and metrics["update/norm"] == 0


def test_a_minibatch_without_any_token_is_skipped(params, batch):
    """With one counted group, one minibatch has it and the other is skipped: the step is that of the group alone."""
    only = batch._replace(
        counted_P=np.arange(P) == 0, advantages_PxG=np.where(np.arange(P)[:, None] == 0, 1.0, 0.0) * np.ones(G)
    )
    one, two = (
        update_policy(
            SHALLOW, SGD, OBJECTIVE, dataclasses.replace(LIMITS, minibatches=n), moving_start(params, batch), only
        )
        for n in (1, 2)
    )
    assert_close(two[0], one[0])
    assert one[1]["update/skipped"] == 0 and two[1]["update/skipped"] == 1
    np.testing.assert_allclose(two[1]["loss/policy"], one[1]["loss/policy"], atol=1e-6)


def passes_by_hand(batch, groups) -> int:
    """Return the FLOPs of a forward pass over some groups, each in one row: the prompt once, the head for responses only.

    The last token of a prompt is run with every response, whose first token it predicts.
    """
    total = 0
    for p in groups:
        prompt = int(batch.lengths_P[p])
        total += sum(token_flops(SHALLOW.config, keys, head=False) for keys in range(1, prompt))
        for length in batch.mask_PxGxT[p].sum(axis=1):
            total += sum(token_flops(SHALLOW.config, prompt + t, head=True) for t in range(length))
    return total


def test_flops_of_an_update_by_hand(params, batch):
    """Groups without variance are not run, except for the old log-probabilities that two minibatches need of every group."""
    alone = batch._replace(window_P=np.arange(P, dtype=np.int32))
    used = passes_by_hand(alone, [p for p in range(P) if p not in ZERO_VARIANCE])
    everything = passes_by_hand(alone, range(P))
    for minibatches, expected in ((1, 3 * used), (2, 3 * used + everything)):
        limits = dataclasses.replace(LIMITS, minibatches=minibatches, microbatch_tokens=1000)
        _, metrics = update_policy(SHALLOW, SGD, OBJECTIVE, limits, start(params), alone)
        assert float(metrics["update/flops"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counted", [0, 1, 2, 3, 5, 8, 12])
def test_counted_groups_are_spread_over_the_minibatches(batch, counted):
    """Dynamic sampling puts the counted groups first; every minibatch gets its share of them, in their order."""
    groups = np.arange(12, dtype=np.int32)
    first = jax.tree.map(lambda x: np.zeros((12, *x.shape[1:]), x.dtype), batch)
    first = first._replace(window_P=groups, counted_P=groups < counted)
    split = split_minibatches(first, 4)
    counts = split.counted_P.sum(axis=1)
    assert counts.max() - counts.min() <= 1 and counts.sum() == counted
    assert sorted(split.window_P.reshape(-1).tolist()) == groups.tolist()
    assert split.window_P[split.counted_P].tolist() == groups[:counted].tolist()
    if counted == 12:
        assert split.window_P.reshape(-1).tolist() == groups.tolist()


def test_update_adds_the_document_gradient_and_updates_the_average(params, batch, current):
    """The gradient of the documents is added with its weight, and the average becomes τ φ + (1 - τ) θ after the step."""
    tokens = np.arange(P * (S + 1)).reshape(P, S + 1).astype(np.int32) % SHAPE.vocab
    documents = jax.tree.map(jnp.asarray, NextTokenBatch(tokens[:, :-1], tokens[:, 1:], np.ones((P, S), bool)))
    objective = dataclasses.replace(OBJECTIVE, document_weight=0.5, baseline_decay=0.75)
    average = random_params(SHALLOW, 7)
    begin = start(params)._replace(average=jax.tree.map(jnp.copy, average))
    state, metrics = update_policy(SHALLOW, SGD, objective, LIMITS, begin, batch._replace(documents=documents))
    policy_part, _ = gradient(params, batch, None)
    document_part, loss, _ = document_gradient(SHALLOW, LIMITS, params, documents)
    stepped = jax.tree.map(lambda p, g, d: p - 0.5 * (g + 0.5 * d), params, policy_part, document_part)
    assert_close(state.params, stepped)
    assert_close(state.average, jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, stepped))
    np.testing.assert_allclose(metrics["loss/document"], loss, rtol=1e-5)
