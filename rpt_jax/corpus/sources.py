"""Read a corpus from its source, log rejected records, and assign documents to splits.

Sources are registered in `registry.CORPUS_SOURCES` (gsm_symbolic.py, champ.py, readers.py). Splits are a function of
`data.seed` and of the documents' contents, so they do not change when files or lines are reordered.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Self, TypeVar

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import (
    DUPLICATE,
    HELD_OUT_FRACTION,
    SPLITS,
    UNASSIGNED,
    Document,
    Rejected,
    hash64,
)
from rpt_jax.corpus.files import FileRange, find_file_ranges
from rpt_jax.corpus.readers import read_file_range
from rpt_jax.corpus.text_splitting import CHUNK_CHARACTERS
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class CorpusShard:
    """One of the shards that a corpus is divided into.

    Attributes:
      number: from 0 to `shards - 1`.
      shards: number of shards of the corpus.
      file_ranges: the ranges of the shard if the source is "path"; None = every `shards`-th range or document of the corpus.
    """

    number: int = 0
    shards: int = 1
    file_ranges: Sequence[FileRange] | None = None

    @property
    def steps(self) -> int:
        """Number of times that `read_corpus` calls `advance`; with the source "path", `file_ranges` must be given."""
        return 1 if self.file_ranges is None else len(self.file_ranges)


WHOLE_CORPUS = CorpusShard()


class RejectLog:
    """Counts rejected records by reason and writes them to a file, one JSON object a line.

    A context manager; the file is created with the first rejected record.

    Args:
      strict: raise `UserError` for the first rejected record instead.
      path: the file; None = none is written.

    Attributes:
      counts: rejected records by reason.
      first_detail: full description of the first rejected record; "" = none.
    """

    def __init__(self, strict: bool, path: Path | None = None):
        self.counts: collections.Counter = collections.Counter()
        self.first_detail = ""
        self._strict = strict
        self._path = path
        self._file: IO[str] | None = None
        self._exit_stack = contextlib.ExitStack()

    def filter(self, items: Iterable[_Item | Rejected]) -> Iterator[_Item]:
        """Yield the items that are not rejected. Raises: UserError, if the log is strict."""
        for item in items:
            if not isinstance(item, Rejected):
                yield item
            elif self._strict:
                raise UserError(
                    f"{item.detail} (data.strict=True; set it to False to skip and count such records.)",
                    field="data.strict",
                )
            else:
                self._add(item)

    def _add(self, item: Rejected) -> None:
        self.counts[item.reason] += 1
        self.first_detail = self.first_detail or item.detail
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._exit_stack.enter_context(self._path.open("w", encoding="utf-8"))
        self._file.write(json.dumps(dataclasses.asdict(item)) + "\n")

    def __enter__(self) -> Self:
        if self._path:
            self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()


def log_rejected(counts: dict[str, int], files: str) -> None:
    """Log how many records were skipped, by reason, if any; `files` names where they are listed."""
    if counts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda c: -c[1]))
        logger.info("Skipped records of the corpus: %s.%s", reasons, f" Listed in {files}." if files else "")


def training_texts(config: DataConfig, max_bytes: int, advance: Callable[[], None]) -> Iterator[str]:
    """Yield the texts of the training documents in order, or a random sample of them if the corpus is larger than `max_bytes`.

    The sample depends on `data.seed` and the documents' contents. The corpus is read twice; memory holds 32 bytes a document.

    Args:
      config: section `data`.
      max_bytes: limit of the sum of the texts' sizes in UTF-8; at least one document is yielded.
      advance: see `read_corpus`; called twice as often.

    Raises: UserError, as `read_corpus` and `assign_splits` do, and with `data.strict` for the first rejected record.
    """
    # First pass: choose documents by their hashes and sizes. Each has a row of four numbers.
    rejects = RejectLog(config.strict)
    rows = array.array("Q")
    for document in rejects.filter(read_corpus(config, collections.Counter(), advance=advance)):
        # The numbers are unsigned, so a split, which may be UNASSIGNED = -1, is shifted.
        shifted_split = document.split - UNASSIGNED
        rows.extend((*document_hashes(document, config.seed), len(document.text.encode()), shifted_split))
    keys_D, texts_D, sizes_D, shifted_D = np.frombuffer(rows, np.uint64).reshape(-1, 4).T
    given_D = shifted_D.astype(np.int8) + np.int8(UNASSIGNED)
    splits_D = assign_splits(keys_D, texts_D, given_D, config, rejects.first_detail)
    train_M = np.flatnonzero(splits_D == SPLITS.index("train"))
    by_key_M = train_M[np.argsort(keys_D[train_M], kind="stable")]

    # Take documents in the order of their keys until the limit is reached.
    count = max(1, np.searchsorted(np.cumsum(sizes_D[by_key_M]), max_bytes, side="right"))
    is_chosen_D = np.zeros(len(keys_D), bool)
    is_chosen_D[by_key_M[:count]] = True

    # Second pass: yield them.
    documents = RejectLog(strict=False).filter(read_corpus(config, collections.Counter(), advance=advance))
    for document, is_chosen in zip(documents, is_chosen_D, strict=True):
        if is_chosen:
            yield document.text


def read_corpus(
    config: DataConfig,
    skipped: collections.Counter,
    shard: CorpusShard = WHOLE_CORPUS,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Document | Rejected]:
    """Yield the documents and rejected records of a shard of the corpus, in order.

    Args:
      config: section `data`.
      skipped: counts, by reason, what a generator discards.
      shard: the shard.
      advance: called after each file range of the shard, or once if the source has no files.

    Raises: UserError, if the source or a file cannot be read.
    """
    if config.source == "path":
        file_ranges = shard.file_ranges
        if file_ranges is None:
            file_ranges = find_file_ranges(config)[shard.number :: shard.shards]
        for file_range in file_ranges:
            yield from read_file_range(file_range, config)
            advance()
    else:
        documents = CORPUS_SOURCES[config.source].function(config, skipped)
        yield from itertools.islice(documents, shard.number, None, shard.shards)
        advance()


def document_hashes(document: Document, seed: int) -> tuple[int, int]:
    """Return two 64-bit hashes: of the key that assigns the split, under `seed`, and of the text, to find duplicates."""
    return hash64(seed, document.key or document.text), hash64(0, document.text)


def assign_splits(
    keys_D: np.ndarray, texts_D: np.ndarray, splits_D: np.ndarray, config: DataConfig, first_rejected: str = ""
) -> np.ndarray:
    """Return the split of every document, int8 [D]: an index of `SPLITS`, or `DUPLICATE` for a repeated text.

    Of the documents without a split, those with the lowest keys are held out: a fifth, at most `data.held_out_documents`.
    Because ranks are used instead of a threshold, both splits get at least one document and all documents are used. The order
    of the documents, and how they are distributed over files and shards, make no difference.

    Args:
      keys_D, texts_D: uint64, see `document_hashes`.
      splits_D: int8, the splits that the source has assigned, else `UNASSIGNED`.
      config: section `data`.
      first_rejected: description of the first rejected record, for the error message.

    Raises: UserError, if there are fewer than two documents.
    """
    # The first document of every distinct text; all others are duplicates.
    first_U = np.unique(texts_D, return_index=True)[1]
    result_D = np.full(len(texts_D), DUPLICATE, np.int8)
    result_D[first_U] = splits_D[first_U]
    unassigned_U = np.sort(first_U[splits_D[first_U] == UNASSIGNED])
    if len(unassigned_U) < 2 and len(unassigned_U) == len(first_U):
        rejected = f"The first rejected record: {first_rejected.rstrip('.')}. " if first_rejected else ""
        raise UserError(
            f"{source_name(config)} has {len(unassigned_U)} distinct document(s), and at least 2 are needed: one to train on and "
            f"one to hold out. {rejected}A .txt is split into documents of about {CHUNK_CHARACTERS} characters, a .jsonl has one "
            "document per line.",
            field=f"data.{'path' if config.source == 'path' else 'source'}",
        )

    # Hold out the documents with the lowest keys.
    count = min(config.held_out_documents, max(1, int(len(unassigned_U) * HELD_OUT_FRACTION)))
    result_D[unassigned_U] = SPLITS.index("train")
    result_D[unassigned_U[np.argsort(keys_D[unassigned_U], kind="stable")[:count]]] = SPLITS.index("held_out")
    return result_D


def source_name(config: DataConfig) -> str:
    """Return the corpus' name in messages, such as "data.path='notes.jsonl'"."""
    return f"data.path='{config.path}'" if config.source == "path" else f"data.source='{config.source}'"


def check_source(config: DataConfig) -> None:
    """Check that the source's package or files exist, without reading them. Raises: UserError."""
    check = CORPUS_SOURCES[config.source].requirements.check
    if check:
        check(config)
