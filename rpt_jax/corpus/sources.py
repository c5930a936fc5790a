"""Corpora: plain text documents, and which of them training never sees.

Three sources: problems with worked solutions that are generated here (`gsm_symbolic`), competition problems
with stepwise solutions (`champ`), and a user's own text (`path`, see readers.py). Every split is a function of `data.seed`
and of what a document says, so it does not move when files or lines change places.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import BY_HASH, HELD_OUT_SHARE, SPLITS, Document, Rejected, hash64
from rpt_jax.corpus.files import FileRange, find_units
from rpt_jax.corpus.readers import read_unit
from rpt_jax.corpus.text_splitting import PIECE_CHARACTERS
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

DUPLICATE = -2  # In place of the number of a side: a repetition.


class CorpusShard(NamedTuple):
    """One of `shards` parts of a corpus; `units` are those of the files that it has, None for all."""

    shard: int = 0
    shards: int = 1
    units: Sequence[FileRange] | None = None


WHOLE = CorpusShard()
_T = TypeVar("_T")


class RejectLog:
    """Counts what is no document by its reason, and lists it, one JSON object a line, in the file `listing`.

    The file is made with the first of them. Raises: UserError from `keep`, for the first, where `strict` says so.
    """

    def __init__(self, strict: bool, listing: Path | None = None):
        self.counts: collections.Counter = collections.Counter()
        self.first = ""
        self._strict, self._listing, self._files = strict, listing, contextlib.ExitStack()
        self._file: Any = None

    def keep(self, found: Iterable[_T | Rejected]) -> Iterator[_T]:
        """Yield what was found and is not rejected."""
        for item in found:
            if not isinstance(item, Rejected):
                yield item
            elif self._strict:
                raise UserError(f"{item.detail} (data.strict=True; without it this is counted and left out.)")
            else:
                self._add(item)

    def _add(self, item: Rejected) -> None:
        self.counts[item.reason] += 1
        self.first = self.first or item.detail
        if self._listing:
            if self._file is None:
                self._listing.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._files.enter_context(self._listing.open("w", encoding="utf-8"))
            self._file.write(json.dumps(dataclasses.asdict(item)) + "\n")

    def __enter__(self) -> Self:
        if self._listing:
            self._listing.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def report_rejects(counts: dict[str, int], where: str) -> None:
    """Print how much was left out of the corpus and why, where anything was."""
    if counts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda c: -c[1]))
        print(f"Left out of the corpus: {reasons}.{f' Listed in {where}.' if where else ''}")


def training_texts(config: DataConfig, most_bytes: int, advance: Callable[[], None]) -> Iterator[str]:
    """Yield the texts of the training documents, in order; of a corpus with more than `most_bytes`, some of them.

    Which ones depends on `data.seed` and on what they say. The corpus is read twice, and what stays in memory are 32 bytes for
    every document.

    Args:
      advance: see `read_corpus`; twice as often.

    Raises: UserError, as `read_corpus` and `split` do, and with `data.strict` for what is no document.
    """
    rejects, rows = RejectLog(config.strict), array.array("Q")
    for document in rejects.keep(read_corpus(config, collections.Counter(), advance=advance)):
        rows.extend((*fingerprints(document, config.seed), len(document.text.encode()), document.side - BY_HASH))
    keys_D, texts_D, sizes_D, sides_D = np.frombuffer(rows, np.uint64).reshape(-1, 4).T
    sides_D = split(keys_D, texts_D, sides_D.astype(np.int8) + np.int8(BY_HASH), config, rejects.first)
    train_M = np.flatnonzero(sides_D == SPLITS.index("train"))
    by_key_M = train_M[np.argsort(keys_D[train_M], kind="stable")]
    chosen_D = np.zeros(len(keys_D), bool)
    chosen_D[by_key_M[: max(1, np.searchsorted(np.cumsum(sizes_D[by_key_M]), most_bytes, side="right"))]] = True
    again = RejectLog(False).keep(read_corpus(config, collections.Counter(), advance=advance))
    yield from (document.text for document, chosen in zip(again, chosen_D, strict=True) if chosen)


def read_corpus(
    config: DataConfig,
    skipped: collections.Counter,
    part: CorpusShard = WHOLE,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Document | Rejected]:
    """Yield the documents of a part of the corpus, in order; what a generator skips is counted in `skipped`.

    Args:
      advance: called after each unit of the part; where there are none, after all of it.
    """
    if config.source == "path":
        for unit in find_units(config)[part.shard :: part.shards] if part.units is None else part.units:
            yield from read_unit(unit, config)
            advance()
    else:
        documents = CORPUS_SOURCES[config.source].function(config, skipped)
        yield from itertools.islice(documents, part.shard, None, part.shards)
        advance()


def fingerprints(document: Document, seed: int) -> tuple[int, int]:
    """64 bits that its side depends on, and 64 bits of its text."""
    return hash64(seed, document.key or document.text), hash64(0, document.text)


def split(
    keys_D: np.ndarray, texts_D: np.ndarray, sides_D: np.ndarray, config: DataConfig, example: str = ""
) -> np.ndarray:
    """Say of every document which of `SPLITS` it is on, or `DUPLICATE` for a text that was there before; int8 [D].

    Where a document has no side yet (BY_HASH), the lowest keys are held out: a fifth, at most `data.held_out_documents`.
    Ranks, unlike a threshold, leave no document unused and no side empty, and neither the order of documents nor how they
    are spread over files and shards changes a side.

    Args:
      keys_D, texts_D: see `fingerprints`.
      example: what was wrong with the first thing that is no document, for the error.

    Raises: UserError, where there are too few documents.
    """
    first_U = np.unique(texts_D, return_index=True)[1]
    result_D = np.full(len(texts_D), DUPLICATE, np.int8)
    result_D[first_U] = sides_D[first_U]
    open_U = np.sort(first_U[sides_D[first_U] == BY_HASH])
    if len(open_U) < 2 and len(open_U) == len(first_U):
        raise UserError(
            f"{source_name(config)} is too short: it gives {len(open_U)} distinct document(s), and at least 2 are needed, one "
            f"to train on and one to hold out. {example or 'Add text'}: a .txt is cut into documents of about "
            f"{PIECE_CHARACTERS} characters, a .jsonl has one document per line."
        )
    count = min(config.held_out_documents, max(1, int(len(open_U) * HELD_OUT_SHARE)))
    result_D[open_U] = SPLITS.index("train")
    result_D[open_U[np.argsort(keys_D[open_U], kind="stable")[:count]]] = SPLITS.index("held_out")
    return result_D


def source_name(config: DataConfig) -> str:
    """What to call the corpus in a message."""
    return f"data.path='{config.path}'" if config.source == "path" else f"data.source='{config.source}'"


def check_source(config: DataConfig) -> None:
    """Raises: UserError, where the source is not here at all; what it says is not read."""
    check = CORPUS_SOURCES[config.source].requirements.check
    if check:
        check(config)
