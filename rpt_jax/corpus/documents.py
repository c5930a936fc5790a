"""Documents, rejected records, and the splits that documents are assigned to."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata

# The splits of a corpus. A source assigns documents of a kind that training never sees to "unseen"; most sources have none.
SPLITS = ("train", "held_out", "unseen")
# Largest fraction of the documents that is held out; `data.held_out_documents` may be less.
HELD_OUT_FRACTION = 0.2

# Special values in place of an index of SPLITS.
UNASSIGNED = -1  # `sources.assign_splits` chooses between "train" and "held_out" by hash.
DUPLICATE = -2  # A repetition of an earlier document, in no split.


@dataclasses.dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Attributes:
      text: what is tokenized, unchanged.
      name: unique in the corpus, and enough to find the text again: "gsm_symbolic:17:4", "notes.jsonl:7".
      group: the kind of document, such as the template that generated it; "" = none.
      key: string whose hash assigns the split; documents with the same key share a split. "" = `text`. Documents of "unseen" with
        the same key are of one kind, and not independent of each other.
      split: index of `SPLITS` if the source assigns it, else `UNASSIGNED`.
      mixture_part: index of the part of the mixture in `data.path` that it belongs to.
      file: name of the file that it was read from; "" = none.
      place: byte of its file where a piece of a longer text begins. Pieces with the same key can be held out from some place on,
        if all of them are too many to be held out. -1 = not a piece.
    """

    text: str
    name: str
    group: str = ""
    key: str = ""
    split: int = UNASSIGNED
    mixture_part: int = 0
    file: str = ""
    place: int = -1


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that is not a valid document.

    Attributes:
      file: name of the file.
      line: line, row or record in it, from 1.
      reason: short category that it is counted under.
      detail: full sentence with the path, the line and the problem.
      mixture_part: index of the part of the mixture in `data.path` that it belongs to.
    """

    file: str
    line: int
    reason: str
    detail: str
    mixture_part: int = 0


def hash64(seed: int, key: str) -> int:
    """Return a 64-bit hash of `seed` and `key` that is the same in every process (truncated SHA-256)."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:8], "big")


def normalized_text(text: str) -> str:
    """Return a text in the form in which problems are compared: without differences of case, spaces and Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
