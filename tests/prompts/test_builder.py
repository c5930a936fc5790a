"""Prompts: contexts, references and their arrays."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpt_jax.config import PromptConfig
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder, stack
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizers import any_text, byte_level_bpe, write_hf


def write_template(folder: Path, text: str) -> str:
    path = folder / "template.txt"
    path.write_bytes(text.encode())
    return str(path)


def prompt_tokens(prompt: PromptBatch) -> list[int]:
    """The tokens of a single prompt, without padding."""
    return prompt.tokens_PxS[: prompt.lengths_P].tolist()


def test_a_prompt_is_a_slice_of_its_document_inside_the_template(
    tokenizer: Tokenizer, documents: list[list[int]], tmp_path: Path
) -> None:
    """Byte for byte, including a byte order mark, line ends and white space."""
    before, after = "\ufeff Q:\r\n\r\n", "\n  A:\t \n"
    name = write_template(tmp_path, before + "{context}" + after)
    builder = PromptBuilder(PromptConfig(template=name, max_tokens=300, prefill_think_token=True), tokenizer)
    head = [tokenizer.bos_id, *tokenizer.encode(before)]
    tail = [*tokenizer.encode(after), tokenizer.think_id]
    for window, position in ((0, 0), (0, 1), (3, 17), (5, len(documents[5]) - 1)):
        prompt = builder.build(7, documents[window], Position(window, position, 1.25))
        context = documents[window][:position]
        tokens = prompt_tokens(prompt)
        assert tokens == [*head, *context, *tail]
        assert tokenizer.token_bytes(tokens) == (before + tokenizer.decode(context) + after).encode()
        assert prompt.tokens_PxS.shape == (300,)
        assert not prompt.tokens_PxS[prompt.lengths_P :].any()
        assert (prompt.ids_P, prompt.window_P, prompt.position_P, prompt.entropy_P) == (7, window, position, 1.25)


def test_a_long_context_loses_its_oldest_tokens(
    tokenizer: Tokenizer, documents: list[list[int]], tmp_path: Path
) -> None:
    name = write_template(tmp_path, "Text: {context} ...")
    builder = PromptBuilder(PromptConfig(template=name, max_tokens=30, prefill_think_token=False), tokenizer)
    head, tail = [tokenizer.bos_id, *tokenizer.encode("Text: ")], tokenizer.encode(" ...")
    room = 30 - len(head) - len(tail)
    for position in (room - 1, room, room + 1, len(documents[0]) - 1):
        prompt = builder.build(0, documents[0], Position(0, position, 1.0))
        context = documents[0][:position][-room:]
        assert prompt_tokens(prompt) == [*head, *context, *tail]
        assert prompt.lengths_P == min(30, len(head) + position + len(tail))


def test_cut_at_line_starts_a_long_context_at_the_first_line_of_its_older_half(tokenizer: Tokenizer) -> None:
    text = "one two three four\nfive six seven\neight nine ten eleven twelve"
    ids = tokenizer.encode(text)
    for max_tokens in range(5, len(ids)):
        config = PromptConfig(max_tokens=max_tokens, prefill_think_token=False, long_context="cut_at_line")
        prompt = PromptBuilder(config, tokenizer).build(0, ids, Position(0, len(ids) - 1, 1.0))
        room = max_tokens - 1
        kept = ids[: len(ids) - 1][-room:]
        line_starts = [i + 1 for i, token in enumerate(kept[: room // 2]) if tokenizer.pieces[token].endswith(b"\n")]
        is_cut = line_starts and room < len(ids) - 1
        assert prompt_tokens(prompt)[1:] == (kept[line_starts[0] :] if is_cut else kept)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_hf(tmp_path_factory.mktemp("bpe"), byte_level_bpe()))


@given(any_text, st.integers(0, 10**6), st.integers(2, 40), st.sampled_from(["tokenizer", "byte_level"]))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_context_and_reference_are_bytes_of_any_document(
    request: pytest.FixtureRequest, text: str, draw: int, size: int, kind: str
) -> None:
    """Emoji, CJK, combining marks, line ends, control characters, spelled special tokens; contexts cut or whole."""
    tokenizer = request.getfixturevalue(kind)
    ids = np.array(tokenizer.encode(text), np.uint32)
    if not len(ids):
        return
    position = draw % len(ids)
    before = tokenizer.token_bytes(ids[:position])
    assert text.encode().startswith(before)
    for max_tokens in (size, len(ids) + 1):
        config = PromptConfig(max_tokens=max_tokens, prefill_think_token=False, reference_bytes=16)
        prompt = PromptBuilder(config, tokenizer).build(0, ids, Position(0, position, 1.0))
        first = len(tokenizer.prefix_ids)  # BOS, or nothing.
        context = prompt.tokens_PxS[first : prompt.lengths_P]
        assert before.endswith(tokenizer.token_bytes(context))
        assert context.tolist() == ids[position - len(context) : position].tolist()
        assert len(context) == min(position, max_tokens - first)
        length = int(np.flatnonzero(prompt.boundaries_PxRp1).max(initial=0))
        assert text.encode()[len(before) :].startswith(prompt.reference_PxR[:length].tobytes())


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_the_reference_is_whole_tokens_and_their_boundaries(
    tokenizer: Tokenizer, documents: list[list[int]], limit: int
) -> None:
    builder = PromptBuilder(PromptConfig(max_tokens=40, reference_bytes=limit), tokenizer)
    most_tokens = 0
    for position in range(0, len(documents[1]), 3):
        prompt = builder.build(0, documents[1], Position(1, position, 1.0))
        pieces, ends = [tokenizer.pieces[i] for i in documents[1][position:]], []
        while pieces and sum(ends[-1:]) + len(pieces[0]) <= limit:
            ends.append(sum(ends[-1:]) + len(pieces.pop(0)))
        stored = sum(ends[-1:])
        truth = tokenizer.token_bytes(documents[1][position:])
        assert prompt.reference_PxR.shape == (limit,)
        assert prompt.boundaries_PxRp1.shape == (limit + 1,)
        assert prompt.reference_PxR[:stored].tobytes() == truth[:stored]
        assert not prompt.reference_PxR[stored:].any()
        assert np.flatnonzero(prompt.boundaries_PxRp1).tolist() == ends
        ids = documents[1][position : position + len(ends)]
        assert prompt.reference_ids_PxR.tolist() == [*ids, *[0] * (limit - len(ids))]
        most_tokens = max(most_tokens, len(ends))
    assert most_tokens >= min(limit, 10), "the references are too short to test anything"


def test_the_reference_ends_before_a_special_token(tokenizer: Tokenizer) -> None:
    """No prediction can spell a special token, and the text after it is unrelated."""
    one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    builder = PromptBuilder(PromptConfig(max_tokens=8, reference_bytes=8), tokenizer)
    prompt = builder.build(0, [one, two, tokenizer.eos_id, one], Position(0, 1, 1.0))
    assert prompt.reference_PxR.tobytes() == b"2" + bytes(7)
    assert np.flatnonzero(prompt.boundaries_PxRp1).tolist() == [1]
    assert np.flatnonzero(prompt.reference_ids_PxR).tolist() == [0]


def test_a_template_must_leave_room_for_one_context_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert PromptBuilder(PromptConfig(max_tokens=3), tokenizer)
    long = write_template(tmp_path, "word " * 30 + "{context}")
    for config in (PromptConfig(max_tokens=2), PromptConfig(template=long, max_tokens=20)):
        with pytest.raises(UserError) as raised:
            PromptBuilder(config, tokenizer)
        assert raised.value.field == "prompt.max_tokens"


def test_prefilling_the_think_token_needs_a_tokenizer_that_has_it(tokenizer: Tokenizer) -> None:
    without = dataclasses.replace(tokenizer, think_id=-1)
    with pytest.raises(UserError) as raised:
        PromptBuilder(PromptConfig(), without)
    assert raised.value.field == "prompt.prefill_think_token"
    assert PromptBuilder(PromptConfig(prefill_think_token=False), without)


def test_stacking_adds_the_prompt_axis_to_every_field(tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), tokenizer)
    singles = [builder.build(i, documents[i], Position(i, i + 1, 0.5 * i)) for i in range(3)]
    batch = stack(singles)
    for name, array in batch._asdict().items():
        np.testing.assert_array_equal(array, [getattr(single, name) for single in singles], err_msg=name)
    assert [array.dtype for array in batch] == [np.int32] * 3 + [np.uint8, bool] + [np.int32] * 3 + [np.float32]
