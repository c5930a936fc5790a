"""Documents, rejected records, and the splits that documents are assigned to."""

from __future__ import annotations

import dataclasses
import hashlib

# Documents of "unseen" are of a kind that training never sees; a corpus source decides which ones, and most have none.
SPLITS = ("train", "held_out", "unseen")
HELD_OUT_SHARE = 0.2
BY_HASH = -1  # In place of the number of a side.


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    name: str  # Unique in its corpus, and enough to find the text again: "gsm_symbolic:17:4", "notes.jsonl:7".
    group: str = ""  # The kind of document, such as the template that it was generated from.
    key: str = ""  # What its side of the split depends on; "" = its text.
    side: int = BY_HASH  # An index of corpus.SPLITS, where its maker has decided that.
    part: int = 0  # Of a mixture.


@dataclasses.dataclass(frozen=True)
class Rejected:
    """What stood where a document should be: the reason it is counted under, and the whole sentence."""

    file: str
    line: int  # Line, row or record, from 1.
    reason: str
    detail: str


def hash64(seed: int, key: str) -> int:
    """Return 64 pseudo-random bits that depend on `seed` and `key` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:8], "big")
