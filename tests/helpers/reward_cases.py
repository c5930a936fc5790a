"""Vocabulary and test cases for the prefix-matching reward, shared by hand-written and generated tests."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rpt_jax.rewards.prefix_match import prefix_match_reward
from tests.helpers import reward_reference

# A vocabulary with the structure of real ones: byte fallback first, then special tokens, then pieces. Among the pieces
# are whole markers and boxes, and pieces that contain parts of them.
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
    """Return `bytes_VxX`, padded with `}`, and `lengths_V`."""
    longest = max(map(len, vocab))
    table = np.array([list(token.ljust(longest, b"}")) for token in vocab], np.uint8)
    return table, np.array([len(token) for token in vocab], np.int32)


VOCAB_BYTES, VOCAB_LENGTHS = vocab_arrays(VOCAB)


class Case(NamedTuple):
    """Arguments of the kernel, and the continuations as tokens, which the reference implementation takes instead of bytes."""

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    reference: np.ndarray
    boundaries: np.ndarray
    continuations: list[list[bytes]]


def store(continuation: list[bytes], size: int, padding: bytes) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Return the reference bytes, the boundaries, and the tokens of the continuation that fit in `size` bytes."""
    ends = np.cumsum([len(token) for token in continuation], dtype=np.int64)
    kept = [token for token, end in zip(continuation, ends, strict=True) if end <= size]
    boundaries = np.zeros(size + 1, bool)
    boundaries[ends[: len(kept)]] = True
    return np.frombuffer((b"".join(continuation) + padding)[:size], np.uint8), boundaries, kept


def encode(parts: list[bytes | int], rng: np.random.Generator | None = None) -> list[int]:
    """Tokenize bytes and special ids: byte by byte, or split at random into pieces of the vocabulary."""
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


def score(case: Case, end_think_id: int = THINK_END, reading: str = "balanced") -> tuple[np.ndarray, np.ndarray]:
    """Return reward and status of the kernel."""
    arrays = [jnp.asarray(x) for x in (*case[:5], VOCAB_BYTES, VOCAB_LENGTHS)]
    reward, status = prefix_match_reward(*arrays, end_think_id, reading=reading)
    assert reward.dtype == jnp.float32 and status.dtype == jnp.int32 and reward.shape == case.lengths.shape
    return np.asarray(reward), np.asarray(status)


def reference_status(case: Case, end_think_id: int = THINK_END) -> np.ndarray:
    """Return the statuses of the reference implementation."""
    statuses = np.zeros(case.lengths.shape, int)
    for p, g in np.ndindex(statuses.shape):
        rollout = case.tokens[p, g].tolist(), case.lengths[p, g], case.stopped[p, g], case.continuations[p]
        statuses[p, g] = reward_reference.reward(*rollout, VOCAB, end_think_id)[1]
    return statuses


def make_case(ids: list[list[list[int]]], continuations: list[list[bytes]], size: int = 16, width: int = 64) -> Case:
    """Build finished responses from token ids [P][G]. The padding consists of boxes, which must not be read."""
    lengths = np.array([[len(tokens) for tokens in group] for group in ids])
    tokens = np.full((*lengths.shape, width), IDS[BOX])
    for p, g in np.ndindex(lengths.shape):
        tokens[p, g, : lengths[p, g]] = ids[p][g]
    references, boundaries, kept = zip(*[store(c, size, b"}" * size) for c in continuations], strict=True)
    return Case(tokens, lengths, np.ones_like(lengths, bool), np.stack(references), np.stack(boundaries), list(kept))
