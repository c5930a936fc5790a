"""Reasoning taken out of responses, and prompts that end with other reasoning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.evaluation.altered_reasoning import Reasoning, end_prompts_with, split_reasoning
from rpt_jax.prompts.builder import PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import TINY


@pytest.fixture(scope="module")
def special():
    """A tokenizer with special tokens for the markers."""
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def plain(special):
    """The same without them, so that the markers are ordinary text."""
    return dataclasses.replace(special, think_id=-1, end_think_id=-1)


def tokens(tokenizer, text: str) -> list[int]:
    """Return the ids of a text, with the markers as the tokenizer has them."""
    markers = {"<think>": tokenizer.think_id, "</think>": tokenizer.end_think_id}
    return [
        token
        for part in text.replace("<", "|<").replace(">", ">|").split("|")
        for token in ([markers[part]] if markers.get(part, -1) >= 0 else tokenizer.encode(part))
    ]


@pytest.mark.parametrize("name", ["special", "plain"])
@pytest.mark.parametrize(
    ("response", "opening", "content"),
    [
        ("1 + 2 = 3</think>\\boxed{3}", "", "1 + 2 = 3"),
        ("<think>1 + 2 = 3</think>\\boxed{3}", "<think>", "1 + 2 = 3"),
        ("</think>\\boxed{3}", "", ""),
        ("one</think>two</think>\\boxed{3}", "", "one</think>two"),
        ("<think>it never ends", "<think>", "it never ends"),
    ],
)
def test_reasoning_is_what_is_in_front_of_the_last_marker(name, response, opening, content, request):
    tokenizer = request.getfixturevalue(name)
    found = split_reasoning(tokens(tokenizer, response), tokenizer)
    assert found == Reasoning(opening=tokens(tokenizer, opening), content=tokens(tokenizer, content))


def test_the_stop_token_of_a_response_without_a_marker_is_no_reasoning(special):
    content = tokens(special, "12")
    assert split_reasoning([*content, special.stop_ids[0]], special).content == content


@pytest.mark.parametrize("name", ["special", "plain"])
def test_prompts_end_with_the_reasoning_and_the_marker(name, request):
    tokenizer = request.getfixturevalue(name)
    builder = PromptBuilder(PromptConfig(max_tokens=32, template="plain", prefill_think_token=False), tokenizer)
    ids = tokenizer.encode("Ann has 3 apples.")
    prompts = stack([builder.build(i, ids, Position(window=0, position=i + 2, entropy=1.0)) for i in range(3)])
    marker = list(tokenizer.end_think_ids)
    short = Reasoning(opening=[], content=tokens(tokenizer, "1 + 2"))
    long = Reasoning(opening=[5], content=[6] * 40)
    ended = end_prompts_with(prompts, [short, Reasoning([], []), long], tokenizer, 40)

    assert ended.tokens_PxS.shape == (3, 72) and prompts.tokens_PxS.shape == (3, 32)
    added = [short.content + marker, marker, [5, *[6] * (39 - len(marker)), *marker]]
    for p in range(3):
        before = prompts.tokens_PxS[p, : prompts.lengths_P[p]].tolist()
        assert ended.tokens_PxS[p, : ended.lengths_P[p]].tolist() == before + added[p]
        assert not ended.tokens_PxS[p, ended.lengths_P[p] :].any()
    np.testing.assert_array_equal(ended.reference_PxR, prompts.reference_PxR)
