"""Which tokens a box can hold, against the plain reading of a response."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.config.schema import BOX_READINGS
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.tokenizers.tokenizer import ByteVocab
from tests.helpers import reward_reference
from tests.helpers.reward_cases import BOX, IDS, MARK, VOCAB, VOCAB_BYTES, VOCAB_LENGTHS

# The vocabulary of the reward's tests, with tokens that end a box, restart it, or end the reasoning again.
EXTRA = [b"}{", b"})", b" }", b"}\n", b"a}", b"{}}", b"\\}}", b"{}{", b"\\\\{", b"x\\boxed{y", b"</think>", b"w" * 30]
PIECES = [*VOCAB, *EXTRA]
BYTE_VOCAB = ByteVocab(
    bytes_VxX=np.stack([np.frombuffer(piece.ljust(max(map(len, PIECES)), b"}"), np.uint8) for piece in PIECES]),
    lengths_V=np.array([len(piece) for piece in PIECES], np.int32),
)


def read(content: bytes, reading: str) -> bytes | None:
    return reward_reference.read_prediction(MARK + BOX + content + b"}", reading=reading)


@pytest.mark.parametrize("reading", BOX_READINGS)
def test_a_token_is_boxable_if_a_box_around_it_reads_as_the_token(reading: str) -> None:
    found = boxable_tokens(BYTE_VOCAB, PromptConfig(box_reading=reading, reference_bytes=24))
    expected = [0 < len(piece) <= 24 and read(piece, reading) == piece for piece in PIECES]
    assert found.tolist() == expected


def test_the_tokens_that_close_a_box_need_the_reading_to_the_end() -> None:
    by_reading = {reading: boxable_tokens(BYTE_VOCAB, PromptConfig(box_reading=reading)) for reading in BOX_READINGS}
    closing = [PIECES.index(piece) for piece in (b"}{", b"})", b" }", b"}\\", b"a}", b"}}")]
    assert not by_reading["balanced"][closing].any()
    assert by_reading["to_end"][closing].all()
    never = [PIECES.index(piece) for piece in (b"", b"\\boxed{", b"x\\boxed{y", b"</think>")]
    assert not by_reading["balanced"][never].any()
    assert not by_reading["to_end"][never].any()
    assert by_reading["balanced"][[PIECES.index(piece) for piece in (b"}", b"{", b"\\", b"\\}", b"{}{")]].all()


@pytest.mark.parametrize("reading", BOX_READINGS)
def test_no_longer_prediction_can_begin_with_a_token_that_no_box_can_hold(reading: str) -> None:
    """Whatever follows the token in the box and the box in the response, no prediction starts with the whole token."""
    rng = np.random.default_rng(0)
    boxable_V = boxable_tokens(BYTE_VOCAB, PromptConfig(box_reading=reading))
    refused = [piece for piece, boxable in zip(PIECES, boxable_V, strict=True) if piece and not boxable]
    assert refused
    for piece in refused:
        for _ in range(300):
            rest = b"".join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(0, 5)))
            prediction = read(piece + rest, reading)
            assert BOX in rest or MARK in rest or not (prediction or b"").startswith(piece)


def test_the_vocabulary_with_padding_of_braces_is_read_without_it() -> None:
    table = ByteVocab(bytes_VxX=VOCAB_BYTES, lengths_V=VOCAB_LENGTHS)
    found = boxable_tokens(table, PromptConfig(reference_bytes=4))
    assert found[IDS[b"a"]] and found[IDS[b"\\\\\\"]]
    assert not found[IDS[b" size"]], "the token is longer than the stored reference"
