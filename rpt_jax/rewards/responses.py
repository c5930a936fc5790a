r"""Read the answer in a response on the host, by the rule of `rewards.boxed`.

The verifiers of questions run on the host and read one finished response at a time; the kernel in `rewards.boxed` reads whole
batches on the device. A test compares the two.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from rpt_jax.questions.text import last_box
from rpt_jax.tokenizers.tokenizer import END_THINK

_END_THINK = END_THINK.encode()


def split_response(text: bytes) -> tuple[bytes, bytes | None]:
    """Return the reasoning of a response and what follows the last `</think>`; None if there is none."""
    reasoning, marker, answer = text.rpartition(_END_THINK)
    return (reasoning, answer) if marker else (text, None)


def status_name(status: enum.IntEnum) -> str:
    """Return the name of a status as it is shown, such as "wrong bytes"."""
    return status.name.lower().replace("_", " ")


class Response(NamedTuple):
    """A sampled response.

    Attributes:
      text: the bytes of its tokens; special tokens have none.
      marker: number of bytes before its last end-of-thinking special token; None if it has none.
      finished: whether it ended by itself, and was not cut by the length limit.
    """

    text: bytes
    marker: int | None = None
    finished: bool = True

    @classmethod
    def of_tokens(
        cls, token_ids: Sequence[int], pieces: Sequence[bytes], end_think_id: int, finished: bool
    ) -> Response:
        """Return the response that consists of `token_ids`.

        Args:
          token_ids: ids, without padding.
          pieces: bytes of every token of the vocabulary.
          end_think_id: id of the end-of-thinking token, or -1.
          finished: see `Response.finished`.
        """
        marker = None
        size = 0
        parts = []
        for token in token_ids:
            if token == end_think_id >= 0:
                marker = size
            part = pieces[token] if 0 <= token < len(pieces) else b""
            parts.append(part)
            size += len(part)
        return cls(text=b"".join(parts), marker=marker, finished=finished)

    @property
    def answer(self) -> bytes | None:
        """What follows the last end-of-thinking marker; None if the response never ends thinking or is not finished."""
        if not self.finished:
            return None
        start = -1 if self.marker is None else self.marker
        if (place := self.text.rfind(_END_THINK)) >= 0:
            start = max(start, place + len(_END_THINK))
        return self.text[start:] if start >= 0 else None

    @property
    def box(self) -> bytes | None:
        r"""The content of the last `\boxed{}` of the answer; None if there is none."""
        return None if self.answer is None else last_box(self.answer)
