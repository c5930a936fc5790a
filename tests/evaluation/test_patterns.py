"""Keywords of reasoning, and how varied responses are, on written-out responses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.evaluation.patterns import (
    KEYWORDS,
    contains_keyword,
    count_runs,
    distinct_share,
    pattern_shares,
    template_share,
)


@pytest.mark.parametrize(
    ("response", "group", "substring", "word"),
    [
        ("Wait, that is wrong.", "reflection", True, True),
        ("The waiter came.", "reflection", True, False),
        ("Apples, pears, etc. are fruit", "divergent", True, True),
        ("sketch", "divergent", False, False),
        ("In CONCLUSION: 4", "deduction", True, True),
        ("inconclusively", "deduction", False, False),
        ("It is improbably large", "hypothesis", True, False),
        ("Break this\ndown", "breakdown", False, False),
        ("or something, either way", "divergent", True, True),
        ("", "transition", False, False),
    ],
)
def test_keywords_are_found_by_substring_and_by_word(response, group, substring, word):
    assert contains_keyword(response, group, "substring") is substring
    assert contains_keyword(response, group, "word") is word


def test_groups_are_those_of_the_paper():
    assert [len(words) for words in KEYWORDS.values()] == [2, 5, 2, 2, 7, 6]


def test_shares_count_each_response_once():
    shares = pattern_shares(["wait wait", "finally, wait", "no"], "substring")
    assert shares["reflection"].tolist() == [1, 1, 0] and shares["deduction"].tolist() == [0, 1, 0]


def test_runs_of_words():
    assert count_runs(["a b a b"], 2) == {("a", "b"): 2, ("b", "a"): 1}
    assert count_runs(["a b", "A, B!"], 2) == {("a", "b"): 2}  # No run spans two responses.
    assert count_runs(["a"], 3) == {}


def test_all_runs_give_distinct_n():
    assert distinct_share(count_runs(["a b a b"], 1), 4) == pytest.approx(2 / 4)
    assert distinct_share(count_runs(["a b a b"], 2), 3) == pytest.approx(2 / 3)


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_the_distinct_share_is_the_mean_over_all_choices_of_runs(counts: list[int], data: st.DataObject):
    runs = [str(i) for i, count in enumerate(counts) for _ in range(count)]
    drawn = data.draw(st.integers(1, len(runs)))
    choices = list(itertools.combinations(runs, drawn))
    expected = sum(len(set(choice)) for choice in choices) / len(choices) / drawn
    assert distinct_share(count_runs(runs, 1), drawn) == pytest.approx(expected)


def test_template_share_is_that_of_the_most_common_opening():
    assert template_share(["The next token is likely x", "the next token is likely y!", "Well"]) == pytest.approx(2 / 3)
