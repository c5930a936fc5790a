"""Generated vocabularies and responses that test the reward kernel against the reference implementation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.rewards.boxed import predicted_first_token
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers import reward_reference
from tests.helpers.reward_cases import (
    BOX,
    MARK,
    OTHER_SPECIAL,
    PAD,
    STOP,
    THINK_END,
    VOCAB,
    Case,
    store,
    vocab_arrays,
)
from tests.helpers.tokenizers import TEXTS, byte_level_bpe, write_hf

VOCABULARIES = ["hostile", "sentencepiece", "byte-level BPE"]
UNKNOWN = len(VOCAB)  # A placeholder for an id outside of the vocabulary, as PAD and the others are for special tokens.


class Vocabulary(NamedTuple):
    """A vocabulary: the bytes of every token, the ids of each byte string, and the ids of the special placeholders."""

    pieces: list[bytes]
    ids: dict[bytes, list[int]]
    special: dict[int, int]

    @property
    def longest(self) -> int:
        return max(map(len, self.pieces))

    @property
    def end(self) -> int:
        return self.special[THINK_END]

    @property
    def poison(self) -> list[int]:
        """Ids that would change the result if they were read."""
        visible = [self.ids[piece][0] for piece in (b"}", b"{", b"\\", BOX, MARK) if piece in self.ids]
        return [*self.special.values(), *visible, -1, 2**31 - 1, -(2**31)]

    def encode(self, parts: list[bytes | int], rng: np.random.Generator) -> list[int]:
        """Split bytes at random into tokens; of several tokens with the same bytes, take any."""
        tokens: list[int] = []
        for part in parts:
            if isinstance(part, int):
                tokens.append(self.special.get(part, part))
                continue
            draws, i = rng.integers(1, self.longest + 1, (len(part), 2)).tolist(), 0
            while i < len(part):
                size, choice = draws[i]
                while (ids := self.ids.get(part[i : i + size])) is None:
                    size -= 1
                tokens.append(ids[choice % len(ids)])
                i += len(part[i : i + size])
        return tokens


def vocabulary(pieces: list[bytes], special: dict[int, int]) -> Vocabulary:
    ids: dict[bytes, list[int]] = {}
    for token, piece in enumerate(pieces):
        if piece:
            ids.setdefault(piece, []).append(token)
    return Vocabulary(pieces, ids, special)


def from_tokenizer(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary with an end-of-thinking token, a stop token and two other special tokens."""
    others = sorted(tokenizer.special_ids - {tokenizer.end_think_id, tokenizer.eos_id})
    special = {PAD: others[0], STOP: tokenizer.eos_id, THINK_END: tokenizer.end_think_id, OTHER_SPECIAL: others[-1]}
    return vocabulary(list(tokenizer.pieces), special | {UNKNOWN: tokenizer.vocab_size})


@functools.cache
def boxed_texts() -> list[str]:
    """Return texts from which a tokenizer learns tokens that contain parts of markers and boxes."""
    return [*TEXTS, *(f"so</think>\n\\boxed{{ {word}}} \\frac{{1}}{{2}} 漢字 é" for word in ("size", "and", "4") * 20)]


def make_vocabulary(kind: str, directory: Path) -> Vocabulary:
    """Return one of `VOCABULARIES`; `directory` is where its tokenizer is written."""
    if kind == "hostile":
        return vocabulary(VOCAB, {i: i for i in (PAD, STOP, THINK_END, OTHER_SPECIAL, UNKNOWN)})
    if kind == "sentencepiece":
        train_sentencepiece(boxed_texts(), 360, directory / "tokenizer.model")
    else:
        write_hf(directory, byte_level_bpe(boxed_texts()))
    return from_tokenizer(load_tokenizer(directory))


# A multiple of the block size in which the kernel searches for a marker (test_prefix_match.py has odd lengths).
TOKENS, GROUP, STORED = 48, 8, 13
CONTINUATION_TOKENS = [
    *(b" size", b" and", b" ", b"4", b" =", b"}", b"{", b"}}", b"{}", b"\\", b"\\}", b"\\{", b"\\\\", b"\\frac"),
    *(b"a", b"$", b"\xe6\xbc", b"\xa2", b"\x00", b"\n", b"<", b"\\boxed", b"</think", b"!"),
]
NOISE = [
    *(b"a", b" the", b"{", b"}", b"{", b"}", b"}}", b"\\", b"\\\\", b"\\}", b"\\{", b"\\\\}", b"{\\}", b"\\boxed"),
    *(BOX, b"\\boxed{x}", b"\\boxed{}", b"\\boxed{}}", b"\\\\boxed{", b"</think", b"</", b"<", b">", MARK, b"\n"),
    *("漢".encode(), b"\xe6", b"\xbc\xa2", PAD, STOP, THINK_END, OTHER_SPECIAL, -1, UNKNOWN),
]


def random_response(rng: np.random.Generator, continuation: list[bytes]) -> list[bytes | int]:
    """Draw a response of noise, usually a marker, usually a box with something like the continuation, and noise."""
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
    if next(draw) % 6 == 0:  # Drop, change or double one byte, or replace it by a special token.
        i = next(draw) % len(parts)
        if isinstance(parts[i], bytes) and parts[i]:
            at, whole = next(draw) % len(parts[i]), parts[i]
            middle = [b"", b"}", whole[at : at + 1] * 2, OTHER_SPECIAL, THINK_END][next(draw) % 5]
            parts[i : i + 1] = [whole[:at], middle, whole[at + 1 :]]
    return parts


def merged(parts: list[bytes | int]) -> list[bytes | int]:
    """Join neighboring bytes, so that a token may extend over several parts."""
    result: list[bytes | int] = [b""]
    for part in parts:
        if isinstance(part, bytes) and isinstance(result[-1], bytes):
            result[-1] += part
        else:
            result.append(part)
    return result


def fuzz(vocab: Vocabulary, rng: np.random.Generator, prompts: int) -> Case:
    """Draw `prompts` continuations with `GROUP` responses each. Padding would change the result if it were read."""
    tokens = rng.choice(np.array(vocab.poison), (prompts, GROUP, TOKENS))
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
            ids = vocab.encode([*merged(random_response(rng, continuation)), STOP], rng)
            ids = [*ids[: TOKENS - 1], ids[-1]]
            tokens[p, g, : len(ids)] = ids
            lengths[p, g] = len(ids)
    stopped = rng.random((prompts, GROUP)) < 0.95
    cut = rng.random((prompts, GROUP)) < 0.05  # Truncated, but possibly marked as finished.
    lengths = np.where(cut, rng.integers(0, lengths + 1), lengths)
    return Case(tokens, lengths, stopped, np.stack(references), np.stack(boundaries), continuations)


def scores(
    vocab: Vocabulary, case: Case, marked: bool = True, reading: str = "balanced"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reward, status and first tokens of the kernels, which know the special marker if `marked`."""
    end = vocab.end if marked else -1
    tokens, lengths, stopped, reference, boundaries = (jnp.asarray(x) for x in case[:5])
    table = tuple(jnp.asarray(x) for x in vocab_arrays(vocab.pieces))
    reward, status = prefix_match_reward(tokens, lengths, stopped, reference, boundaries, *table, end, reading=reading)
    first = predicted_first_token(tokens, lengths, stopped, *table, end, reading=reading)
    return np.asarray(reward), np.asarray(status), np.asarray(first)


def count_agreeing(vocab: Vocabulary, seed: int, prompts: int, reading: str = "balanced") -> np.ndarray:
    """Assert that kernels and reference agree on generated responses; return the number of each status."""
    case = fuzz(vocab, np.random.default_rng(seed), prompts)
    marked = bool(seed % 4)
    reward, status, first = scores(vocab, case, marked, reading)
    end = vocab.end if marked else -1
    for p, g in np.ndindex(status.shape):
        rollout = case.tokens[p, g].tolist(), case.lengths[p, g], case.stopped[p, g]
        expected = reward_reference.reward(*rollout, case.continuations[p], vocab.pieces, end, reading)[1]
        token = reward_reference.first_token(*rollout, vocab.pieces, end, reading)
        if (status[p, g], first[p, g]) != (expected, token):
            known = [vocab.pieces[t] if 0 <= t < len(vocab.pieces) else b"?" for t in rollout[0][: rollout[1]]]
            pytest.fail(
                f"seed {seed}, response {p},{g}: {Status(status[p, g])!r} is not {expected!r}, or {first[p, g]} not {token}\n"
                f"tokens {rollout[0]}, length {rollout[1]}\n{b'|'.join(known)}\n{case.continuations[p]}"
            )
    np.testing.assert_array_equal(reward, status == Status.CORRECT)
    assert 0.1 < (first >= 0).mean() < 0.9, "the generated responses hardly cover some outcome"
    return np.bincount(status.ravel(), minlength=len(Status))
