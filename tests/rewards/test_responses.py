"""Responses as a verifier on the host reads them."""

from __future__ import annotations

import numpy as np

from rpt_jax.rewards.responses import Response
from tests.helpers import reward_reference
from tests.helpers.reward_cases import THINK_END, VOCAB
from tests.helpers.reward_fuzz import fuzz, make_vocabulary


def test_the_answer_follows_the_last_end_of_thinking():
    assert Response(b"a</think>b</think>c").answer == b"c"
    assert Response(b"abc", marker=1).answer == b"bc"
    assert Response(b"ab</think>c", marker=1).answer == b"c"
    assert Response(b"</think>abc", marker=9).answer == b"bc"


def test_a_response_without_an_end_of_thinking_has_no_answer():
    assert Response(rb"\boxed{4}").answer is None
    assert Response(rb"\boxed{4}").box is None
    assert Response(rb"\boxed{4}</think>").box is None


def test_a_response_that_was_cut_has_no_answer():
    assert Response(rb"</think>\boxed{4}", finished=False).box is None


def test_a_response_of_tokens_reads_as_the_reference_of_the_kernel_does(tmp_path):
    vocabulary = make_vocabulary("hostile", tmp_path)
    case = fuzz(vocabulary, np.random.default_rng(3), 40)
    boxes = 0
    for p, g in np.ndindex(case.lengths.shape):
        tokens = case.tokens[p, g, : case.lengths[p, g]].tolist()
        response = Response.of_tokens(tokens, VOCAB, THINK_END, finished=bool(case.stopped[p, g]))
        _, status = reward_reference.reward(
            case.tokens[p, g].tolist(), len(tokens), case.stopped[p, g], case.continuations[p], VOCAB, THINK_END
        )
        prediction = response.box
        assert reward_reference.status_of(prediction, case.continuations[p], bool(case.stopped[p, g])) == status
        boxes += prediction is not None
    assert boxes > 100
