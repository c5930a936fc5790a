"""Losses, KL terms, importance weights and aggregations against their equations in NumPy and gradients derived by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.objective import loss
from rpt_jax.objective.loss import ClipRange
from rpt_jax.registry import AGGREGATIONS, IMPORTANCE_WEIGHTS, KL_ESTIMATORS, LOSSES

CLIP_RANGE = ClipRange(low=0.2, high=0.3, dual=1.5)
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]], bool)
ADVANTAGES = np.array([[1.5], [-0.7], [0.4]])


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities whose ratios, per token and as the mean of a sequence, are below, within and above the bounds."""
    ratio = np.array(
        [[0.5, 0.79, 1.6, 1.7, 1.29, 1.31, 3.0], [0.5, 0.7, 9.0, 0.9, 0.3, 2.0, 9.0], [0.9, 1.1, 1.2] + [1] * 4]
    )
    old = np.random.default_rng(0).standard_normal(ratio.shape) - 2
    return (old + np.log(ratio)).astype(np.float32), old.astype(np.float32)


def clip(x: float) -> float:
    return min(max(x, 1 - CLIP_RANGE.low), 1 + CLIP_RANGE.high)


def token(name: str, logprob: float, old: float, advantage: float, sequence: float) -> tuple[float, float, bool]:
    """Return the loss of one token, its derivative by the token's log-probability, and whether it was clipped."""
    ratio = sequence if name == "gspo" else np.exp(logprob - old)
    if name == "reinforce":
        return -advantage * logprob, -advantage, False
    if name == "cispo":
        return -clip(ratio) * advantage * logprob, -clip(ratio) * advantage, clip(ratio) != ratio
    unclipped, clipped = ratio * advantage, clip(ratio) * advantage
    if name == "dual_clip" and advantage < 0 and min(unclipped, clipped) < CLIP_RANGE.dual * advantage:
        return -CLIP_RANGE.dual * advantage, 0.0, True
    return -min(unclipped, clipped), 0.0 if clipped < unclipped else -ratio * advantage, clipped < unclipped


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_equation(name):
    logprobs, old = inputs()

    def total(logprobs):
        result = LOSSES[name].function(logprobs, old, ADVANTAGES.astype(np.float32), MASK, CLIP_RANGE)
        return jnp.sum(jnp.where(MASK, result.loss, 0.0)), result

    gradient, result = jax.grad(total, has_aux=True)(jnp.asarray(logprobs))
    sequences = [np.exp(np.mean((logprobs - old)[p][MASK[p]].astype(float))) for p in range(3)]
    assert np.all(np.asarray(gradient)[~MASK] == 0)
    clipped_tokens = 0
    for p, t in zip(*np.nonzero(MASK), strict=True):
        value, slope, clipped = token(name, float(logprobs[p, t]), float(old[p, t]), ADVANTAGES[p, 0], sequences[p])
        np.testing.assert_allclose(result.loss[p, t], value, rtol=1e-5)
        assert bool(result.clipped[p, t]) == clipped
        # A token of GSPO has the ratio of its sequence and its own part of the gradient.
        np.testing.assert_allclose(gradient[p, t], slope, rtol=1e-5, atol=1e-7)
        clipped_tokens += clipped
    assert (clipped_tokens > 2) == (name != "reinforce"), "the example hardly tests clipping"


def test_gspo_has_the_gradient_of_its_sequence_ratio():
    """The mean over the tokens of a sequence equals the paper's loss, a clipped (π / π_old)^(1 / |o|)."""
    logprobs, old = inputs()

    def of_tokens(logprobs):
        result = loss.gspo_loss(logprobs, old, ADVANTAGES, MASK, CLIP_RANGE)
        weights, count = loss.sequence_mean(jnp.asarray(MASK), 7)
        return jnp.sum(jnp.where(MASK, weights * result.loss, 0)) / count

    def of_sequences(logprobs):
        ratio = jnp.exp(jnp.sum(jnp.where(MASK, logprobs - old, 0), axis=1) / MASK.sum(axis=1))
        clipped = jnp.clip(ratio, 1 - CLIP_RANGE.low, 1 + CLIP_RANGE.high)
        return -jnp.mean(jnp.minimum(ratio * ADVANTAGES[:, 0], clipped * ADVANTAGES[:, 0]))

    for ours, theirs in zip(
        jax.value_and_grad(of_tokens)(logprobs), jax.value_and_grad(of_sequences)(logprobs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan, 1e30])
def test_padding_may_hold_any_value(name, poison):
    logprobs, old = inputs()

    def total(logprobs, old):
        return jnp.sum(jnp.where(MASK, LOSSES[name].function(logprobs, old, ADVANTAGES, MASK, CLIP_RANGE).loss, 0.0))

    poisoned = [np.where(MASK, x, poison).astype(np.float32) for x in (logprobs, old)]
    clean = jax.value_and_grad(total)(logprobs, old)
    for arguments in ((poisoned[0], old), (logprobs, poisoned[1]), poisoned):
        jax.tree.map(np.testing.assert_array_equal, jax.value_and_grad(total)(*arguments), clean)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimator_and_gradient_equal_the_equation(name):
    logprobs, reference = inputs()
    x = logprobs.astype(float) - reference
    values = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}
    # Only k3 has a coefficient that differs from x, that of the score function.
    slopes = {"k1": x, "k2": x, "k3": 1 - np.exp(-x)}
    np.testing.assert_allclose(KL_ESTIMATORS[name].function(logprobs, reference), values[name], rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda logprobs: KL_ESTIMATORS[name].function(logprobs, reference).sum())(logprobs)
    np.testing.assert_allclose(gradient, slopes[name], rtol=1e-4, atol=1e-5)


def test_kl_estimators_are_unbiased():
    """In expectation under the policy, the values of k1 and k3 and the gradients of k1 and k2 are those of the KL divergence."""
    logits, reference = np.random.default_rng(1).standard_normal((2, 9)).astype(np.float32)
    theirs = jax.nn.log_softmax(reference)

    def divergence(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - theirs))

    def expectation(logits, name):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * KL_ESTIMATORS[name].function(logprobs, theirs))

    for name in ("k1", "k3"):
        np.testing.assert_allclose(expectation(logits, name), divergence(logits), rtol=1e-5)
    for name in ("k1", "k2"):
        np.testing.assert_allclose(jax.grad(expectation)(logits, name), jax.grad(divergence)(logits), atol=1e-6)


def test_importance_weights_equal_their_equations():
    ratio = np.array([0.1, 0.5, 1.0, 2.0, 2.1, 30.0], np.float32)
    weights, accepted = IMPORTANCE_WEIGHTS["truncate"].function(ratio, 0.5, 2.0)
    np.testing.assert_allclose(weights, [0.1, 0.5, 1, 2, 2, 2])
    assert accepted.all()
    weights, accepted = IMPORTANCE_WEIGHTS["mask"].function(ratio, 0.5, 2.0)
    np.testing.assert_allclose(weights, ratio)
    assert accepted.tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregation_equals_its_equation(name):
    """Responses without a token that counts are excluded, and the constant is the length limit."""
    kept = np.concatenate([MASK, np.zeros((1, 7), bool)])
    values = np.random.default_rng(2).standard_normal(kept.shape)
    sums = [row[k].sum() for row, k in zip(values, kept, strict=True)]
    expected = {
        "token_mean": values[kept].mean(),
        "sequence_mean": np.mean([total / k.sum() for total, k in zip(sums[:3], kept[:3], strict=True)]),
        "constant": np.mean(sums[:3]) / 20,
    }
    weights, count = AGGREGATIONS[name].function(jnp.asarray(kept), 20)
    np.testing.assert_allclose(np.sum(np.where(kept, weights * values, 0)) / count, expected[name], rtol=1e-5)
