"""Pre-training examples: documents, traces that branch off from them, and drills."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rpt_jax.config import Experiment, PretrainConfig, PromptConfig
from rpt_jax.prompts.arithmetic_traces import ArithmeticOptions
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.prompts.pretraining_examples import ExampleMaker
from rpt_jax.prompts.response_format import BOX
from rpt_jax.tokenizers.tokenizer import END_THINK, load_tokenizer
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)
EVERY_TOKEN_V = np.ones(TOKENIZER.vocab_size, bool)
DOCUMENT = (
    "Tom had 93 - 38 = 55 marbles, gave 12 away and has 55 - 12 = 43 marbles left. It is a good number of marbles."
)


def make_example(**pretrain: object) -> dict[str, np.ndarray]:
    config = dataclasses.replace(
        PretrainConfig(traces="arithmetic", traces_per_window=6, rows_per_window=4, row_tokens=64), **pretrain
    )
    maker = ExampleMaker(Experiment(pretrain=config), TOKENIZER, [np.array(TOKENIZER.encode(DOCUMENT))], EVERY_TOKEN_V)
    return maker.make(0, np.random.default_rng(0))


def split_rows(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the packed traces one by one, without padding."""
    found: list[tuple[tuple[int, int], list[int]]] = []
    for row, column in zip(*np.nonzero(arrays["trace_segment"]), strict=True):
        key = (row, arrays["trace_segment"][row, column])
        if not found or found[-1][0] != key:
            found.append((key, []))
        found[-1][1].append(column)
    names = [name for name in arrays if name.startswith("trace_")]
    return [{name: arrays[name][row, columns] for name in names} for (row, _), columns in found]


def test_traces_continue_their_prefix_of_the_document() -> None:
    arrays = make_example()
    traces = split_rows(arrays)
    assert len(traces) == 6
    for trace in traces:
        prefix = trace["trace_prefix"][0]
        assert (trace["trace_prefix"] == prefix).all()
        assert trace["trace_mask"].all()
        np.testing.assert_array_equal(trace["trace_position"], prefix + np.arange(len(trace["trace_position"])))
        assert trace["trace_inputs"][0] == TOKENIZER.think_id
        np.testing.assert_array_equal(trace["trace_inputs"][1:], trace["trace_targets"][:-1])
        prediction = trace["trace_targets"][-3:-2]  # Before the closing brace and the end of the sequence.
        if b"=" not in TOKENIZER.token_bytes(trace["trace_targets"].tolist()):
            np.testing.assert_array_equal(prediction, arrays["inputs"][prefix : prefix + 1])


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        (PromptConfig(), True),
        (PromptConfig(template="v0", prefill_think_token=False), False),
        (PromptConfig(template="v0", max_tokens=512), True),
        (PromptConfig(prefill_think_token=False), False),
    ],
    ids=["plain", "v0, <think> as text", "v0, <think> as token", "no template after the context"],
)
def test_a_trace_follows_the_prompt_for_its_position(prompt: PromptConfig, known: bool) -> None:
    """Token for token, in a template and with a tokenizer without <think>; the loss covers exactly the response."""
    tokenizer = TOKENIZER if known else dataclasses.replace(TOKENIZER, think_id=-1, end_think_id=-1)
    experiment = Experiment(
        prompt=dataclasses.replace(prompt, max_tokens=512), pretrain=PretrainConfig(traces="arithmetic")
    )
    documents = [np.array(tokenizer.encode(DOCUMENT))]
    arrays = ExampleMaker(experiment, tokenizer, documents, EVERY_TOKEN_V).make(0, np.random.default_rng(0))
    builder, ids = PromptBuilder(experiment.prompt, tokenizer), tokenizer.encode(DOCUMENT)
    prompts = {}
    for position in range(len(ids)):
        built = builder.build(0, ids, Position(0, position, 1.0))
        prompts[tuple(built.tokens_PxS[: built.lengths_P].tolist())] = built
    for trace in split_rows(arrays):
        prefix, mask = trace["trace_prefix"][0], trace["trace_mask"]
        before = [*arrays["inputs"][:prefix], *trace["trace_inputs"][: len(mask) - mask.sum() + 1]]
        built = prompts[tuple(map(int, before))]
        np.testing.assert_array_equal(trace["trace_position"], prefix + np.arange(len(mask)))
        response = trace["trace_targets"][mask]
        spelled = [END_THINK.encode() if t == tokenizer.end_think_id else tokenizer.token_bytes([t]) for t in response]
        _, ended, answer = b"".join(spelled).rpartition(END_THINK.encode())
        predicted = answer.removeprefix(BOX.encode()).removesuffix(b"}")
        assert ended
        assert built.reference_PxR.tobytes().startswith(predicted)
        assert built.boundaries_PxRp1[len(predicted)]
        assert response[-1] == tokenizer.eos_id
    first = len(builder.before) - 1
    np.testing.assert_array_equal(arrays["targets"][arrays["mask"]], [*ids, tokenizer.eos_id])
    assert not arrays["mask"][:first].any()


@pytest.mark.parametrize("prefill", [True, False])
def test_a_document_without_bos_starts_with_its_own_first_token(prefill: bool) -> None:
    """Nothing precedes that token, so it is not predicted; traces follow their prompts as ever."""
    tokenizer = dataclasses.replace(TOKENIZER, prefix_ids=())
    experiment = Experiment(prompt=PromptConfig(prefill_think_token=prefill), pretrain=PretrainConfig())
    ids = tokenizer.encode(DOCUMENT)
    arrays = ExampleMaker(experiment, tokenizer, [np.array(ids)], EVERY_TOKEN_V).make(0, np.random.default_rng(0))
    np.testing.assert_array_equal(arrays["inputs"][: len(ids)], ids)
    np.testing.assert_array_equal(arrays["targets"][arrays["mask"]], [*ids[1:], tokenizer.eos_id])
    traces = split_rows(arrays)
    assert traces
    for trace in traces:
        first = trace["trace_inputs"][0]
        assert first == (tokenizer.think_id if prefill else ids[trace["trace_prefix"][0]])


def test_no_trace_predicts_a_token_that_no_box_can_hold() -> None:
    ids = np.array(TOKENIZER.encode(DOCUMENT))
    boxable_V = EVERY_TOKEN_V.copy()
    boxable_V[ids[len(ids) // 2 :]] = False
    experiment = Experiment(pretrain=PretrainConfig(traces_per_window=40, rows_per_window=40))
    arrays = ExampleMaker(experiment, TOKENIZER, [ids], boxable_V).make(0, np.random.default_rng(0))
    predicted = [trace["trace_targets"][-3] for trace in split_rows(arrays)]
    assert predicted and boxable_V[predicted].all()


def test_drills_do_without_the_document_and_their_question_is_not_learned() -> None:
    arrays = make_example(trace_options=ArithmeticOptions(drills_per_window=3))
    drills = [trace for trace in split_rows(arrays) if trace["trace_prefix"][0] == 0]
    assert len(drills) == 3
    for drill in drills:
        np.testing.assert_array_equal(drill["trace_position"], np.arange(len(drill["trace_position"])))
        given = TOKENIZER.token_bytes(drill["trace_targets"][~drill["trace_mask"]].tolist())
        learned = TOKENIZER.token_bytes(drill["trace_targets"][drill["trace_mask"]].tolist())
        assert given.endswith(b":")
        assert b"-" in given
        assert b"=" not in given
        assert b"=" in learned
        assert BOX.encode() in learned
