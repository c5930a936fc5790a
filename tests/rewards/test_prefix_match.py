"""The reward kernel against the paper's vectors, hand-written corners, and a plain Python reading of the same rule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from tests.helpers import reward_reference

# A vocabulary in the shape of real ones: byte fallback first, then special tokens, then pieces, among them whole
# markers and boxes and pieces that cut through them.
PAD, STOP, THINK_END, OTHER_SPECIAL = 256, 257, 258, 259
PIECES = [
    *rb"</think> </ think think> > </thi nk> <</think> }</think> \boxed{ \boxed \box ed{ d{ oxed boxed{".split(),
    *rb"{\boxed{ \\boxed{ { }} {{ {} }}} }{ \} \{ \\ \\\ \\} \\{ }\ {\ }. }< \frac{ 1}{ $\boxed{ }$ the and".split(),
    *("漢".encode(), "字".encode()[:2], "é!".encode(), b"\xa2}", b"{\xe6\xbc", b" s", b" size", b"\x00\x00"),
]
VOCAB = [bytes([i]) for i in range(256)] + [b""] * 4 + sorted(set(PIECES))
IDS = {piece: token for token, piece in enumerate(VOCAB) if piece}
LONGEST = max(map(len, VOCAB))

MARK, BOX = b"</think>", b"\\boxed{"


def vocab_arrays(vocab: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return `bytes_VxX`, with `}` where no byte belongs, and `lengths_V`."""
    longest = max(map(len, vocab))
    table = np.array([list(token.ljust(longest, b"}")) for token in vocab], np.uint8)
    return table, np.array([len(token) for token in vocab], np.int32)


VOCAB_BYTES, VOCAB_LENGTHS = vocab_arrays(VOCAB)


class Case(NamedTuple):
    """The arguments of the kernel, and what the plain reading takes instead of reference bytes and boundaries."""

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    reference: np.ndarray
    boundaries: np.ndarray
    continuations: list[list[bytes]]


def store(continuation: list[bytes], size: int, padding: bytes) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Return the reference, the boundaries and those tokens of the continuation that fit in `size` bytes."""
    ends = np.cumsum([len(token) for token in continuation], dtype=np.int64)
    kept = [token for token, end in zip(continuation, ends, strict=True) if end <= size]
    boundaries = np.zeros(size + 1, bool)
    boundaries[ends[: len(kept)]] = True
    return np.frombuffer((b"".join(continuation) + padding)[:size], np.uint8), boundaries, kept


def encode(parts: list[bytes | int], rng: np.random.Generator | None = None) -> list[int]:
    """Return token ids for bytes and special ids: byte by byte, or cut at random into pieces of the vocabulary."""
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
            continue
        cuts = rng.integers(1, LONGEST + 1, len(part)).tolist() if rng is not None else [1] * len(part)
        i = 0
        while i < len(part):
            size = cuts[i]
            while (token := IDS.get(part[i : i + size])) is None:
                size -= 1
            tokens.append(token)
            i += len(VOCAB[token])
    return tokens


def score(case: Case, end_of_thinking_id: int = THINK_END) -> tuple[np.ndarray, np.ndarray]:
    arrays = [jnp.asarray(x) for x in (*case[:5], VOCAB_BYTES, VOCAB_LENGTHS)]
    reward, status = prefix_match_reward(*arrays, end_of_thinking_id)
    assert reward.dtype == jnp.float32 and status.dtype == jnp.int32 and reward.shape == case.lengths.shape
    return np.asarray(reward), np.asarray(status)


def reread(case: Case, end_of_thinking_id: int = THINK_END) -> np.ndarray:
    """Return the statuses that the plain reading gives."""
    statuses = np.zeros(case.lengths.shape, int)
    for p, g in np.ndindex(statuses.shape):
        rollout = case.tokens[p, g].tolist(), case.lengths[p, g], case.stopped[p, g], case.continuations[p]
        statuses[p, g] = reward_reference.reward(*rollout, VOCAB, end_of_thinking_id)[1]
    return statuses


def make_case(ids: list[list[list[int]]], continuations: list[list[bytes]], size: int = 16, width: int = 64) -> Case:
    """Build finished responses from token ids [P][G]; whoever reads on into the padding finds boxes."""
    lengths = np.array([[len(tokens) for tokens in group] for group in ids])
    tokens = np.full((*lengths.shape, width), IDS[BOX])
    for p, g in np.ndindex(lengths.shape):
        tokens[p, g, : lengths[p, g]] = ids[p][g]
    references, boundaries, kept = zip(*[store(c, size, b"}" * size) for c in continuations], strict=True)
    return Case(tokens, lengths, np.ones_like(lengths, bool), np.stack(references), np.stack(boundaries), list(kept))


def judge_one(parts: list[bytes | int], continuation: list[bytes], stopped: bool = True) -> Status:
    """Score one response in several tokenizations; they, the reward and the plain reading must agree."""
    ids = [encode([*parts, STOP])] + [encode([*parts, STOP], np.random.default_rng(i)) for i in range(3)]
    case = make_case([ids], [continuation])
    case = case._replace(stopped=np.full_like(case.stopped, stopped))
    reward, status = score(case)
    np.testing.assert_array_equal(status, reread(case))
    np.testing.assert_array_equal(reward, status == Status.CORRECT)
    assert len(set(status[0].tolist())) == 1, "the reading depends on where the token borders are"
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
def test_vectors_of_the_paper(continuation: list[bytes], content: bytes, expected: Status) -> None:
    assert judge_one([b"so.</think>\n\\boxed{" + content + b"}"], continuation) == expected
    assert judge_one([b"so.", THINK_END, b"\n\\boxed{" + content + b"}"], continuation) == expected


@pytest.mark.parametrize(
    "response, prediction",
    [
        # Which box.
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
        # Which marker.
        (MARK + BOX + b"a}" + MARK + BOX + b"b}", b"b"),
        (MARK + BOX + b"a}" + MARK, None),
        (MARK + BOX + b"a" + MARK + b"b}", None),
        (b"<" + MARK + BOX + b"a}", b"a"),
        (b"</th" + MARK + BOX + b"a}", b"a"),
        (b"</thin" + BOX + b"a}", None),
        (b"</Think>" + BOX + b"a}", None),
        # Which brace.
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
        # What never balances.
        (MARK + BOX + b"{}", b"{"),
        (MARK + BOX + b"{{}", b"{{"),
        (MARK + BOX + b"{a} is it", b"{a"),
        (MARK + BOX + b"\\}", b"\\"),
        (MARK + BOX + b"a\\} b\\} c", b"a\\} b\\"),
        (MARK + BOX + b"a", None),
        (MARK + BOX, None),
        # The empty box.
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
def test_reading(response: bytes, prediction: bytes | None) -> None:
    assert reward_reference.read_prediction(response) == prediction
    right, wrong = [prediction or b"a"], [b"\xff" + (prediction or b"a")[1:]]
    expected = {None: (NO_BOX, NO_BOX), b"": (EMPTY, EMPTY)}.get(prediction, (RIGHT, WRONG))
    assert (judge_one([response], right), judge_one([response], wrong)) == expected
    assert judge_one([response], right, stopped=False) == CUT


def test_special_tokens_have_no_bytes_but_mark_the_end_of_thinking() -> None:
    a = [b"a"]
    assert judge_one([MARK + BOX, PAD, b"a", OTHER_SPECIAL, b"}"], a) == RIGHT
    assert judge_one([MARK + b"\\box", OTHER_SPECIAL, b"ed{a}"], a) == RIGHT
    assert judge_one([b"</thi", OTHER_SPECIAL, b"nk>" + BOX + b"a}"], a) == RIGHT
    assert judge_one([MARK + BOX + b"{\\", OTHER_SPECIAL, b"}a}}"], [b"{\\}a}"]) == RIGHT
    assert judge_one([MARK + BOX + b"}", PAD, b"}"], [b"}"]) == RIGHT
    assert judge_one([MARK + BOX + b"}", THINK_END, b"}"], [b"}"]) == NO_BOX
    assert judge_one([MARK + b"\\box", THINK_END, b"ed{a}"], a) == NO_BOX
    assert judge_one([MARK + BOX, THINK_END, b"a}"], a) == NO_BOX
    assert judge_one([THINK_END, BOX + b"a}" + MARK], a) == NO_BOX
    assert judge_one([BOX + b"a}", THINK_END, b" ", THINK_END], a) == NO_BOX
    # A byte marker that the special one interrupts.
    assert judge_one([b"</th", THINK_END, b"ink>" + BOX + b"a}"], a) == RIGHT
    assert judge_one([b"</th", THINK_END, BOX + b"a}ink>"], a) == RIGHT


def test_without_a_special_marker_its_id_means_nothing() -> None:
    responses = [[THINK_END, BOX + b"a}"], [-1, BOX + b"a}"], [MARK + BOX + b"a}"]]
    case = make_case([[encode(parts) for parts in responses]], [[b"a"]])
    assert score(case, end_of_thinking_id=-1)[1].tolist() == [[NO_BOX, NO_BOX, RIGHT]]
    assert score(case)[1].tolist() == [[RIGHT, NO_BOX, RIGHT]]


def test_nothing_beyond_the_stored_reference_is_right() -> None:
    contents = [b"abc", b"abcd", b"abcde", b"abcdefg", b"abcdefgh", b"abcdefghi"]
    ids = [[encode([MARK + BOX + content + b"}"]) for content in contents]]
    whole = make_case(ids, [[b"abc", b"de", b"fgh"]], size=8)
    assert score(whole)[1].tolist() == [[RIGHT, INSIDE, RIGHT, INSIDE, RIGHT, WRONG]]
    cut = make_case(ids, [[b"abc", b"de", b"fghi"]], size=8)  # `fgh` is stored, but its token does not end there.
    assert score(cut)[1].tolist() == [[RIGHT, INSIDE, RIGHT, WRONG, WRONG, WRONG]]
    nothing = make_case(ids, [[b"abcdefghi"]], size=8)
    assert score(nothing)[1].tolist() == [[WRONG] * 6]


def test_tokens_outside_the_table_have_no_bytes() -> None:
    unknown = [len(VOCAB), 2**31 - 1, -7, len(VOCAB) + ord("}")]
    finished = encode([MARK, unknown[0], BOX, unknown[1], b"a", unknown[2], b"}"])
    open_box = encode([MARK, BOX, b"a", *unknown])
    assert score(make_case([[finished, open_box]], [[b"a"]]))[1].tolist() == [[RIGHT, NO_BOX]]


@pytest.mark.parametrize("width", [1, 7])
def test_only_padding(width: int) -> None:
    case = make_case([[[], [], []]], [[b"a"]], width=width)
    case = case._replace(stopped=np.array([[True, False, True]]))
    assert score(case)[1].tolist() == [[NO_BOX, CUT, NO_BOX]]


def test_a_full_row_is_not_read_on() -> None:
    full = encode([MARK + BOX + b"}"])
    case = make_case([[full, [IDS[MARK]] * len(full)]], [[b"}"]], width=len(full))
    assert score(case)[1].tolist() == [[EMPTY, NO_BOX]]  # The second has more bytes; meanwhile `}` must not come twice.


def test_memory_does_not_grow_with_the_longest_token() -> None:
    prompts, group, tokens, vocab, longest, stored = 4, 8, 1024, 500, 128, 64
    rollouts = [((prompts, group, tokens), jnp.int32), ((prompts, group), jnp.int32), ((prompts, group), jnp.bool_)]
    references = [((prompts, stored), jnp.uint8), ((prompts, stored + 1), jnp.bool_)]
    table = [((vocab, longest), jnp.uint8), ((vocab,), jnp.int32), ((), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in rollouts + references + table]
    compiled = prefix_match_reward.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < prompts * group * tokens * 32
