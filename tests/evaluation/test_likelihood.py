"""Log-likelihoods of continuations against a NumPy policy that runs one sequence at a time."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.evaluation.likelihood import Likelihood, LikelihoodScorer, Request, collect
from rpt_jax.model.transformer import Transformer
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import POLICY, SHAPE, random_params

RNG = np.random.default_rng(0)


def ids(tokens: int) -> list[int]:
    return RNG.integers(0, SHAPE.vocab, tokens).tolist()


def score(requests: list[Request], policy: Transformer = POLICY, tokens_per_pass: int = 64) -> list[list[Likelihood]]:
    """Score with parameters of seed 1."""
    mesh = make_mesh(1, 1, 1)
    scorer = LikelihoodScorer(
        policy, random_params(policy, 1), mesh, tokens_per_pass=tokens_per_pass, logit_chunk_tokens=16
    )
    with use_mesh(mesh):
        launched = scorer.launch(requests)
        return collect(requests, launched.indices, jax.device_get(launched.arrays))


def expected(prompt: list[int], continuation: list[int]) -> tuple[float, list[int]]:
    """Return the log-likelihood of a continuation, and the most likely tokens in its place."""
    logits = reference.logits(random_params(POLICY, 1), SHAPE, [*prompt, *continuation])[len(prompt) - 1 : -1]
    return reference.log_softmax(logits)[range(len(continuation)), continuation].sum(), logits.argmax(-1).tolist()


def test_likelihoods_are_those_of_each_sequence_by_itself():
    """Prompts and continuations of many lengths, in another order than they are computed in."""
    requests = [
        Request(ids(prompt), [ids(length) for length in lengths])
        for prompt, lengths in [(5, (1,)), (40, (3, 1)), (1, (2,)), (33, (4, 2)), (7, (1,))]
    ]
    for request, found in zip(requests, score(requests), strict=True):
        for continuation, likelihood in zip(request.continuations, found, strict=True):
            logprob, most_likely = expected(list(request.prompt), list(continuation))
            assert likelihood.logprob == pytest.approx(logprob, abs=1e-4)
            assert likelihood.first_token == most_likely[0]
            assert likelihood.is_greedy == (most_likely == continuation)


def test_continuation_of_the_most_likely_tokens_is_greedy():
    prompt, continuation = ids(40), []
    for _ in range(3):
        logits = reference.logits(random_params(POLICY, 1), SHAPE, [*prompt, *continuation])
        continuation.append(int(logits[-1].argmax()))
    [[greedy, other]] = score(
        [Request(prompt, [continuation, [*continuation[:2], (continuation[2] + 1) % SHAPE.vocab]])]
    )
    assert greedy.is_greedy and not other.is_greedy


def test_prompt_beyond_the_context_loses_its_oldest_tokens():
    policy = dataclasses.replace(POLICY, config=dataclasses.replace(SHAPE, context=20))
    prompt, continuation = ids(50), ids(2)
    [[found]] = score([Request(prompt, [continuation])], policy)
    assert found.logprob == pytest.approx(expected(prompt[-19:], continuation)[0], abs=1e-4)
