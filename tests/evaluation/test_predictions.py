"""The prediction read on the host, against the reference implementation and the kernel of the reward."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.config.schema import BOX_READINGS
from rpt_jax.evaluation.predictions import direct_prediction, read_prediction
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.tokenizers.tokenizer import ByteVocab
from tests.helpers import reward_reference
from tests.helpers.reward_cases import VOCAB, vocab_arrays
from tests.helpers.reward_fuzz import fuzz, make_vocabulary


@pytest.mark.parametrize("reading", BOX_READINGS)
def test_predictions_are_those_of_the_reference(reading: str, tmp_path):
    vocab = make_vocabulary("hostile", tmp_path)
    case = fuzz(vocab, np.random.default_rng(0), 300)
    outcomes = []
    for p, g in np.ndindex(case.lengths.shape):
        tokens, stopped = case.tokens[p, g, : case.lengths[p, g]].tolist(), bool(case.stopped[p, g])
        found = read_prediction(tokens, vocab.pieces, vocab.end, stopped, reading)
        arguments = (tokens, len(tokens), stopped)
        right, _ = reward_reference.reward(*arguments, case.continuations[p], vocab.pieces, vocab.end, reading)
        assert found.is_right(case.continuations[p]) == bool(right)
        assert found.first_token == reward_reference.first_token(*arguments, vocab.pieces, vocab.end, reading)
        outcomes.append((bool(right), found.content is None, found.first_token >= 0))
    assert np.array(outcomes).mean(axis=0).min() > 0.1, "the generated responses cover too little"


@pytest.mark.parametrize("reading", BOX_READINGS)
def test_direct_predictions_are_read_as_if_they_were_in_a_box(reading: str):
    """A token that no box can hold is never right, and every other one is: the kernel decides which."""
    vocab = ByteVocab(*vocab_arrays(VOCAB))
    boxable_V = boxable_tokens(vocab, PromptConfig(box_reading=reading))
    assert 0 < boxable_V.sum() < len(VOCAB)
    for token, piece in enumerate(VOCAB):
        assert direct_prediction(token, VOCAB, reading).is_right([piece]) == boxable_V[token], piece


def test_a_token_of_two_true_tokens_is_right_under_the_prefix_rule_only():
    pieces = [b" size", b" size and", b" and"]
    prediction = direct_prediction(1, pieces, "balanced")
    assert prediction.is_right([b" size", b" and"]) and prediction.first_token != 0
