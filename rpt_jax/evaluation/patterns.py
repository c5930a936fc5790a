"""Reasoning patterns: which share of responses contains keywords of a kind (paper, section 4.5 and Table 9)."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.stats

# The paper's groups (Table 9). It does not say how a keyword is matched: both ways are reported.
KEYWORDS = {
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent": ("etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring", "options"),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}
MATCHES = ("substring", "word")
_WORDS = re.compile(r"\w+")
_OPENING_WORDS = 5


def contains_keyword(response: str, group: str, match: str) -> bool:
    """Return whether a response contains a keyword of a group, in upper or lower case.

    Args:
      response: text of the response.
      group: of `KEYWORDS`.
      match: "substring", or "word" for whole words only: "wait" is not in "waiter".
    """
    text = response.lower()
    if match == "substring":
        return any(keyword in text for keyword in KEYWORDS[group])
    return any(re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", text) for keyword in KEYWORDS[group])


def count_runs(responses: Sequence[str], n: int) -> collections.Counter[tuple[str, ...]]:
    """Return how often each run of n words occurs; case and punctuation do not count, and no run spans two responses."""
    return collections.Counter(run for response in responses for run in _runs(response, n))


def distinct_share(runs: collections.Counter[tuple[str, ...]], drawn: int) -> float:
    """Return the expected share of different runs among `drawn` of them, drawn at random without replacement.

    With all of them this is distinct-n (arXiv 1510.03055), which falls as responses get longer, whatever they say. Policies are
    compared by as many runs from each, as species are by rarefaction (Hurlbert, Ecology 52, 1971).

    Args:
      runs: how often each occurs.
      drawn: 1 to the number of all runs.
    """
    counts_R = np.array(list(runs.values()))
    never_drawn_R = scipy.stats.hypergeom.pmf(0, counts_R.sum(), counts_R, drawn)
    return float(np.sum(1 - never_drawn_R) / drawn)


def template_share(responses: Sequence[str]) -> float:
    """Return the share of responses that begin with the five words that most of them begin with."""
    openings = collections.Counter(tuple(_WORDS.findall(response.lower())[:_OPENING_WORDS]) for response in responses)
    return openings.most_common(1)[0][1] / len(responses)


def pattern_shares(responses: Sequence[str], match: str) -> dict[str, np.ndarray]:
    """Return for each group whether each response contains one of its keywords, float [N]."""
    return {
        group: np.array([contains_keyword(response, group, match) for response in responses], float)
        for group in KEYWORDS
    }


def _runs(response: str, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORDS.findall(response.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
