"""Rewards by name, each against its equation over whole sequences, one at a time, in NumPy and float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.registry import REWARDS
from rpt_jax.rewards import catalogue as rewards
from rpt_jax.rewards.catalogue import RewardConfig, RewardInputs, total_reward
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.rollout.sampler import distinct_share
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import SHALLOW, SHAPE, random_params

# Tokens without bytes, a box in two tokens, its end, a token that reaches out of the box, and words of one byte.
STOP, END, BOS, OPEN, BRACE, CLOSE, OUT = range(7)
VOCAB = [b"", b"", b"", b"\\boxed", b"{", b"}", b"a}"] + [bytes([97 + i]) for i in range(SHAPE.vocab - 7)]
BYTES_VxX = np.array([list(piece.ljust(6, b"\0")) for piece in VOCAB], np.uint8)
LENGTHS_V = np.array([len(piece) for piece in VOCAB], np.int32)
BRIDGE = (END, OPEN, BRACE)
S, T, K, BEFORE, AFTER = 9, 8, 2, 2, 1

PROMPTS = [[BOS, 8, 20, 21, 22, 23, 9], [BOS, 8, 30, 31, 9], [BOS, 8, 11, 12, 13, 14, 15, 16, 9]]
REFERENCES = [[25, 26, 27], [40], []]
# Responses with what their box begins with; the first of a prompt's that are long enough are finished.
RESPONSES = [
    ([10, 11, END, OPEN, BRACE, 25, CLOSE, STOP], 25),
    ([12, END, OPEN, BRACE, 33, 25, CLOSE, STOP], 33),
    ([13, 14, 15, 16, 17, 18, 19, 20], None),  # Cut by the limit.
    ([END, 14, END, 15, STOP], None),  # No box, and two ends of thinking.
    ([10, END, OPEN, BRACE, 33, CLOSE, STOP], 33),
    ([END, OPEN, BRACE, CLOSE, STOP], None),
    ([11, END, OPEN, BRACE, OUT, STOP], None),  # What the box begins with ends outside it.
    ([12, 13, STOP], None),
    ([10, END, OPEN, BRACE, 34, CLOSE, STOP], 34),
    ([END, OPEN, BRACE, 35, CLOSE, STOP], 35),
    ([11, 12, 13, STOP], None),
    ([10, 11, 12, 13, 14, 15, 16, 17], None),
]
G = len(RESPONSES) // len(PROMPTS)


def padded(rows: list[list[int]], size: int, fill: int) -> np.ndarray:
    return np.array([row + [fill] * (size - len(row)) for row in rows], np.int32)


@pytest.fixture(scope="module")
def evidence() -> RewardInputs:
    lengths = np.array([len(tokens) for tokens, _ in RESPONSES]).reshape(-1, G)
    return RewardInputs(
        config=RewardConfig("prefix", K, 0.0, 0.0, 0, 0.0, T, BOS, BEFORE, AFTER, END, BRIDGE, microbatch=1, chunk=5),
        policy=SHALLOW,
        params=random_params(SHALLOW, 0),
        average=random_params(SHALLOW, 1),
        prompts_PxS=jnp.asarray(padded(PROMPTS, S, 44)),
        lengths_P=jnp.array([len(prompt) for prompt in PROMPTS]),
        tokens_PxGxT=jnp.asarray(padded([tokens for tokens, _ in RESPONSES], T, END).reshape(-1, G, T)),
        response_lengths_PxG=jnp.asarray(lengths, jnp.int32),
        stopped_PxG=jnp.array([tokens[-1] == STOP for tokens, _ in RESPONSES]).reshape(-1, G),
        reference_ids_PxR=jnp.asarray(padded(REFERENCES, 4, 0)),
        references_P=jnp.array([len(ids) for ids in REFERENCES]),
        matched_PxG=jnp.arange(12.0).reshape(-1, G),
        status_PxG=jnp.arange(12).reshape(-1, G) % len(Status),
        vocab=(jnp.asarray(BYTES_VxX), jnp.asarray(LENGTHS_V)),
    )


def logprobs(params: Any, context: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each of `tokens` after `context` and those before it."""
    logits = reference.logits(params, SHALLOW.config, [*context, *tokens])
    scores = reference.log_softmax(logits)
    return [scores[len(context) - 1 + i, token] for i, token in enumerate(tokens)]


def reasoning(tokens: list[int]) -> list[int]:
    """What stands before the last end of thinking; without one everything but the stop token."""
    if END in tokens:
        return tokens[: len(tokens) - 1 - tokens[::-1].index(END)]
    return tokens[:-1] if tokens[-1] == STOP else tokens


def expected(name: str, e: RewardInputs) -> np.ndarray:
    values = []
    for i, (tokens, first) in enumerate(RESPONSES):
        p = i // G
        group, scored = RESPONSES[p * G : p * G + G], REFERENCES[p][:K]
        target = REFERENCES[p][0] if REFERENCES[p] else None
        document = [BOS, *PROMPTS[p][BEFORE:-AFTER]]
        after = logprobs(e.params, [*PROMPTS[p], *reasoning(tokens), *BRIDGE], scored)
        before = logprobs(e.average, document, scored)
        dense = 0.0 if first is None else 1.0 if first == target else np.exp(logprobs(e.params, document, [first])[0])
        values.append(
            {
                "prefix": float(i),
                "first_token": float(first is not None and first == target),
                "dense": dense,
                "conditional_dense": dense if target in [first for _, first in group if first] else 0.0,
                "info_gain": sum(after) - sum(before),
                "mean_prob": np.mean(np.exp(after)) if scored else 0.0,
                "log_prob": sum(after),
            }[name]
        )
    return np.array(values).reshape(-1, G)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(evidence, name):
    ours = REWARDS[name].function(evidence)
    theirs = expected(name, evidence)
    assert ours.dtype == jnp.float32 and np.ptp(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_whoever_shares_a_microbatch_changes_nothing(evidence):
    together = evidence._replace(config=evidence.config._replace(microbatch=3, chunk=1000))
    np.testing.assert_allclose(
        REWARDS["info_gain"].function(together), REWARDS["info_gain"].function(evidence), rtol=1e-4, atol=1e-5
    )


def test_terms():
    status = jnp.array([Status.CORRECT, Status.WRONG_BYTES, Status.EMPTY, Status.NO_BOX, Status.NOT_FINISHED])
    assert rewards.format_term(status).tolist() == [1, 1, 1, 0, 0]
    lengths = jnp.array([0, 8, 12, 14, 16, 20])
    np.testing.assert_allclose(rewards.overlong_term(lengths, 20, 8), [0, 0, 0, -0.25, -0.5, -1])
    np.testing.assert_allclose(rewards.budget_term(lengths, 10), [0, 0.8, 0.8, 0.6, 0.4, 0], atol=1e-6)
    budgets = [rewards.token_budget(step, 100, start=800, decay=0.2, least=200) for step in (0, 50, 100)]
    assert budgets == [800, int(800 * 0.2**0.5), 200]


def test_terms_are_added(evidence):
    config = evidence.config._replace(format_weight=0.5, overlong_weight=2.0, overlong_tokens=4, budget_weight=0.25)
    ours = jax.jit(lambda budget: total_reward(evidence._replace(config=config), budget))(4)
    for i, (tokens, _) in enumerate(RESPONSES):
        triangle = max(0.0, 1 - abs(len(reasoning(tokens)) - 4) / 4)
        boxed = Status(i % len(Status)) not in (Status.NO_BOX, Status.NOT_FINISHED)
        overlong = -min(1.0, max(0.0, (len(tokens) - (T - 4)) / 4))
        np.testing.assert_allclose(ours.ravel()[i], 0.75 * i + 0.25 * triangle + 0.5 * boxed + 2 * overlong, rtol=1e-5)
    np.testing.assert_array_equal(total_reward(evidence, 4), evidence.matched_PxG)


def test_distinct_n_counts_what_a_group_repeats():
    """Against sets of tuples; one prompt repeats itself, another never, and of a third all samples are too short."""
    rng, n, samples, limit = np.random.default_rng(0), 2, 3, 9
    tokens = rng.integers(0, 6, (3, samples, limit)).astype(np.int32)
    tokens[1] = np.arange(samples * limit).reshape(samples, limit)
    lengths = rng.integers(n, limit + 1, (3, samples)).astype(np.int32)
    lengths[2] = 1
    shares = []
    for p in range(2):
        runs = [tuple(tokens[p, g, t : t + n]) for g in range(samples) for t in range(lengths[p, g] - n + 1)]
        shares.append(len(set(runs)) / len(runs))
    assert shares[1] == 1 and shares[0] < 1
    np.testing.assert_allclose(distinct_share(tokens, lengths, n), np.mean(shares), rtol=1e-6)
    assert distinct_share(tokens[..., :1], np.minimum(lengths, 1), 2) == 1.0
