"""The share of a segment that a prediction begins with, against a reading of its bytes in plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.rewards.segment_match import segment_match
from tests.helpers import reward_reference
from tests.helpers.reward_cases import BOX, MARK, STOP, THINK_END, VOCAB_BYTES, VOCAB_LENGTHS, encode, make_case

TARGET = [b" size", b" and", b" de", b"creases"]
PIECES = [b" size", b" and", b" de", b"a", b"}", b"{", b"\\}", b"{}", b"\xe6\xbc", b"\xa2", b"\x00", b"\\boxed{", b" "]


def shares(responses: list[bytes], target: list[bytes], reading: str = "balanced", stopped: bool = True) -> list[float]:
    """Return the share of the target in each response, by the kernel."""
    case = make_case([[encode([response, STOP]) for response in responses]], [target], size=32, width=96)
    arguments = (
        case.tokens,
        case.lengths,
        np.full_like(case.stopped, stopped),
        case.reference,
        case.boundaries,
        VOCAB_BYTES,
        VOCAB_LENGTHS,
        THINK_END,
    )
    share, status = segment_match(*arguments, reading=reading)
    np.testing.assert_array_equal(status, prefix_match_reward(*arguments, reading=reading)[1])
    return np.asarray(share)[0].tolist()


def expected_share(response: bytes, target: list[bytes], reading: str) -> float:
    """Return the share of the tokens that end within the common prefix of prediction and target."""
    prediction = reward_reference.read_prediction(response, reading=reading) or b""
    whole = [end for end in itertools.accumulate(target) if prediction.startswith(end)]
    return len(whole) / len(target)


@pytest.mark.parametrize(
    ("content", "share"),
    [
        (b" size", 0.25), (b" size and", 0.5), (b" size and decreases", 1.0), (b" size an", 0.25), (b"size", 0.0),
        (b" size or decreases", 0.25), (b" size and decreases fast", 1.0), (b"", 0.0), (b" siz", 0.0),
    ],
)  # fmt: skip
def test_whole_tokens_up_to_the_first_difference_count(content: bytes, share: float) -> None:
    response = MARK + BOX + content + b"}"
    assert shares([response], TARGET) == [pytest.approx(share)]
    assert shares([response], TARGET, stopped=False) == [0.0]


def test_without_a_box_nothing_counts() -> None:
    assert shares([MARK + b" size", BOX + b" size}", MARK + BOX + b" size"], TARGET) == [0.0] * 3


@settings(max_examples=60, deadline=None)
@given(
    target=st.lists(st.sampled_from(PIECES[:11]), min_size=1, max_size=4),
    kept=st.integers(0, 4),
    rest=st.lists(st.sampled_from(PIECES), max_size=4).map(b"".join),
    end=st.sampled_from([b"}", b"", b"} and }", b"}}", b"}\n"]),
    reading=st.sampled_from(["balanced", "to_end"]),
)
def test_the_kernel_equals_the_reading_in_plain_python(
    target: list[bytes], kept: int, rest: bytes, end: bytes, reading: str
) -> None:
    response = b"so" + MARK + b"it is " + BOX + b"".join(target[:kept]) + rest + end
    assert shares([response], target, reading) == [pytest.approx(expected_share(response, target, reading))]
