"""Rewards by name, each against its equation, computed per sequence in NumPy and float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import ObjectiveConfig
from rpt_jax.registry import REWARDS
from rpt_jax.rewards import catalogue as rewards
from rpt_jax.rewards.catalogue import RewardInputs, RewardLayout, total_reward
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.tokenizers.tokenizer import ByteVocab
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import SHALLOW, SHAPE, random_params

# Tokens without bytes, a box opening in two tokens, its closing brace, a token that extends beyond the box, and
# one-byte words.
STOP, END, BOS, OPEN, BRACE, CLOSE, OUT = range(7)
VOCAB = [b"", b"", b"", b"\\boxed", b"{", b"}", b"a}"] + [bytes([97 + i]) for i in range(SHAPE.vocab - 7)]
BYTES_VxX = np.array([list(piece.ljust(6, b"\0")) for piece in VOCAB], np.uint8)
LENGTHS_V = np.array([len(piece) for piece in VOCAB], np.int32)
BRIDGE = (END, OPEN, BRACE)
S, T, K, PREFIX, SUFFIX = 9, 8, 2, 2, 1

PROMPTS = [[BOS, 8, 20, 21, 22, 23, 9], [BOS, 8, 30, 31, 9], [BOS, 8, 11, 12, 13, 14, 15, 16, 9]]
REFERENCES = [[25, 26, 27], [40], []]
# Responses, each with the first token of its prediction. Those that end with STOP are finished.
RESPONSES = [
    ([10, 11, END, OPEN, BRACE, 25, CLOSE, STOP], 25),
    ([12, END, OPEN, BRACE, 33, 25, CLOSE, STOP], 33),
    ([13, 14, 15, 16, 17, 18, 19, 20], None),  # Cut by the length limit.
    ([END, 14, END, 15, STOP], None),  # No box, and two end-of-thinking tokens.
    ([10, END, OPEN, BRACE, 33, CLOSE, STOP], 33),
    ([END, OPEN, BRACE, CLOSE, STOP], None),
    ([11, END, OPEN, BRACE, OUT, STOP], None),  # The first token of the box ends outside of it.
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
def inputs() -> RewardInputs:
    lengths = np.array([len(tokens) for tokens, _ in RESPONSES]).reshape(-1, G)
    return RewardInputs(
        objective=ObjectiveConfig(reference_tokens=K),
        layout=RewardLayout(
            bos_id=BOS,
            template_prefix_tokens=PREFIX,
            template_suffix_tokens=SUFFIX,
            end_think_id=END,
            box_reading="balanced",
            bridge_ids=BRIDGE,
            max_new_tokens=T,
            prompts_per_pass=1,
            logit_chunk_tokens=5,
        ),
        policy=SHALLOW,
        params=random_params(SHALLOW, 0),
        average=random_params(SHALLOW, 1),
        prompts_PxS=jnp.asarray(padded(PROMPTS, S, 44)),
        lengths_P=jnp.array([len(prompt) for prompt in PROMPTS]),
        tokens_PxGxT=jnp.asarray(padded([tokens for tokens, _ in RESPONSES], T, END).reshape(-1, G, T)),
        response_lengths_PxG=jnp.asarray(lengths, jnp.int32),
        stopped_PxG=jnp.array([tokens[-1] == STOP for tokens, _ in RESPONSES]).reshape(-1, G),
        # Each token of a reference is one byte.
        reference_PxR=jnp.asarray(padded([[VOCAB[i][0] for i in ids] for ids in REFERENCES], 4, 0).astype(np.uint8)),
        boundaries_PxRp1=jnp.array([[0 < i <= len(ids) for i in range(5)] for ids in REFERENCES]),
        reference_ids_PxR=jnp.asarray(padded(REFERENCES, 4, 0)),
        reference_lengths_P=jnp.array([len(ids) for ids in REFERENCES]),
        matched_PxG=jnp.arange(1.0, 13.0).reshape(-1, G),
        status_PxG=jnp.arange(12).reshape(-1, G) % len(Status),
        vocab=ByteVocab(bytes_VxX=jnp.asarray(BYTES_VxX), lengths_V=jnp.asarray(LENGTHS_V)),
    )


def logprobs(params: Any, context: list[int], tokens: list[int]) -> list[float]:
    """Return the log-probability of each of `tokens` after `context` and the tokens before it."""
    logits = reference.logits(params, SHALLOW.config, [*context, *tokens])
    scores = reference.log_softmax(logits)
    return [scores[len(context) - 1 + i, token] for i, token in enumerate(tokens)]


def reasoning(tokens: list[int]) -> list[int]:
    """Return the tokens before the last end-of-thinking token; without one, all but the stop token."""
    if END in tokens:
        return tokens[: len(tokens) - 1 - tokens[::-1].index(END)]
    return tokens[:-1] if tokens[-1] == STOP else tokens


def expected(name: str, inputs: RewardInputs) -> np.ndarray:
    values = []
    for i, (tokens, first) in enumerate(RESPONSES):
        p = i // G
        group, scored = RESPONSES[p * G : p * G + G], REFERENCES[p][:K]
        target = REFERENCES[p][0] if REFERENCES[p] else None
        document = [BOS, *PROMPTS[p][PREFIX:-SUFFIX]]
        after = logprobs(inputs.params, [*PROMPTS[p], *reasoning(tokens), *BRIDGE], scored)
        before = logprobs(inputs.average, document, scored)
        # No prediction has more than its first token right.
        share = float(first is not None and first == target) / max(1, len(REFERENCES[p]))
        if first is None:
            dense = 0.0
        else:
            dense = 1.0 if first == target else np.exp(logprobs(inputs.params, document, [first])[0])
        values.append(
            {
                "prefix": i + 1.0,
                "first_token": float(first is not None and first == target),
                "dense": dense,
                "conditional_dense": dense if target in [first for _, first in group if first] else 0.0,
                "info_gain": sum(after) - sum(before),
                "mean_prob": np.mean(np.exp(after)) if scored else 0.0,
                "log_prob": sum(after),
                "segment_prefix_share": (i + 1.0) * share,
                "segment_common_prefix": share,
                "verified": i + 1.0,
            }[name]
        )
    return np.array(values).reshape(-1, G)


@pytest.mark.parametrize("name", REWARDS)
def test_reward_equals_its_equation(inputs, name):
    ours = REWARDS[name].function(inputs)
    theirs = expected(name, inputs)
    assert ours.dtype == jnp.float32 and np.ptp(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_reward_does_not_depend_on_the_size_of_passes(inputs):
    layout = dataclasses.replace(inputs.layout, prompts_per_pass=3, logit_chunk_tokens=1000)
    together = dataclasses.replace(inputs, layout=layout)
    np.testing.assert_allclose(
        REWARDS["info_gain"].function(together), REWARDS["info_gain"].function(inputs), rtol=1e-4, atol=1e-5
    )


def test_additive_terms_equal_their_equations():
    status = jnp.array([Status.CORRECT, Status.WRONG_BYTES, Status.EMPTY, Status.NO_BOX, Status.NOT_FINISHED])
    assert rewards.format_term(status).tolist() == [1, 1, 1, 0, 0]
    lengths = jnp.array([0, 8, 12, 14, 16, 20])
    np.testing.assert_allclose(rewards.overlong_term(lengths, 20, 8), [0, 0, 0, -0.25, -0.5, -1])
    np.testing.assert_allclose(rewards.budget_term(lengths, jnp.int32(10)), [0, 0.8, 0.8, 0.6, 0.4, 0], atol=1e-6)
    budgets = [rewards.token_budget(step, 100, start=800, decay=0.2, minimum=200) for step in (0, 50, 100)]
    assert budgets == [800, int(800 * 0.2**0.5), 200]


def test_total_reward_adds_weighted_terms(inputs):
    objective = dataclasses.replace(
        inputs.objective, format_weight=0.5, overlong_weight=2.0, overlong_tokens=4, budget_weight=0.25
    )
    weighted = dataclasses.replace(inputs, objective=objective)
    ours = jax.jit(lambda budget: total_reward(weighted, budget))(4)
    for i, (tokens, _) in enumerate(RESPONSES):
        triangle = max(0.0, 1 - abs(len(reasoning(tokens)) - 4) / 4)
        boxed = Status(i % len(Status)) not in (Status.NO_BOX, Status.NOT_FINISHED)
        overlong = -min(1.0, max(0.0, (len(tokens) - (T - 4)) / 4))
        np.testing.assert_allclose(
            ours.ravel()[i], 0.75 * (i + 1) + 0.25 * triangle + 0.5 * boxed + 2 * overlong, rtol=1e-5
        )
    np.testing.assert_array_equal(total_reward(inputs, jnp.int32(4)), inputs.matched_PxG)
