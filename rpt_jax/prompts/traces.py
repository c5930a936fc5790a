"""Cold-start traces: examples of next-token reasoning, for a policy that has never seen the response format.

The paper starts from a reasoning model. A small base policy must first be shown the format, in its own token ids:

    recall      … he has 93 - 38 =  <think>93 - 38 = </think>\\boxed{5}

A trace writer is a class that follows the `TraceWriter` protocol and is registered by the name that `pretrain.traces` gives it:

    @TRACE_WRITERS.register("my_traces")
    class MyTraces(RecallTraces):
        def write(self, position, rng): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rpt_jax.config import PretrainConfig
from rpt_jax.prompts.response_format import BOX
from rpt_jax.registry import TRACE_WRITERS
from rpt_jax.tokenizers.tokenizer import Tokenizer


class Drill(NamedTuple):
    """A response that is learned without the document.

    Attributes:
      response: token ids.
      given: number of leading response tokens that are excluded from the loss.
      prompt: token ids of the whole prompt, template included; None for the end of the template, without a context.
    """

    response: Sequence[int]
    given: int = 0
    prompt: Sequence[int] | None = None


class TraceWriter(Protocol):
    """Writes the traces that are learned with one document.

    Constructed as `RecallTraces` is, with (tokenizer, ids, config, max_tokens).
    """

    @property
    def num_positions(self) -> int:
        """Number of positions of the document at which a trace is written."""
        ...

    @property
    def preferred_positions(self) -> list[int]:
        """Token positions at which a fraction `preferred_fraction` of the traces is placed; may be empty."""
        ...

    @property
    def preferred_fraction(self) -> float:
        """Fraction of the traces placed at preferred positions, if there are any."""
        ...

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the token ids of a response that reasons at `position` and boxes the true continuation."""
        ...

    def drills(self, rng: np.random.Generator) -> list[Drill]:
        """Return responses that are learned without the document."""
        ...


def check_traces(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Check that the traces of a run can be written, if it learns any. Raises: UserError."""
    check = TRACE_WRITERS[config.traces].requirements.check
    if check and config.trace_weight:
        check(config, tokenizer)


@TRACE_WRITERS.register("recall")
class RecallTraces:
    """Traces that repeat the end of the context, then predict the next token."""

    preferred_fraction = 0.0

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], config: PretrainConfig, max_tokens: int):
        """
        Args:
          tokenizer: encodes the traces.
          ids: token ids of the document.
          config: `recalled_tokens` is the number of context tokens that a trace repeats.
          max_tokens: maximum number of tokens of a trace.
        """
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._num_positions = config.traces_per_window
        self._recalled_tokens = config.recalled_tokens
        self._max_tokens = max_tokens

    @property
    def num_positions(self) -> int:
        """Number of positions of the document at which a trace is written: `pretrain.traces_per_window`."""
        return self._num_positions

    @property
    def preferred_positions(self) -> list[int]:
        """Token positions at which a fraction `preferred_fraction` of the traces is placed: none."""
        return []

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the token ids of a response that repeats the context before `position` and boxes the true token."""
        del rng
        reasoning = self._ids[max(0, position - self._recalled_tokens) : position]
        return self.format_response(reasoning, [self._ids[position]])

    def drills(self, rng: np.random.Generator) -> list[Drill]:
        """Return responses that are learned without the document: none."""
        del rng
        return []

    def format_response(self, reasoning: list[int], prediction: list[int]) -> list[int]:
        """Return the token ids of a complete response: reasoning, end of thinking, the boxed prediction, end of sequence."""
        tokenizer = self._tokenizer
        return [
            *reasoning,
            *tokenizer.end_think_ids,
            *tokenizer.encode(BOX),
            *prediction,
            *tokenizer.encode("}"),
            tokenizer.eos_id,
        ]
