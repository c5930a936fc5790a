"""Keywords of reasoning, and how varied responses are, on written-out responses."""

from __future__ import annotations

import pytest

from rpt_jax.evaluation.patterns import KEYWORDS, contains_keyword, distinct_n, pattern_shares, template_share


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


def test_distinct_runs_of_words():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert (
        distinct_n(["a b", "A, B!"], 2) == 1 / 2
    )  # Case and punctuation do not count, and no run spans two responses.
    assert distinct_n(["a"], 3) == 0.0


def test_template_share_is_that_of_the_most_common_opening():
    assert template_share(["The next token is likely x", "the next token is likely y!", "Well"]) == pytest.approx(2 / 3)
