"""What a step of pre-training sees: documents, and the traces and drills beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rpt_jax.prompts.cold_start import BOX, TraceWriter

from rpt_jax.config import Experiment, PretrainConfig, PromptConfig
from rpt_jax.pretrain import ExampleMaker
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import END_THINK, load_tokenizer
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)
DOCUMENT = (
    "Tom had 93 - 38 = 55 marbles, gave 12 away and has 55 - 12 = 43 marbles left. It is a good number of marbles."
)


def example(prompt: PromptConfig = PromptConfig(), **changes: object) -> dict[str, np.ndarray]:  # noqa: B008
    config = PretrainConfig(traces_per_document=6, rows_per_document=4, row_tokens=64)
    experiment = Experiment(prompt=prompt, pretrain=dataclasses.replace(config, **changes))
    return ExampleMaker(experiment, TOKENIZER, [np.array(TOKENIZER.encode(DOCUMENT))]).make(0, np.random.default_rng(0))


def segments(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The traces one by one, padding left out."""
    found = []
    for row, column in zip(*np.nonzero(arrays["trace_segment"]), strict=True):
        number = arrays["trace_segment"][row, column]
        if not found or found[-1][0] != (row, number):
            found.append(((row, number), []))
        found[-1][1].append(column)
    names = [name for name in arrays if name.startswith("trace_")]
    return [{name: arrays[name][row, columns] for name in names} for (row, _), columns in found]


def test_traces_continue_their_prefix_of_the_document() -> None:
    arrays = example()
    traces = segments(arrays)
    assert len(traces) == 6
    for trace in traces:
        place = trace["trace_prefix"][0]
        assert (trace["trace_prefix"] == place).all() and trace["trace_mask"].all()
        np.testing.assert_array_equal(trace["trace_position"], place + np.arange(len(trace["trace_position"])))
        assert trace["trace_inputs"][0] == TOKENIZER.think_id
        np.testing.assert_array_equal(trace["trace_inputs"][1:], trace["trace_targets"][:-1])
        prediction = trace["trace_targets"][-3:-2]  # Before the closing brace and the end.
        if b"=" not in TOKENIZER.token_bytes(trace["trace_targets"].tolist()):
            np.testing.assert_array_equal(prediction, arrays["inputs"][place : place + 1])


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        (PromptConfig(), True),
        (PromptConfig(template="v0", prefill_think_token=False), False),
        (PromptConfig(template="v0", max_tokens=512), True),
        (PromptConfig(prefill_think_token=False), False),
    ],
    ids=["plain", "v0, spelled", "v0, opened", "nothing after the context"],
)
def test_a_trace_follows_the_prompt_that_asks_for_its_place(prompt: PromptConfig, known: bool) -> None:
    """Token for token, in a template and for a tokenizer without <think>; what is learned is the response, all of it."""
    tokenizer = TOKENIZER if known else dataclasses.replace(TOKENIZER, think_id=-1, end_think_id=-1)
    experiment = Experiment(prompt=dataclasses.replace(prompt, max_tokens=512), pretrain=PretrainConfig())
    documents = [np.array(tokenizer.encode(DOCUMENT))]
    arrays = ExampleMaker(experiment, tokenizer, documents).make(0, np.random.default_rng(0))
    builder, ids = PromptBuilder(experiment.prompt, tokenizer), tokenizer.encode(DOCUMENT)
    prompts = {}
    for position in range(len(ids)):
        built = builder.build(0, ids, Position(0, position, 1.0))
        prompts[tuple(built.tokens_PxS[: built.lengths_P].tolist())] = built
    for trace in segments(arrays):
        asked, learned = trace["trace_prefix"][0], trace["trace_mask"]
        before = [*arrays["inputs"][:asked], *trace["trace_inputs"][: len(learned) - learned.sum() + 1]]
        built = prompts[tuple(map(int, before))]
        np.testing.assert_array_equal(trace["trace_position"], asked + np.arange(len(learned)))
        response = trace["trace_targets"][learned]
        spelled = [END_THINK.encode() if t == tokenizer.end_think_id else tokenizer.token_bytes([t]) for t in response]
        _, ended, answer = b"".join(spelled).rpartition(END_THINK.encode())
        predicted = answer.removeprefix(BOX.encode()).removesuffix(b"}")
        assert ended and built.reference_PxR.tobytes().startswith(predicted) and built.boundaries_PxRp1[len(predicted)]
        assert response[-1] == tokenizer.eos_id
    first = len(builder.before) - 1
    np.testing.assert_array_equal(arrays["targets"][arrays["mask"]], [*ids, tokenizer.eos_id])
    assert not arrays["mask"][:first].any()


def test_drills_stand_alone_and_their_question_is_given() -> None:
    drills = [trace for trace in segments(example(drills_per_document=3)) if trace["trace_prefix"][0] == 0]
    assert len(drills) == 3
    for drill in drills:
        np.testing.assert_array_equal(drill["trace_position"], np.arange(len(drill["trace_position"])))
        given = TOKENIZER.token_bytes(drill["trace_targets"][~drill["trace_mask"]].tolist())
        learned = TOKENIZER.token_bytes(drill["trace_targets"][drill["trace_mask"]].tolist())
        assert given.endswith(b":") and b"-" in given and b"=" not in given
        assert b"=" in learned and b"boxed{" in learned


def test_what_cannot_be_boxed_is_not_shown() -> None:
    """The last opening of a box counts: a predicted one would hide the prediction, and teach what earns nothing."""
    ids = TOKENIZER.encode("a box \\boxed{5} here")
    writer = TraceWriter(TOKENIZER, ids, 0.0, 64)
    boxes = [i for i in range(len(ids)) if not writer.can_box(i)]
    assert [TOKENIZER.token_bytes([ids[i]]) for i in boxes] == [BOX.encode()]


def test_a_window_that_begins_inside_of_a_character_keeps_its_calculations() -> None:
    """Bytes that are no text by themselves take as many places in the text that is searched as they are."""
    ids = TOKENIZER.encode("\U0001f9ee" + DOCUMENT)
    whole = TraceWriter(TOKENIZER, ids, 1.0, 64)
    for cut in (1, 2, 3):
        assert len(TOKENIZER.token_bytes(ids[:cut])) == cut
        writer = TraceWriter(TOKENIZER, ids[cut:], 1.0, 64)
        assert writer.calculation_positions == [p - cut for p in whole.calculation_positions] != []
        for position in writer.calculation_positions:
            traces = [w.write(p, np.random.default_rng(0)) for w, p in ((writer, position), (whole, position + cut))]
            assert traces[0] == traces[1]
