"""The reward kernel against the paper's vectors, hand-written corners, and a plain Python reading of the same rule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.objective.reward import Status, predicted_first_token, prefix_match_reward
from tests import reward_reference

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
POISON = (PAD, STOP, THINK_END, ord("}"), IDS[BOX], IDS[MARK], -1, len(VOCAB), 2**31 - 1, -(2**31))


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
    """Score one response in several tokenisations; they, the reward and the plain reading must agree."""
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


# --- Fuzzing ---------------------------------------------------------------------------------------------------------

TOKENS, GROUP, STORED = 47, 8, 13
CONTINUATION_TOKENS = [
    *(b" size", b" and", b" ", b"4", b" =", b"}", b"{", b"}}", b"{}", b"\\", b"\\}", b"\\{", b"\\\\", b"\\frac"),
    *(b"a", b"$", b"\xe6\xbc", b"\xa2", b"\x00", b"\n", b"<", b"\\boxed", b"</think", b"!"),
]
NOISE = [
    *(b"a", b" the", b"{", b"}", b"{", b"}", b"}}", b"\\", b"\\\\", b"\\}", b"\\{", b"\\\\}", b"{\\}", b"\\boxed"),
    *(BOX, b"\\boxed{x}", b"\\boxed{}", b"\\boxed{}}", b"\\\\boxed{", b"</think", b"</", b"<", b">", MARK, b"\n"),
    *("漢".encode(), b"\xe6", b"\xbc\xa2", PAD, STOP, THINK_END, OTHER_SPECIAL, -1, len(VOCAB)),
]


def nasty_response(rng: np.random.Generator, continuation: list[bytes]) -> list[bytes | int]:
    """Compose parts: noise, mostly a marker, mostly a box with something like the continuation in it, noise."""
    draw = iter(rng.integers(0, 1 << 30, 40).tolist())

    def noise(limit: int) -> list[bytes | int]:
        return [NOISE[next(draw) % len(NOISE)] for _ in range(next(draw) % (limit + 1))]

    parts = [*noise(4), [MARK, THINK_END, MARK, THINK_END, b""][next(draw) % 5]]
    if next(draw) % 8 == 0:
        return [*parts, *noise(6)]
    joined, whole = b"".join(continuation), b"".join(continuation[: next(draw) % (len(continuation) + 1)])
    content = [[whole, whole, joined[: next(draw) % (len(joined) + 1)]][next(draw) % 3]]
    if next(draw) % 4 == 0:
        content.insert(next(draw) % 2, NOISE[next(draw) % len(NOISE)])
    parts += noise(1) if next(draw) % 3 == 0 else []
    parts += [BOX, *content, b"}"]
    parts += noise(3) if next(draw) % 2 else []
    if next(draw) % 6 == 0:  # Drop, change or double one byte, or put a special token in its place.
        i = next(draw) % len(parts)
        if isinstance(parts[i], bytes) and parts[i]:
            at, whole = next(draw) % len(parts[i]), parts[i]
            middle = [b"", b"}", whole[at : at + 1] * 2, OTHER_SPECIAL, THINK_END][next(draw) % 5]
            parts[i : i + 1] = [whole[:at], middle, whole[at + 1 :]]
    return parts


def merged(parts: list[bytes | int]) -> list[bytes | int]:
    """Join neighbouring bytes, so that a token may reach from one part into the next."""
    result: list[bytes | int] = [b""]
    for part in parts:
        if isinstance(part, bytes) and isinstance(result[-1], bytes):
            result[-1] += part
        else:
            result.append(part)
    return result


def fuzz(rng: np.random.Generator, prompts: int) -> Case:
    """Draw `prompts` continuations with `GROUP` responses each; padding and what follows the reference are poison."""
    tokens = rng.choice(np.array(POISON), (prompts, GROUP, TOKENS))
    lengths = np.zeros((prompts, GROUP), np.int64)
    references, boundaries, continuations = [], [], []
    for p in range(prompts):
        drawn = rng.integers(0, len(CONTINUATION_TOKENS), rng.integers(0, 6))
        continuation = [CONTINUATION_TOKENS[i] for i in drawn]
        reference, boundary, kept = store(continuation, STORED, rng.bytes(2) + b"}" * STORED)
        references.append(reference)
        boundaries.append(boundary)
        continuations.append(kept)
        for g in range(GROUP):
            ids = encode(merged(nasty_response(rng, continuation)), rng)[: TOKENS - 1] + [STOP]
            tokens[p, g, : len(ids)] = ids
            lengths[p, g] = len(ids)
    stopped = rng.random((prompts, GROUP)) < 0.95
    cut = rng.random((prompts, GROUP)) < 0.05  # Truncated, yet called finished or not.
    lengths = np.where(cut, rng.integers(0, lengths + 1), lengths)
    return Case(tokens, lengths, stopped, np.stack(references), np.stack(boundaries), continuations)


def assert_first_tokens(case: Case, end_of_thinking_id: int) -> None:
    """Hold the first tokens of predictions against the plain reading."""
    arrays = [jnp.asarray(x) for x in (*case[:3], VOCAB_BYTES, VOCAB_LENGTHS)]
    first = np.asarray(predicted_first_token(*arrays, end_of_thinking_id))
    for p, g in np.ndindex(first.shape):
        rollout = case.tokens[p, g].tolist(), case.lengths[p, g], case.stopped[p, g]
        assert first[p, g] == reward_reference.first_token(*rollout, VOCAB, end_of_thinking_id), (p, g)
    assert 0.1 < (first >= 0).mean() < 0.9, "the fuzzing hardly reaches some outcome"


def agree(seed: int, prompts: int) -> np.ndarray:
    """Hold the kernel against the plain reading; return how often each status came up."""
    case = fuzz(np.random.default_rng(seed), prompts)
    marker = THINK_END if seed % 4 else -1
    reward, status = score(case, marker)
    expected = reread(case, marker)
    for p, g in np.argwhere(status != expected)[:1]:
        text = b"|".join(VOCAB[t] if 0 <= t < len(VOCAB) else b"?" for t in case.tokens[p, g, : case.lengths[p, g]])
        pytest.fail(
            f"seed {seed}, response {p},{g}: {Status(status[p, g])!r} is not {Status(expected[p, g])!r}\n"
            f"tokens {case.tokens[p, g].tolist()}, length {case.lengths[p, g]}\n{text}\n{case.continuations[p]}"
        )
    np.testing.assert_array_equal(reward, status == Status.CORRECT)
    assert_first_tokens(case, marker)
    return np.bincount(status.ravel(), minlength=len(Status))


def test_kernel_equals_the_plain_reading() -> None:
    counts = agree(seed=0, prompts=1250) + agree(seed=1, prompts=1250)
    assert counts.sum() == 20_000
    assert counts.min() > 400, f"the fuzzing hardly reaches some outcome: {counts}"


@pytest.mark.slow
def test_kernel_equals_the_plain_reading_on_a_million() -> None:
    counts = sum(agree(seed, prompts=1250) for seed in range(100, 200))
    print(f"\n{counts.sum():,} responses agree:", {status.name: int(counts[status]) for status in Status})
    assert counts.sum() == 1_000_000


def test_order_of_rollouts_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    case = fuzz(rng, 50)
    reward, status = score(case)
    p, g = rng.permutation(50), rng.permutation(GROUP)
    shuffled = Case(*[x[p][:, g] for x in case[:3]], *[x[p] for x in case[3:5]], case.continuations)
    np.testing.assert_array_equal(score(shuffled)[1], status[p][:, g])
    np.testing.assert_array_equal(score(shuffled)[0], reward[p][:, g])
    alone = Case(*[x[7:8, 3:4] for x in case[:3]], *[x[7:8] for x in case[3:5]], case.continuations)
    np.testing.assert_array_equal(score(alone)[1], status[7:8, 3:4])


def test_padding_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    case = fuzz(rng, 50)
    wider = case._replace(
        tokens=np.concatenate([case.tokens, rng.choice(np.array(POISON), (50, GROUP, 6))], axis=-1),
        reference=np.concatenate([case.reference, rng.integers(0, 256, (50, 4), np.uint8)], axis=-1),
        boundaries=np.concatenate([case.boundaries, np.zeros((50, 4), bool)], axis=-1),
    )
    live = np.arange(TOKENS) < case.lengths[..., None]
    repadded = case._replace(tokens=np.where(live, case.tokens, rng.choice(np.array(POISON), case.tokens.shape)))
    for other in (wider, repadded):
        np.testing.assert_array_equal(score(other)[1], score(case)[1])


@pytest.mark.parametrize("prompts, group, size", [(1, 1, 1), (3, 5, 7)])
def test_odd_sizes(prompts: int, group: int, size: int) -> None:
    rng = np.random.default_rng(size)
    continuations = [[b"a", b" size", b"}"][: p + 1] for p in range(prompts)]
    ids = [[encode(merged(nasty_response(rng, c)), rng) for _ in range(group)] for c in continuations]
    case = make_case(ids, continuations, size, width=max(len(tokens) for group in ids for tokens in group))
    np.testing.assert_array_equal(score(case)[1], reread(case))


def test_memory_does_not_grow_with_the_longest_token() -> None:
    prompts, group, tokens, vocab, longest, stored = 4, 8, 1024, 500, 128, 64
    rollouts = [((prompts, group, tokens), jnp.int32), ((prompts, group), jnp.int32), ((prompts, group), jnp.bool_)]
    references = [((prompts, stored), jnp.uint8), ((prompts, stored + 1), jnp.bool_)]
    table = [((vocab, longest), jnp.uint8), ((vocab,), jnp.int32), ((), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in rollouts + references + table]
    compiled = prefix_match_reward.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < prompts * group * tokens * 32
