"""Cold-start traces: examples of next-token reasoning, for a policy that has never seen the format.

The paper starts from a reasoning model. A small base policy must first be shown the format, in its own token ids:

    recall      … he has 93 - 38 =  <think>93 - 38 = </think>\\boxed{5}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rpt_jax.config import PretrainConfig
from rpt_jax.registry import TRACE_WRITERS
from rpt_jax.tokenizers.tokenizer import END_THINK, Tokenizer

BOX = "\\boxed{"


class TraceWriter(Protocol):
    """Writes traces for positions of one document."""

    @property
    def preferred_positions(self) -> list[int]:
        """Token positions at which a `preferred_fraction` of the traces is placed; often none."""
        ...

    @property
    def preferred_fraction(self) -> float: ...

    def can_box(self, position: int) -> bool:
        """Whether a box around token `position` reads as that token."""
        ...

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the response ids that reason at `position` and box the true continuation."""
        ...

    def drills(self, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """Return responses that are learned without the document, each with the number of its first ids that are given."""
        ...


@TRACE_WRITERS.register("recall")
class RecallTraces:
    """Traces that repeat the end of the context and predict."""

    preferred_fraction = 0.0

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], config: PretrainConfig, max_tokens: int):
        """
        Args:
          ids: token ids of the document.
          max_tokens: the longest trace that there is room for.
        """
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._recalled_tokens = config.recalled_tokens
        self._max_tokens = max_tokens

    @property
    def preferred_positions(self) -> list[int]:
        return []

    def can_box(self, position: int) -> bool:
        """Whether a box around token `position` reads as that token: the last opening of a box is the one that counts."""
        return BOX.encode() not in self._tokenizer.token_bytes([self._ids[position]])

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the response ids that repeat the context before `position` and box the true token."""
        del rng
        return self._trace(self._ids[max(0, position - self._recalled_tokens) : position], [self._ids[position]])

    def drills(self, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        del rng
        return []

    def _trace(self, reasoning: list[int], prediction: list[int]) -> list[int]:
        tokenizer = self._tokenizer
        end_think = [tokenizer.end_think_id] if tokenizer.end_think_id >= 0 else tokenizer.encode(END_THINK)
        return [
            *reasoning,
            *end_think,
            *tokenizer.encode(BOX),
            *prediction,
            *tokenizer.encode("}"),
            tokenizer.eos_id,
        ]
