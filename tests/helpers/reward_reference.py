"""The prefix-matching reward once more, in plain Python on `bytes`: what the kernel is held against.

Written from the reading rule, with searches over the finished response instead of a parser that sees a byte at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from rpt_jax.rewards.prefix_match import Status

# A brace that counts: behind no backslash, or behind pairs of them.
_COUNTING_BRACE = re.compile(rb"(?<!\\)(?:\\\\)*([{}])")


def read_prediction(response: bytes, special_marker: int | None = None) -> bytes | None:
    """Return the bytes of the prediction, or None where there is none.

    Args:
        response: every byte of the response.
        special_marker: how many bytes of it precede the last end-of-thinking special token; None where it has none.
    """
    byte_marker = response.rfind(b"</think>")
    ends = [byte_marker + len(b"</think>")] if byte_marker >= 0 else []
    ends += [special_marker] if special_marker is not None else []
    if not ends:
        return None

    _, opening, content = response[max(ends) :].rpartition(b"\\boxed{")
    if not opening:
        return None
    if content.startswith(b"}"):
        return b"}" if content.startswith(b"}}") else b""

    braces = list(_COUNTING_BRACE.finditer(content))
    depths = itertools.accumulate((1 if brace[1] == b"{" else -1 for brace in braces), initial=1)
    for brace, depth in zip(braces, itertools.islice(depths, 1, None), strict=True):
        if depth == 0:
            return content[: brace.start(1)]
    prediction, closing, _ = content.rpartition(b"}")
    return prediction if closing else None


def judge(prediction: bytes | None, continuation: Sequence[bytes], stopped: bool) -> Status:
    """Return the status of `prediction`, given the true continuation as the bytes of its tokens."""
    if not stopped:
        return Status.NOT_FINISHED
    if prediction is None:
        return Status.NO_BOX
    if not prediction:
        return Status.EMPTY
    if prediction in itertools.accumulate(continuation):
        return Status.CORRECT
    return Status.INSIDE_TOKEN if b"".join(continuation).startswith(prediction) else Status.WRONG_BYTES


def _pieces(
    tokens: Sequence[int], length: int, vocab: Sequence[bytes], end_of_thinking_id: int
) -> tuple[list[bytes], int | None]:
    """Return the bytes of each token, and how many bytes precede the last end-of-thinking special token."""
    pieces = [vocab[token] if 0 <= token < len(vocab) else b"" for token in tokens[:length]]
    markers = [i for i, token in enumerate(tokens[:length]) if token == end_of_thinking_id >= 0]
    return pieces, sum(map(len, pieces[: markers[-1]])) if markers else None


def first_token(
    tokens: Sequence[int], length: int, stopped: bool, vocab: Sequence[bytes], end_of_thinking_id: int
) -> int:
    """Return the response's token that the prediction begins with, -1 where there is none or it ends outside the box."""
    pieces, special_marker = _pieces(tokens, length, vocab, end_of_thinking_id)
    response = b"".join(pieces)
    prediction = read_prediction(response, special_marker)
    if not stopped or not prediction:
        return -1
    begin = response.rfind(b"\\boxed{") + len(b"\\boxed{")
    ends = list(itertools.accumulate(map(len, pieces)))
    # The token after the one that the opening brace is the last byte of.
    after = [i + 1 for i, (end, piece) in enumerate(zip(ends, pieces, strict=True)) if piece and end == begin]
    if not after or after[0] == len(pieces) or not 0 < len(pieces[after[0]]) <= len(prediction):
        return -1
    return int(tokens[after[0]])


def reward(
    tokens: Sequence[int],
    length: int,
    stopped: bool,
    continuation: Sequence[bytes],
    vocab: Sequence[bytes],
    end_of_thinking_id: int,
) -> tuple[float, Status]:
    """Return the reward and the status of one rollout; `vocab` has the bytes of each token, `b""` for special ones."""
    pieces, special_marker = _pieces(tokens, length, vocab, end_of_thinking_id)
    status = judge(read_prediction(b"".join(pieces), special_marker), continuation, stopped)
    return float(status == Status.CORRECT), status
