"""Token sampling against the exact distribution, and rollouts against NumPy, the trainer and other batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.gradient import response_logprobs
from rpt_jax.rollout import sampling
from rpt_jax.rollout.generate import generate
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.rollout.sampling import sample_tokens, uniform_noise
from tests.helpers import policy_reference as reference
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import POLICY, SHAPE, random_params
from tests.helpers.rollouts import STOPS, TEMPERATURE, assert_same, select

LAST = np.float32(1 - 2**-24)  # The largest float32 below 1.
ROWS = 4096
VOCABS = [1, 2, 3, 37, 1000, 20_000]
PLATFORMS = mostly_slow(["cpu", "tpu"], "cpu")


@pytest.fixture
def platform(request, monkeypatch) -> str:
    """Sample with the blocks of a platform."""
    monkeypatch.setattr(sampling, "target_platform", lambda: request.param)
    for name in ("sum_blocks", "read_blocks"):
        monkeypatch.setattr(sampling, name, functools.partial(getattr(sampling, name), interpret=True))
    return request.param


@functools.cache
def compiled_sampler(platform: str) -> Callable[..., jax.Array]:
    return jax.jit(lambda logits, uniforms: sample_tokens(logits, uniforms)[0])


def draw(logits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Sample one token from the same distribution for each of `uniforms`."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (ROWS, len(logits)))
    # A fixed number of rows, so that each vocabulary is compiled once.
    sample = compiled_sampler(sampling.target_platform())
    tokens = sample(rows, jnp.asarray(np.resize(uniforms, ROWS), jnp.float32))
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)[: len(uniforms)]


# --- one token ---


@pytest.mark.parametrize("platform", PLATFORMS, indirect=True)
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_drawn_in_proportion_to_their_probability(platform, vocab):
    """On an even grid of uniform numbers this holds exactly."""
    logits = np.random.default_rng(vocab).standard_normal(vocab) * 2
    counts = np.bincount(draw(logits, (np.arange(ROWS) + 0.5) / ROWS), minlength=vocab)
    assert len(counts) == vocab
    np.testing.assert_allclose(counts, ROWS * reference.softmax(logits), atol=1.01)


@pytest.mark.parametrize("platform", ["cpu", "tpu"], indirect=True)
def test_each_row_is_sampled_from_its_own_distribution(platform):
    logits = np.random.default_rng(0).standard_normal((64, 37)).astype(np.float32)
    uniforms = np.random.default_rng(1).random(64, np.float32)
    ours, logprobs = jax.jit(lambda *arrays: sample_tokens(*arrays))(jnp.asarray(logits), jnp.asarray(uniforms))
    np.testing.assert_allclose(
        logprobs, reference.log_softmax(logits.astype(np.float64))[np.arange(64), ours], atol=1e-5
    )
    ends = np.cumsum(reference.softmax(logits.astype(np.float64)), axis=-1)
    np.testing.assert_array_equal(ours, [np.searchsorted(end, u, side="right") for end, u in zip(ends, uniforms)])  # noqa: B905


def near_boundaries(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return uniform numbers at and near steps of the distribution function, where rounding could select another token."""
    boundaries = np.cumsum(reference.softmax(logits))[rng.integers(0, len(logits), ROWS - 2)]
    near = np.round(boundaries * 2**23) + rng.integers(-2, 3, ROWS - 2)
    return np.concatenate([np.clip(near, 0, 2**23 - 1) / 2**23, [0.0, LAST]])


@pytest.mark.parametrize("platform", PLATFORMS, indirect=True)
@pytest.mark.parametrize("hidden", [-1e30, -np.inf])
@pytest.mark.parametrize("vocab", VOCABS[1:])
def test_tokens_without_probability_are_never_drawn(platform, vocab, hidden):
    rng = np.random.default_rng(vocab)
    for fraction in (0.5, 0.95):
        logits = rng.standard_normal(vocab) * 3
        logits[rng.random(vocab) < fraction] = hidden
        # Also in whole blocks, and at both ends.
        logits[: vocab // 3], logits[-(vocab // 3) :] = hidden, hidden
        logits[vocab // 2] = 1.0
        assert (logits[draw(logits, near_boundaries(logits, rng))] > -1e29).all()


def test_tokens_without_probability_are_never_drawn_with_tree_sums(monkeypatch):
    """A backend may sum in any order. In a tree, rounding can increase a cumulative sum where nothing is added."""
    monkeypatch.setattr(jnp, "cumsum", lambda x, axis: jax.lax.associative_scan(jnp.add, x, axis=axis))
    rng, tree = np.random.default_rng(0), jax.jit(lambda logits, uniforms: sample_tokens(logits, uniforms)[0])
    for _ in range(20):
        logits = np.where(rng.random(400) < 0.5, -1e30, rng.standard_normal(400) * 2).astype(np.float32)
        uniforms = jnp.asarray(near_boundaries(logits, rng), jnp.float32)
        tokens = np.asarray(tree(jnp.broadcast_to(logits, (ROWS, 400)), uniforms))
        assert (tokens < 400).all() and (logits[tokens] > -1e29).all()


def test_vocabulary_padding_is_never_drawn_with_tree_sums(monkeypatch):
    """At the largest uniform number, rounding alone can suggest that there is probability after the last token."""
    monkeypatch.setattr(jnp, "cumsum", lambda x, axis: jax.lax.associative_scan(jnp.add, x, axis=axis))
    rng, tree = np.random.default_rng(0), jax.jit(lambda logits, uniforms: sample_tokens(logits, uniforms)[0])
    logits = rng.standard_normal((ROWS, 400)).astype(np.float32) * 2
    absent = (np.arange(400) < 60) | (np.arange(400) >= rng.integers(200, 400, (ROWS, 1)))
    tokens = np.asarray(tree(jnp.where(absent, -1e30, logits), jnp.full(ROWS, LAST)))
    assert not absent[np.arange(ROWS), tokens].any()


@pytest.mark.parametrize("platform", PLATFORMS, indirect=True)
@pytest.mark.parametrize("vocab", VOCABS)
def test_ends_of_the_unit_interval_select_the_first_and_last_token(platform, vocab):
    logits = np.zeros(vocab)
    assert draw(logits, np.array([0.0, LAST])).tolist() == [0, vocab - 1]
    if vocab > 3:
        logits[[0, 1, -2, -1]] = -np.inf
        assert draw(logits, np.array([0.0, LAST])).tolist() == [2, vocab - 3]


def test_noise_is_uniform_and_independent():
    """The numbers of 4 x 8 x 64 tokens are all different, uniform, and uncorrelated with their neighbors along every axis."""
    uniforms = np.asarray(uniform_noise(jax.random.key(0), jnp.arange(4), 8, 64)).reshape(4, 8, 64)
    assert (uniforms[2] == uniform_noise(jax.random.key(0), jnp.array([2]), 9, 65)[:8, :64]).all()
    assert uniforms.shape == (4, 8, 64) and len(np.unique(uniforms)) == uniforms.size
    assert scipy.stats.kstest(uniforms.ravel(), "uniform").pvalue > 1e-3
    for axis in range(3):
        a, b = (np.take(uniforms, range(start, uniforms.shape[axis] - 1 + start), axis).ravel() for start in (0, 1))
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)


# --- whole rollouts ---

P, G, S, T = 4, 3, 6, 8
LENGTHS = np.array([1, 3, 6, 4], np.int32)
PROMPTS = np.random.default_rng(0).integers(0, SHAPE.vocab, (P, S)).astype(np.int32)
IDS = np.array([0, 7, 2**31 - 1, 12], np.int32)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def params():
    return random_params(POLICY, 0)


def roll(params, prompts=PROMPTS, lengths=LENGTHS, ids=IDS, key=KEY, **changes) -> Rollouts:
    # With few slots, the decode loop is compiled for one batch size only.
    static = {"samples": G, "max_new_tokens": T, "temperature": TEMPERATURE, "stop_ids": STOPS, "slots": 4} | changes
    return jax.device_get(generate(POLICY, params, prompts, lengths, ids, key, **static))


@pytest.fixture(scope="module")
def rollouts(params):
    return roll(params)


@pytest.fixture(scope="module")
def endless(params):
    """Return the same rollouts without stop tokens."""
    return roll(params, stop_ids=())


def test_a_stop_token_ends_a_response(rollouts, endless):
    """A response equals one without stop tokens up to and including its first stop token, followed by zeros."""
    assert (endless.lengths_PxG == T).all() and not endless.stopped_PxG.any() and endless.mask_PxGxT.all()
    is_stop = np.isin(endless.tokens_PxGxT, STOPS)
    stopped = is_stop.any(-1)
    lengths = np.where(stopped, is_stop.argmax(-1) + 1, T)
    mask = np.arange(T) < lengths[..., None]
    ends = set(zip(lengths.ravel().tolist(), stopped.ravel().tolist(), strict=True))
    assert {(1, True), (T, True), (T, False)} < ends, "the example does not cover all kinds of ends"
    expected = Rollouts(
        tokens_PxGxT=endless.tokens_PxGxT * mask,
        lengths_PxG=lengths,
        logprobs_PxGxT=endless.logprobs_PxGxT * mask,
        ended_PxG=stopped,
    )
    assert_same(rollouts, expected)
    np.testing.assert_array_equal(rollouts.mask_PxGxT, mask)
    assert (rollouts.logprobs_PxGxT[mask] < 0).all() and (rollouts.logprobs_PxGxT[~mask] == 0).all()


def test_logprobs_of_the_sampler_equal_numpy(params, rollouts):
    for p, g in np.ndindex(P, G):
        prompt, length = PROMPTS[p, : LENGTHS[p]], rollouts.lengths_PxG[p, g]
        response = rollouts.tokens_PxGxT[p, g, :length]
        alone = reference.logits(params, SHAPE, [*prompt, *response])[len(prompt) - 1 : -1]
        expected = reference.log_softmax(alone / TEMPERATURE)[np.arange(length), response]
        np.testing.assert_allclose(rollouts.logprobs_PxGxT[p, g, :length], expected, atol=1e-5)


def trainer_logprobs(policy, params, tokens_PxGxT, mask_PxGxT, temperature):
    batch = UpdateBatch(
        prompts_PxS=PROMPTS,
        lengths_P=LENGTHS,
        window_P=np.arange(P),
        tokens_PxGxT=tokens_PxGxT,
        mask_PxGxT=mask_PxGxT,
        sampler_logprobs_PxGxT=np.zeros(tokens_PxGxT.shape, np.float32),
        advantages_PxG=np.zeros(tokens_PxGxT.shape[:2], np.float32),
        counted_P=np.ones(P, bool),
    )
    limits = UpdateLimits(
        minibatches=1,
        rows=1,
        microbatch_tokens=64,
        logit_chunk_tokens=16,
        temperature=temperature,
        max_new_tokens=T,
    )
    logprobs_PxGxT, _ = jax.jit(response_logprobs, static_argnums=(0, 1))(policy, limits, params, batch)
    return logprobs_PxGxT


def test_logprobs_of_sampler_and_trainer_agree(params, rollouts):
    mask = rollouts.mask_PxGxT
    trainer = trainer_logprobs(POLICY, params, rollouts.tokens_PxGxT, mask, TEMPERATURE)
    np.testing.assert_allclose(np.where(mask, trainer, 0), rollouts.logprobs_PxGxT, atol=1e-5)


def test_absent_ids_are_neither_sampled_nor_scored(params):
    """At a high temperature, which would draw each of them otherwise. The trainer excludes the same ids."""
    absent = 0, 5, *range(40, SHAPE.vocab)
    policy = dataclasses.replace(POLICY, absent_ids=absent)
    arguments = params, PROMPTS, LENGTHS, IDS, KEY
    ours = generate(policy, *arguments, samples=64, max_new_tokens=T, temperature=10.0, stop_ids=STOPS, slots=8)
    tokens, mask = jax.device_get((ours.tokens_PxGxT, ours.mask_PxGxT))
    assert set(tokens[mask].tolist()) == set(range(SHAPE.vocab)) - set(absent)
    trainer = trainer_logprobs(policy, params, tokens, mask, 10.0)
    np.testing.assert_allclose(np.where(mask, trainer, 0), ours.logprobs_PxGxT, atol=1e-5)
    shares = reference.softmax(reference.logits(params, SHAPE, PROMPTS[2])[-1] / 10)
    first = tokens[2, :, 0]
    expected = np.log(shares[first] / np.delete(shares, absent).sum())
    np.testing.assert_allclose(ours.logprobs_PxGxT[2, :, 0], expected, atol=1e-5)


def test_rollouts_do_not_depend_on_prompt_order(params, rollouts):
    order = np.array([2, 0, 3, 1])
    shuffled = roll(params, PROMPTS[order], LENGTHS[order], IDS[order])
    assert_same(shuffled, select(rollouts, order))


def test_rollouts_depend_only_on_their_own_prompt(params, rollouts):
    """They are the same in another batch, with other prompts, more padding and more samples."""
    rows = np.array([3, 1])
    poison = np.random.default_rng(9).integers(0, SHAPE.vocab, (2, S + 5)).astype(np.int32)
    prompts = np.where(np.arange(S + 5) < LENGTHS[rows, None], np.pad(PROMPTS[rows], ((0, 0), (0, 5))), poison)
    ours = roll(params, prompts, LENGTHS[rows], IDS[rows], samples=G + 2)
    assert_same(select(ours, np.s_[:, :G]), select(rollouts, rows))
    others = PROMPTS.copy()
    others[2:] = (others[2:] + 1) % SHAPE.vocab
    ours = roll(params, others, np.array([1, 3, 2, 5], np.int32), IDS)
    assert_same(select(ours, np.s_[:2]), select(rollouts, np.s_[:2]))


def test_noise_differs_between_samples_prompts_and_keys(params, endless):
    """All prompts have the same tokens, so that rollouts can only differ by their noise."""
    same = np.tile(PROMPTS[2], (P, 1)), np.full(P, S, np.int32)
    ours = roll(params, *same, np.array([5, 6, 5, 8], np.int32), stop_ids=())
    responses = [tuple(response) for response in ours.tokens_PxGxT.reshape(-1, T).tolist()]
    assert len(set(responses)) == 3 * G, "two of the four prompts have the same id"
    np.testing.assert_array_equal(ours.tokens_PxGxT[0], ours.tokens_PxGxT[2])
    other = roll(params, key=jax.random.fold_in(KEY, 1), stop_ids=())
    assert (other.tokens_PxGxT != endless.tokens_PxGxT).any(-1).all()


def test_sampling_at_a_temperature_near_zero_is_greedy(params):
    """Compared with a full NumPy forward pass for every token."""
    ours = roll(params, temperature=1e-3, stop_ids=(), samples=1)
    for p in range(P):
        tokens = PROMPTS[p, : LENGTHS[p]].tolist()
        for _ in range(T):
            tokens.append(int(reference.logits(params, SHAPE, tokens)[-1].argmax()))
        assert ours.tokens_PxGxT[p, 0].tolist() == tokens[LENGTHS[p] :]
    np.testing.assert_allclose(ours.logprobs_PxGxT, 0, atol=0.1)


def test_first_tokens_follow_the_distribution_at_the_temperature(params):
    """With 4,000 samples of one prompt, a temperature that is ignored or applied twice fails by far."""
    ids = np.arange(500, dtype=np.int32)
    prompts, lengths = np.tile(PROMPTS[2], (500, 1)), np.full(500, S, np.int32)
    first = roll(params, prompts, lengths, ids, samples=8, max_new_tokens=1).tokens_PxGxT.ravel()
    shares = reference.softmax(reference.logits(params, SHAPE, PROMPTS[2])[-1] / TEMPERATURE)
    counts = np.bincount(first, minlength=SHAPE.vocab)
    often = shares > 0.002
    observed = [*counts[often], counts[~often].sum()]
    expected = [*shares[often], shares[~often].sum()]
    assert scipy.stats.chisquare(observed, np.array(expected) * len(first)).pvalue > 1e-3
