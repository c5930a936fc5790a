"""Read a corpus from its source and log rejected records.

Sources are registered in `registry.CORPUS_SOURCES` (gsm_symbolic.py, champ.py, math_solutions.py, readers.py).
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
from rpt_jax.corpus.documents import SPLITS, Document, Rejected, hash64
from rpt_jax.corpus.files import FileRange, find_file_ranges
from rpt_jax.corpus.readers import read_file_range
from rpt_jax.corpus.splits import DocumentTable, assign_splits
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
      field: the config field that made it strict, for the error.

    Attributes:
      counts: rejected records by reason.
      files: the same for each file, by its name.
      first_details: full description of the first rejected record of each part of the mixture.
    """

    def __init__(self, strict: bool, path: Path | None = None, field: str = "data.strict"):
        self.counts: collections.Counter = collections.Counter()
        self.files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.first_details: dict[int, str] = {}
        self._strict = strict
        self._path = path
        self._field = field
        self._file: IO[str] | None = None
        self._exit_stack = contextlib.ExitStack()

    def filter(self, items: Iterable[_Item | Rejected]) -> Iterator[_Item]:
        """Yield the items that are not rejected. Raises: UserError, if the log is strict."""
        for item in items:
            if not isinstance(item, Rejected):
                yield item
            elif self._strict:
                raise UserError(
                    f"{item.detail} ({self._field}=True; set it to False to skip and count such records.)",
                    field=self._field,
                )
            else:
                self.add(item)

    def add(self, item: Rejected) -> None:
        """Count and list a record, also if the log is strict."""
        self.counts[item.reason] += 1
        self.files[item.file][item.reason] += 1
        self.first_details.setdefault(item.mixture_part, item.detail)
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


def log_rejected(counts: dict[str, int], files: str, of: str = "the corpus") -> None:
    """Log how many records were skipped, by reason, if any; `files` names where they are listed."""
    if counts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda c: -c[1]))
        logger.info("Skipped records of %s: %s.%s", of, reasons, f" Listed in {files}." if files else "")


def training_texts(
    config: DataConfig, shard: CorpusShard, max_bytes: int, advance: Callable[[], None]
) -> Iterator[str]:
    """Yield the texts of the training documents in order, or a random sample of them if the corpus is larger than `max_bytes`.

    The sample depends on the documents' contents only. The corpus is read twice; memory holds 48 bytes a document.

    Args:
      config: section `data`.
      shard: the whole corpus.
      max_bytes: limit of the sum of the texts' sizes in UTF-8; at least one document is yielded.
      advance: see `read_corpus`; called twice as often.

    Raises: UserError, as `read_corpus` and `splits.assign_splits` do, and with `data.strict` for the first rejected record.
    """
    # First pass: choose documents by their hashes and sizes. Each has a row of six numbers.
    rejects = RejectLog(config.strict)
    rows = array.array("q")
    for document in rejects.filter(read_corpus(config, collections.Counter(), shard, advance)):
        hashes = (value - 2**63 for value in document_hashes(document, config.seed))
        rows.extend((*hashes, document.split, document.mixture_part, document.place, len(document.text.encode())))
    columns_D = np.frombuffer(rows, np.int64).reshape(-1, 6).T
    keys_D, texts_D = columns_D[:2].astype(np.uint64) + np.uint64(2**63)
    table = DocumentTable(keys_D, texts_D, *columns_D[2:5])
    splits_D = assign_splits(table, config, rejects.first_details)
    sizes_D = columns_D[5]
    train_M = np.flatnonzero(splits_D == SPLITS.index("train"))
    by_hash_M = train_M[np.argsort(texts_D[train_M], kind="stable")]

    # Take documents in the order of their texts' hashes until the limit is reached.
    count = max(1, np.searchsorted(np.cumsum(sizes_D[by_hash_M]), max_bytes, side="right"))
    is_chosen_D = np.zeros(len(keys_D), bool)
    is_chosen_D[by_hash_M[:count]] = True

    # Second pass: yield them.
    documents = RejectLog(strict=False).filter(read_corpus(config, collections.Counter(), shard, advance))
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


def check_source(config: DataConfig) -> None:
    """Check that the source's package or files exist, without reading them. Raises: UserError."""
    check = CORPUS_SOURCES[config.source].requirements.check
    if check:
        check(config)
