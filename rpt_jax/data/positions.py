"""Which positions of which documents are worth predicting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rpt_jax.score import Scores


class Position(NamedTuple):
    """A target: token `position` of document number `document`, given the tokens before it."""

    document: int
    position: int
    entropy: float  # The proxy's, in nats.


def choose_positions(scores: Sequence[Scores], threshold: float, min_context: int) -> list[Position]:
    """Keep positions whose entropy is above `threshold` and that have at least `min_context` tokens before them.

    Paper, section 3.3 (the threshold is not given there); without a minimum context, the first tokens of a document look
    hard only because nothing is known yet.
    """
    chosen = []
    for document, score in enumerate(scores):
        kept = np.flatnonzero(score.entropy_S > threshold)
        chosen += [Position(document, int(i), float(score.entropy_S[i])) for i in kept if i >= min_context]
    return chosen
