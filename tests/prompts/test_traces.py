"""Cold-start traces that recall the context, and the reward that they earn."""

from __future__ import annotations

import numpy as np

from rpt_jax.config import PretrainConfig, PromptConfig
from rpt_jax.prompts.builder import PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.prompts.traces import RecallTraces
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.tokenizers.tokenizer import Tokenizer
from tests.helpers.traces import arithmetic_traces, split_trace


def test_recall_repeats_the_end_of_the_context_and_predicts_one_token(
    tokenizer: Tokenizer, documents: list[list[int]]
) -> None:
    ids = documents[0]
    writer = RecallTraces(tokenizer, ids, PretrainConfig(recalled_tokens=4), max_tokens=64)
    for position in (0, 1, 20):
        reasoning, prediction = split_trace(tokenizer, writer.write(position, np.random.default_rng(0)))
        assert prediction == [ids[position]]
        assert reasoning == ids[max(0, position - 4) : position]


def test_recall_has_no_preferred_positions_and_no_drills(tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    writer = RecallTraces(tokenizer, documents[0], PretrainConfig(), max_tokens=64)
    assert writer.preferred_positions == []
    assert writer.drills(np.random.default_rng(0)) == []


def test_every_trace_earns_the_full_reward(tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    """Recalled and calculated traces at every position of some documents, read by the reward kernel."""
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=64), tokenizer)
    prompts, traces = [], []
    num_calculated = 0
    for window, ids in enumerate(documents[:4]):
        writers = [arithmetic_traces(tokenizer, ids, calculation_fraction) for calculation_fraction in (0.0, 1.0)]
        num_calculated += len(writers[0].preferred_positions)
        for position in range(len(ids)):
            prompts.append(builder.build(0, ids, Position(window, position, 1.0)))
            traces.append([writer.write(position, np.random.default_rng(0)) for writer in writers])
            for trace in traces[-1]:
                split_trace(tokenizer, trace)
    assert num_calculated > 10, "the documents have too few calculations to test anything"

    batch, vocab = stack(prompts), tokenizer.byte_vocab
    lengths = np.array([[len(trace) for trace in pair] for pair in traces], np.int32)
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for index in np.ndindex(lengths.shape):
        tokens[index][: lengths[index]] = traces[index[0]][index[1]]
    reward, status = prefix_match_reward(
        tokens, lengths, np.ones(lengths.shape, bool), batch.reference_PxR, batch.boundaries_PxRp1, *vocab,
        tokenizer.end_think_id,
    )  # fmt: skip
    failed = np.argwhere(reward != 1)
    assert not [(batch.window_P[p], batch.position_P[p], Status(status[p, g]).name) for p, g in failed]
