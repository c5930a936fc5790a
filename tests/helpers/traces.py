"""Arithmetic trace writers, and traces taken apart."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_jax.config import PretrainConfig
from rpt_jax.prompts.arithmetic_traces import ArithmeticOptions, ArithmeticTraces
from rpt_jax.prompts.response_format import BOX
from rpt_jax.tokenizers.tokenizer import Tokenizer


def arithmetic_traces(
    tokenizer: Tokenizer, ids: Sequence[int], calculation_fraction: float, max_tokens: int = 500
) -> ArithmeticTraces:
    """Return the trace writer of a document, with one drill."""
    options = ArithmeticOptions(calculation_fraction=calculation_fraction, drills_per_window=1)
    return ArithmeticTraces(tokenizer, ids, PretrainConfig(traces="arithmetic", trace_options=options), max_tokens)


def split_trace(tokenizer: Tokenizer, trace: list[int]) -> tuple[list[int], list[int]]:
    """Return the reasoning and the prediction of a trace, which must be well formed."""
    [box] = tokenizer.encode(BOX)
    [close] = tokenizer.encode("}")
    assert trace.count(tokenizer.end_think_id) == trace.count(box) == trace.count(tokenizer.eos_id) == 1
    end = trace.index(tokenizer.end_think_id)
    assert trace[end + 1] == box
    assert trace[-2:] == [close, tokenizer.eos_id]
    return trace[:end], trace[end + 2 : -2]
