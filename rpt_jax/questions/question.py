"""A question with its accepted answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

TRAIN, TEST = "train", "test"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question whose answer can be verified. Picklable, and free of JAX.

    Attributes:
      id: unique within its source and the same in every run.
      text: what is asked, without instructions on the format of the answer.
      answers: accepted answers, at least one; a letter for multiple choice. Empty if only the scorer of a reasoning-gym task can
        tell.
      choices: texts of the options A, B, …; empty for a free answer.
      category: subject or level that results are also reported by; "" for none.
      place: file and line, or source and number, for messages.
      data: what else the verifier needs, such as the entry of a reasoning-gym task.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    category: str = ""
    place: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class SourceQuestion(NamedTuple):
    """What a source yields: a question, and the part that the source assigns it to, `TRAIN` or `TEST`; "" for neither."""

    question: Question
    part: str = ""
