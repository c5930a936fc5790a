"""Reference implementation of the prefix-matching reward in plain Python on `bytes`.

It follows the rule in `rewards.boxed` with searches over the finished response instead of a parser that reads byte by
byte.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from rpt_jax.rewards.prefix_match import Status

# A brace that is not escaped: preceded by an even number of backslashes.
_COUNTING_BRACE = re.compile(rb"(?<!\\)(?:\\\\)*([{}])")


def read_prediction(response: bytes, special_marker: int | None = None, reading: str = "balanced") -> bytes | None:
    """Return the bytes of the prediction, or None if there is none.

    Args:
        response: all bytes of the response.
        special_marker: number of bytes before the last end-of-thinking special token; None if there is none.
        reading: "balanced" or "to_end".
    """
    byte_marker = response.rfind(b"</think>")
    ends = [byte_marker + len(b"</think>")] if byte_marker >= 0 else []
    ends += [special_marker] if special_marker is not None else []
    if not ends:
        return None

    _, opening, content = response[max(ends) :].rpartition(b"\\boxed{")
    if not opening:
        return None
    if reading == "to_end":
        return content[:-1] if content.endswith(b"}") else None
    if content.startswith(b"}"):
        return b"}" if content.startswith(b"}}") else b""

    braces = list(_COUNTING_BRACE.finditer(content))
    depths = itertools.accumulate((1 if brace[1] == b"{" else -1 for brace in braces), initial=1)
    for brace, depth in zip(braces, itertools.islice(depths, 1, None), strict=True):
        if depth == 0:
            return content[: brace.start(1)]
    prediction, closing, _ = content.rpartition(b"}")
    return prediction if closing else None


def status_of(prediction: bytes | None, continuation: Sequence[bytes], stopped: bool) -> Status:
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
    tokens: Sequence[int], length: int, vocab: Sequence[bytes], end_think_id: int
) -> tuple[list[bytes], int | None]:
    """Return the bytes of each token, and the number of bytes before the last end-of-thinking special token."""
    pieces = [vocab[token] if 0 <= token < len(vocab) else b"" for token in tokens[:length]]
    markers = [i for i, token in enumerate(tokens[:length]) if token == end_think_id >= 0]
    return pieces, sum(map(len, pieces[: markers[-1]])) if markers else None


def first_token(
    tokens: Sequence[int],
    length: int,
    stopped: bool,
    vocab: Sequence[bytes],
    end_think_id: int,
    reading: str = "balanced",
) -> int:
    """Return the token that the prediction starts with, or -1 if there is none or it ends outside the box."""
    pieces, special_marker = _pieces(tokens, length, vocab, end_think_id)
    response = b"".join(pieces)
    prediction = read_prediction(response, special_marker, reading)
    if not stopped or not prediction:
        return -1
    begin = response.rfind(b"\\boxed{") + len(b"\\boxed{")
    starts = itertools.accumulate(map(len, pieces), initial=0)
    first = [i for i, (start, piece) in enumerate(zip(starts, pieces, strict=False)) if piece and start == begin]
    if not first or len(pieces[first[0]]) > len(prediction):
        return -1
    return int(tokens[first[0]])


def reward(
    tokens: Sequence[int],
    length: int,
    stopped: bool,
    continuation: Sequence[bytes],
    vocab: Sequence[bytes],
    end_think_id: int,
    reading: str = "balanced",
) -> tuple[float, Status]:
    """Return the reward and the status of one rollout; `vocab` has the bytes of each token, `b""` for special tokens."""
    pieces, special_marker = _pieces(tokens, length, vocab, end_think_id)
    status = status_of(read_prediction(b"".join(pieces), special_marker, reading), continuation, stopped)
    return float(status == Status.CORRECT), status
