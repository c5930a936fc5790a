"""The prefix-matching reward against the paper's examples, hand-written edge cases, and a reference implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.rewards.boxed import predicted_first_token
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from tests.helpers import reward_reference
from tests.helpers.reward_cases import (
    BOX,
    IDS,
    MARK,
    OTHER_SPECIAL,
    PAD,
    STOP,
    THINK_END,
    VOCAB,
    VOCAB_BYTES,
    VOCAB_LENGTHS,
    encode,
    make_case,
    reference_status,
    score,
)


def status_of(parts: list[bytes | int], continuation: list[bytes], stopped: bool = True) -> Status:
    """Return the status of one response, which must not depend on its tokenization and must equal the reference."""
    ids = [encode([*parts, STOP])] + [encode([*parts, STOP], np.random.default_rng(i)) for i in range(3)]
    case = make_case([ids], [continuation])
    case = case._replace(stopped=np.full_like(case.stopped, stopped))
    reward, status = score(case)
    np.testing.assert_array_equal(status, reference_status(case))
    np.testing.assert_array_equal(reward, status == Status.CORRECT)
    assert len(set(status[0].tolist())) == 1, "the status depends on the token boundaries"
    return Status(status[0, 0])


SIZE = [b" size", b" and", b" decreases"]
DIGIT = [b" ", b"4", b" ="]
HAN = [b"\xe6\xbc", b"\xa2"]  # One character in two tokens.
RIGHT, WRONG, INSIDE, EMPTY, NO_BOX, CUT = Status


@pytest.mark.parametrize(
    "continuation, content, expected",
    [
        (SIZE, b" size", RIGHT), (SIZE, b" size and", RIGHT), (SIZE, b"size", WRONG), (SIZE, b" siz", INSIDE),
        (SIZE, b" size an", INSIDE), (SIZE, b" size ", INSIDE), (SIZE, b"", EMPTY),
        (DIGIT, b" ", RIGHT), (DIGIT, b" 4", RIGHT), (DIGIT, b" 4 =", RIGHT), (DIGIT, b"4", WRONG),
        (HAN, "漢".encode(), RIGHT), (HAN, b"\xe6\xbc", RIGHT), (HAN, b"\xe6", INSIDE), (HAN, "\ufffd".encode(), WRONG),
        ([b"$"], b"$", RIGHT), ([b"$"], b"$$", WRONG),
        ([b"}", b" "], b"}", RIGHT), ([b"{"], b"{", RIGHT), ([b"}}"], b"}", INSIDE),
    ],
)  # fmt: skip
def test_examples_of_the_paper(continuation: list[bytes], content: bytes, expected: Status) -> None:
    assert status_of([b"so.</think>\n\\boxed{" + content + b"}"], continuation) == expected
    assert status_of([b"so.", THINK_END, b"\n\\boxed{" + content + b"}"], continuation) == expected


@pytest.mark.parametrize(
    "response, prediction",
    [
        # Which box is read.
        (MARK + BOX + b"a}" + BOX + b"b}", b"b"),
        (MARK + BOX + b"a} then " + BOX + b"b} and c}", b"b"),
        (MARK + BOX + b"x " + BOX + b"a} y}", b"a"),
        (MARK + BOX + b"a} " + BOX + b"b", None),
        (BOX + b"a}" + MARK + b"b", None),
        (BOX + b"a}", None),
        (BOX + MARK + b"a}", None),
        (MARK + b"boxed{a}", None),
        (MARK + b"\\boxe{a} \\Boxed{a} \\boxed {a}", None),
        (MARK + b"\\\\boxed{a}", b"a"),
        (MARK + b"\\bo\\boxed{a}", b"a"),
        # Which marker is used.
        (MARK + BOX + b"a}" + MARK + BOX + b"b}", b"b"),
        (MARK + BOX + b"a}" + MARK, None),
        (MARK + BOX + b"a" + MARK + b"b}", None),
        (b"<" + MARK + BOX + b"a}", b"a"),
        (b"</th" + MARK + BOX + b"a}", b"a"),
        (b"</thin" + BOX + b"a}", None),
        (b"</Think>" + BOX + b"a}", None),
        # Which brace ends the prediction.
        (MARK + BOX + b"\\frac{1}{2}} x}", b"\\frac{1}{2}"),
        (MARK + BOX + b"{a}} }", b"{a}"),
        (MARK + BOX + b"\\}} }", b"\\}"),
        (MARK + BOX + b"\\{} }", b"\\{"),
        (MARK + BOX + b"\\\\} }", b"\\\\"),
        (MARK + BOX + b"\\\\\\}} }", b"\\\\\\}"),
        (MARK + BOX + b"{\\}} }", b"{\\}} "),
        (MARK + BOX + b"{\\\\}} }", b"{\\\\}"),
        (MARK + BOX + b"a\\n}", b"a\\n"),
        (MARK + BOX + b" a }", b" a "),
        # Boxes without a balancing brace.
        (MARK + BOX + b"{}", b"{"),
        (MARK + BOX + b"{{}", b"{{"),
        (MARK + BOX + b"{a} is it", b"{a"),
        (MARK + BOX + b"\\}", b"\\"),
        (MARK + BOX + b"a\\} b\\} c", b"a\\} b\\"),
        (MARK + BOX + b"a", None),
        (MARK + BOX, None),
        # Empty boxes.
        (MARK + BOX + b"}", b""),
        (MARK + BOX + b"} }", b""),
        (MARK + BOX + b"}\\}", b""),
        (MARK + BOX + b"}}", b"}"),
        (MARK + BOX + b"}}}", b"}"),
        (MARK + BOX + b"}} " + BOX + b"}", b""),
        (MARK + BOX + b"}" + MARK + b"}", None),
        (b"", None),
    ],
)
def test_prediction_is_read_by_the_rule(response: bytes, prediction: bytes | None) -> None:
    assert reward_reference.read_prediction(response) == prediction
    right, wrong = [prediction or b"a"], [b"\xff" + (prediction or b"a")[1:]]
    expected = {None: (NO_BOX, NO_BOX), b"": (EMPTY, EMPTY)}.get(prediction, (RIGHT, WRONG))
    assert (status_of([response], right), status_of([response], wrong)) == expected
    assert status_of([response], right, stopped=False) == CUT


@pytest.mark.parametrize(
    "response, prediction",
    [
        (MARK + BOX + b"a}", b"a"),
        (MARK + BOX + b"}{}", b"}{"),
        (MARK + BOX + b"})}", b"})"),
        (MARK + BOX + b"}\\}", b"}\\"),
        (MARK + BOX + b" }}", b" }"),
        (MARK + BOX + b"}}", b"}"),
        (MARK + BOX + b"}}}", b"}}"),
        (MARK + BOX + b"\\}}", b"\\}"),
        (MARK + BOX + b"a} then " + BOX + b"b}", b"b"),
        (MARK + BOX + b"a} then }", b"a} then "),
        (MARK + BOX + b"}", b""),
        (MARK + BOX + b"a", None),
        (MARK + BOX + b"a}.", None),
        (MARK + BOX + b"a}\n", None),
        (MARK + BOX + b"a}" + MARK, None),
        (BOX + b"a}", None),
        (MARK + b"a}", None),
        (MARK + BOX, None),
    ],
)
def test_the_reading_to_the_end(response: bytes, prediction: bytes | None) -> None:
    assert reward_reference.read_prediction(response, reading="to_end") == prediction
    right, wrong = [prediction or b"a"], [b"\xff" + (prediction or b"a")[1:]]
    case = make_case([[encode([response, STOP])]] * 2, [right, wrong])
    expected = {None: (NO_BOX, NO_BOX), b"": (EMPTY, EMPTY)}.get(prediction, (RIGHT, WRONG))
    assert tuple(score(case, reading="to_end")[1][:, 0].tolist()) == expected


def test_special_tokens_have_no_bytes_and_one_ends_thinking() -> None:
    a = [b"a"]
    assert status_of([MARK + BOX, PAD, b"a", OTHER_SPECIAL, b"}"], a) == RIGHT
    assert status_of([MARK + b"\\box", OTHER_SPECIAL, b"ed{a}"], a) == RIGHT
    assert status_of([b"</thi", OTHER_SPECIAL, b"nk>" + BOX + b"a}"], a) == RIGHT
    assert status_of([MARK + BOX + b"{\\", OTHER_SPECIAL, b"}a}}"], [b"{\\}a}"]) == RIGHT
    assert status_of([MARK + BOX + b"}", PAD, b"}"], [b"}"]) == RIGHT
    assert status_of([MARK + BOX + b"}", THINK_END, b"}"], [b"}"]) == NO_BOX
    assert status_of([MARK + b"\\box", THINK_END, b"ed{a}"], a) == NO_BOX
    assert status_of([MARK + BOX, THINK_END, b"a}"], a) == NO_BOX
    assert status_of([THINK_END, BOX + b"a}" + MARK], a) == NO_BOX
    assert status_of([BOX + b"a}", THINK_END, b" ", THINK_END], a) == NO_BOX
    # A marker in bytes that is interrupted by the special token.
    assert status_of([b"</th", THINK_END, b"ink>" + BOX + b"a}"], a) == RIGHT
    assert status_of([b"</th", THINK_END, BOX + b"a}ink>"], a) == RIGHT


@pytest.mark.parametrize("content", [[PAD, b"a"], [b"a", PAD], [PAD, OTHER_SPECIAL, len(VOCAB), b"a"]])
def test_the_first_predicted_token_is_the_first_with_bytes(content: list[bytes | int]) -> None:
    """Equation 3 reads bytes alone, so a token without bytes in the box changes nothing."""
    case = make_case([[encode([MARK + BOX, *content, b"}"])]], [[b"a"]])
    tokens, lengths, stopped = (jnp.asarray(x) for x in case[:3])
    first = predicted_first_token(tokens, lengths, stopped, VOCAB_BYTES, VOCAB_LENGTHS, THINK_END)
    assert score(case)[1].tolist() == [[RIGHT]]
    assert np.asarray(first).tolist() == [[IDS[b"a"]]]


def test_end_think_id_of_minus_one_matches_no_token() -> None:
    responses = [[THINK_END, BOX + b"a}"], [-1, BOX + b"a}"], [MARK + BOX + b"a}"]]
    case = make_case([[encode(parts) for parts in responses]], [[b"a"]])
    assert score(case, end_think_id=-1)[1].tolist() == [[NO_BOX, NO_BOX, RIGHT]]
    assert score(case)[1].tolist() == [[RIGHT, NO_BOX, RIGHT]]


def test_predictions_beyond_the_stored_reference_are_wrong() -> None:
    contents = [b"abc", b"abcd", b"abcde", b"abcdefg", b"abcdefgh", b"abcdefghi"]
    ids = [[encode([MARK + BOX + content + b"}"]) for content in contents]]
    whole = make_case(ids, [[b"abc", b"de", b"fgh"]], size=8)
    assert score(whole)[1].tolist() == [[RIGHT, INSIDE, RIGHT, INSIDE, RIGHT, WRONG]]
    cut = make_case(ids, [[b"abc", b"de", b"fghi"]], size=8)  # `fgh` is stored, but its token ends later.
    assert score(cut)[1].tolist() == [[RIGHT, INSIDE, RIGHT, WRONG, WRONG, WRONG]]
    nothing = make_case(ids, [[b"abcdefghi"]], size=8)
    assert score(nothing)[1].tolist() == [[WRONG] * 6]


def test_tokens_outside_the_table_have_no_bytes() -> None:
    unknown = [len(VOCAB), 2**31 - 1, -7, len(VOCAB) + ord("}")]
    finished = encode([MARK, unknown[0], BOX, unknown[1], b"a", unknown[2], b"}"])
    open_box = encode([MARK, BOX, b"a", *unknown])
    assert score(make_case([[finished, open_box]], [[b"a"]]))[1].tolist() == [[RIGHT, NO_BOX]]


@pytest.mark.parametrize("width", [1, 7])
def test_empty_responses_have_no_box(width: int) -> None:
    case = make_case([[[], [], []]], [[b"a"]], width=width)
    case = case._replace(stopped=np.array([[True, False, True]]))
    assert score(case)[1].tolist() == [[NO_BOX, CUT, NO_BOX]]


def test_responses_of_maximum_length_are_not_read_past_their_end() -> None:
    full = encode([MARK + BOX + b"}"])
    case = make_case([[full, [IDS[MARK]] * len(full)]], [[b"}"]], width=len(full))
    assert score(case)[1].tolist() == [
        [EMPTY, NO_BOX]
    ]  # The second has more bytes; until it ends, `}` must not be read twice.


def test_memory_does_not_grow_with_the_longest_token() -> None:
    prompts, group, tokens, vocab, longest, stored = 4, 8, 1024, 500, 128, 64
    rollouts = [((prompts, group, tokens), jnp.int32), ((prompts, group), jnp.int32), ((prompts, group), jnp.bool_)]
    references = [((prompts, stored), jnp.uint8), ((prompts, stored + 1), jnp.bool_)]
    table = [((vocab, longest), jnp.uint8), ((vocab,), jnp.int32), ((), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in rollouts + references + table]
    compiled = prefix_match_reward.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < prompts * group * tokens * 32
