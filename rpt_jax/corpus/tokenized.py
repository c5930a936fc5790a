"""A tokenized corpus on disk: open it, select the windows of a split, and report skipped and repeated documents."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import DUPLICATE, SPLITS
from rpt_jax.corpus.near_duplicates import near_duplicates
from rpt_jax.corpus.sources import assign_splits, log_rejected
from rpt_jax.corpus.store import Records, document_names, read_index, read_summaries
from rpt_jax.corpus.tokenization import REJECTED
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

logger = logging.getLogger(__name__)

NEAR_DUPLICATES = "near_duplicates.jsonl"
_INDEX_COLUMNS = ("key_hash", "text_hash", "split", "mixture_part", "tokens")


class Windows(Sequence):
    """The token ids of some windows, read on access: `windows[i]` is uint32 [S].

    Attributes:
      numbers_N: int64, the number of each window in the corpus.
    """

    def __init__(self, records: Records, numbers_N: np.ndarray):
        self.numbers_N = numbers_N
        self._records = records

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._records[int(self.numbers_N[number])][0]


class TokenizedCorpus(NamedTuple):
    """The tokens of a corpus and the split of every document.

    Attributes:
      directory: where it is stored.
      shards: number of shards.
      split_D: int8, index of `SPLITS`, or `DUPLICATE`.
      mixture_part_D: uint16, index of the part of the mixture that each document belongs to.
      sizes_D: uint32, number of tokens of each document.
      document_W: uint32, number of the document that each window belongs to.
      tokens: token ids and byte lengths of each window.
    """

    directory: Path
    shards: int
    split_D: np.ndarray
    mixture_part_D: np.ndarray
    sizes_D: np.ndarray
    document_W: np.ndarray
    tokens: Records

    def windows(self, split: str) -> Windows:
        """Return the windows of the documents of a split."""
        return Windows(self.tokens, np.flatnonzero((self.split_D == SPLITS.index(split))[self.document_W]))

    def clusters(self, split: str) -> np.ndarray:
        """Return integers that say which windows of a split depend on each other, [N].

        Windows of one document do. Of "unseen", all windows of one kind of document do: these documents have the key of their
        kind, such as the template that generated them.
        """
        document_N = self.document_W[self.windows(split).numbers_N]
        if split != "unseen":
            return document_N
        key_D = np.concatenate([rows["key_hash"] for rows in read_index(self.directory, self.shards)])
        return key_D[document_N]

    def token_count(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return int(self.sizes_D[self.split_D == SPLITS.index(split)].sum())


def open_tokens(config: DataConfig, directory: Path, shards: int) -> TokenizedCorpus:
    """Open the tokens of all shards and assign the documents to splits.

    Splits and duplicates are determined here rather than while tokenizing, because they depend on all shards. Memory holds 7
    bytes for every document and 4 for every window; `Windows` takes 8 more for each of its windows.

    Raises: UserError, if a shard is missing or damaged or there are fewer than two documents.
    """
    # Read the index of all shards. Columns are copied, so that the rest of each shard's index is freed.
    tokens = Records(directory, "tokens", shards)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _INDEX_COLUMNS}
    for rows in read_index(directory, shards):
        for name in _INDEX_COLUMNS:
            columns[name].append(rows[name].copy())
    index = {name: np.concatenate(column) for name, column in columns.items()}

    # Number the windows: every document has as many as its tokens fill.
    windows_D = -(-index["tokens"].astype(np.int64) // config.max_document_tokens)
    document_W = np.repeat(np.arange(len(windows_D), dtype=np.uint32), windows_D)
    if len(document_W) != len(tokens):
        raise UserError(
            f"{directory}: found {len(tokens)} windows, expected {len(document_W)} for its documents. Prepare the corpus again "
            "in another directory.",
            field=str(directory),
        )

    first_rejected = (s["first_rejected"] for s in read_summaries(directory, "tokens", shards) or [])
    split_D = assign_splits(
        index["key_hash"], index["text_hash"], index["split"], config, next(filter(None, first_rejected), "")
    )
    return TokenizedCorpus(
        directory=directory,
        shards=shards,
        split_D=split_D,
        mixture_part_D=index["mixture_part"],
        sizes_D=index["tokens"],
        document_W=document_W,
        tokens=tokens,
    )


def report_corpus(corpus: TokenizedCorpus) -> dict[str, Any]:
    """Log the skipped records, list near-duplicates of training documents in a file, and return the corpus' counts."""
    directory = corpus.directory
    summaries = read_summaries(directory, "tokens", corpus.shards) or []

    rejected: collections.Counter = sum((collections.Counter(s["rejected"]) for s in summaries), collections.Counter())
    if duplicates := int(np.sum(corpus.split_D == DUPLICATE)):
        rejected["duplicate"] += duplicates
    files = sorted(directory.glob(f"{REJECTED}-*.jsonl"))
    log_rejected(rejected, ", ".join(map(str, files[:3])) + ", …" * (len(files) > 3))

    pairs = _find_near_duplicates(corpus)
    if pairs:
        path = directory / NEAR_DUPLICATES
        atomic_write(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
        held_out = int(np.sum(corpus.split_D == SPLITS.index("held_out")))
        logger.info(
            "%s of %s held-out documents are near-duplicates of a training document, see %s.",
            f"{len(pairs):,}",
            f"{held_out:,}",
            path,
        )

    counts = {name: sum(s[name] for s in summaries) for name in ("documents", "records", "tokens", "text_bytes")}
    return {**counts, "rejected": dict(rejected), "near_duplicates": len(pairs)}


def _find_near_duplicates(corpus: TokenizedCorpus) -> list[dict[str, Any]]:
    """Return the names and the similarity of held-out documents and the training documents that they nearly repeat."""
    held_out_H = np.flatnonzero(corpus.split_D == SPLITS.index("held_out"))
    train_T = np.flatnonzero(corpus.split_D == SPLITS.index("train"))
    held_out_HxK = np.concatenate(list(_signatures(corpus, "held_out")))
    pairs = [
        (int(held_out_H[pair.held_out]), int(train_T[pair.train]), pair.similarity)
        for pair in near_duplicates(held_out_HxK, _signatures(corpus, "train"))
    ]
    numbers = [number for held_out, train, _ in pairs for number in (held_out, train)]
    names = document_names(corpus.directory, corpus.shards, numbers) if pairs else {}
    return [
        {"held_out": names[held_out], "train": names[train], "similarity": similarity}
        for held_out, train, similarity in pairs
    ]


def _signatures(corpus: TokenizedCorpus, split: str) -> Iterator[np.ndarray]:
    """Yield the MinHash signatures of the documents of a split, shard by shard, uint32 [D, K]."""
    documents_before = 0
    for rows in read_index(corpus.directory, corpus.shards):
        split_D = corpus.split_D[documents_before : documents_before + len(rows)]
        documents_before += len(rows)
        yield rows["signature"][split_D == SPLITS.index(split)]
