"""The prediction in a response, read on the host by the rule of `rewards.boxed`: its bytes and its first token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from rpt_jax.prompts.response_format import BOX
from rpt_jax.rewards.responses import Response, last_box
from rpt_jax.tokenizers.tokenizer import END_THINK

_BOX = BOX.encode()
_END_THINK = END_THINK.encode()


class Prediction(NamedTuple):
    """What a response predicts.

    Attributes:
      content: bytes of the box; None if there is none.
      first_token: the token that the content starts with, the paper's y[0]; -1 if no token starts there and ends within.
    """

    content: bytes | None
    first_token: int

    def is_right(self, continuation: Sequence[bytes]) -> bool:
        """Return whether the content is one or more whole tokens of the true continuation (paper, Equation 3)."""
        return bool(self.content) and self.content in itertools.accumulate(continuation)


def read_prediction(
    token_ids: Sequence[int], pieces: Sequence[bytes], end_think_id: int, finished: bool, reading: str
) -> Prediction:
    """Return the prediction of a response.

    Args:
      token_ids: its ids, without padding.
      pieces: bytes of every token of the vocabulary.
      end_think_id: id of the end-of-thinking token, or -1.
      finished: whether it ended by itself; a response that the length limit cut predicts nothing.
      reading: "balanced" or "to_end", as `prompt.box_reading`.
    """
    response = Response.of_tokens(token_ids, pieces, end_think_id, finished)
    content, start = _read_box(response, reading)
    if not content:
        return Prediction(content, -1)

    # Find the token that begins with the content.
    sizes = [len(pieces[token]) if 0 <= token < len(pieces) else 0 for token in token_ids]
    for token, size, offset in zip(token_ids, sizes, itertools.accumulate(sizes, initial=0), strict=False):
        if size and offset == start:
            return Prediction(content, token if size <= len(content) else -1)
    return Prediction(content, -1)


def direct_prediction(token: int, pieces: Sequence[bytes], reading: str) -> Prediction:
    """Return what is read from a response that is only a token in a box, to compare a prediction without reasoning."""
    content, _ = _read_box(Response(_END_THINK + _BOX + pieces[token] + b"}"), reading)
    return Prediction(content, token)


def _read_box(response: Response, reading: str) -> tuple[bytes | None, int]:
    """Return the content of the last box of the answer, None if there is none, and the number of bytes in front of it."""
    answer = response.answer
    if answer is None or _BOX not in answer:
        return None, -1
    start = answer.rindex(_BOX) + len(_BOX)
    if reading == "balanced":
        content = last_box(answer)
    else:
        content = answer[start:-1] if answer.endswith(b"}") else None
    return content, len(response.text) - len(answer) + start
