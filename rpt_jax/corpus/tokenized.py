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
from rpt_jax.corpus.near_duplicates import MIN_SHARE, NearDuplicate, Sketches, contained_share, find_candidates
from rpt_jax.corpus.sources import log_rejected
from rpt_jax.corpus.splits import DocumentTable, assign_splits
from rpt_jax.corpus.store import Records, document_names, read_index, read_sketches, read_summaries
from rpt_jax.corpus.tokenization import REJECTED
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

logger = logging.getLogger(__name__)

NEAR_DUPLICATES = "near_duplicates.jsonl"
_INDEX_COLUMNS = ("key_hash", "text_hash", "split", "mixture_part", "place", "tokens")


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

    def document_ids(self, number: int) -> np.ndarray:
        """Return the token ids of a document, uint32 [S]."""
        first, end = np.searchsorted(self.document_W, [number, number + 1])
        return np.concatenate([ids for ids, _ in self.tokens.read(range(first, end))])

    def clusters(self, split: str) -> np.ndarray:
        """Return integers that say which windows of a split depend on each other, [N].

        Windows of one document do, and of all documents with the same key: the pieces of a text file, the records of a group
        (`data.group_by`), and in "unseen" the documents of one kind, such as a template.
        """
        cluster_D = np.concatenate([rows["key_hash"] for rows in read_index(self.directory, self.shards)])
        return cluster_D[self.document_W[self.windows(split).numbers_N]]

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

    first_rejected: dict[int, str] = {}
    for summary in read_summaries(directory, "tokens", shards) or []:
        first_rejected = {int(part): text for part, text in summary["first_rejected"].items()} | first_rejected
    table = DocumentTable(*(index[name] for name in ("key_hash", "text_hash", "split", "mixture_part", "place")))
    split_D = assign_splits(table, config, first_rejected)
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

    if useless := _files_without_documents(summaries):
        logger.warning(
            "Files of data.path that give no documents: %s, %s.",
            f"{len(useless):,}",
            "; ".join(f"{file} ({reasons})" for file, reasons in useless[:3]) + "; …" * (len(useless) > 3),
        )

    if divided := _held_out_of_divided_texts(corpus):
        logger.warning(
            "%s held-out documents are the end of a text whose beginning is trained on: every file of the corpus, or of its part "
            "of a mixture, is longer than a fifth of that. Confidence intervals count the pieces of a file as one document, and "
            "are wide where there are few.",
            f"{divided:,}",
        )

    pairs = _find_near_duplicates(corpus)
    held_out = int(np.sum(corpus.split_D == SPLITS.index("held_out")))
    if pairs:
        path = directory / NEAR_DUPLICATES
        names = document_names(
            directory, corpus.shards, [number for pair in pairs for number in (pair.held_out, pair.train)]
        )
        lines = [{"held_out": names[p.held_out], "train": names[p.train], "share": p.share} for p in pairs]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
        logger.info(
            "%s of %s held-out documents (%.0f %%) are near-duplicates: a training document has at least %.0f %% of their "
            "five-token runs, see %s.",
            f"{len(pairs):,}",
            f"{held_out:,}",
            100 * len(pairs) / held_out,
            100 * MIN_SHARE,
            path,
        )

    counts = {name: sum(s[name] for s in summaries) for name in ("documents", "records", "tokens", "text_bytes")}
    return {**counts, "rejected": dict(rejected), "held_out": held_out, "near_duplicates": len(pairs)}


def _files_without_documents(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the files that have no records, or whose records were all rejected, and the counts by reason."""
    files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for summary in summaries:
        for file, counts in summary["files"].items():
            files[file].update(counts)
    return [
        (file, ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common()) or "no records")
        for file, counts in files.items()
        if file and not counts["documents"]
    ]


def _held_out_of_divided_texts(corpus: TokenizedCorpus) -> int:
    """Return the number of held-out pieces of texts of which other pieces are trained on."""
    index = list(read_index(corpus.directory, corpus.shards))
    keys_D = np.concatenate([rows["key_hash"] for rows in index])
    is_piece_D = np.concatenate([rows["place"] for rows in index]) >= 0
    of_split = {split: keys_D[is_piece_D & (corpus.split_D == SPLITS.index(split))] for split in ("train", "held_out")}
    return int(np.isin(of_split["held_out"], of_split["train"]).sum())


def _find_near_duplicates(corpus: TokenizedCorpus) -> list[NearDuplicate]:
    """Return the held-out documents that a training document contains, or nearly, by their numbers in the corpus."""
    held_out_H = np.flatnonzero(corpus.split_D == SPLITS.index("held_out"))
    train_T = np.flatnonzero(corpus.split_D == SPLITS.index("train"))
    parts = list(_sketches(corpus, "held_out"))
    sketches = Sketches(
        np.concatenate([part.hashes for part in parts]), np.concatenate([part.counts_D for part in parts])
    )
    pairs = []
    for h, t in find_candidates(sketches, _sketches(corpus, "train")):
        held_out, train = int(held_out_H[h]), int(train_T[t])
        share = contained_share(corpus.document_ids(held_out), corpus.document_ids(train))
        if share >= MIN_SHARE:
            pairs.append(NearDuplicate(held_out=held_out, train=train, share=share))
    return pairs


def _sketches(corpus: TokenizedCorpus, split: str) -> Iterator[Sketches]:
    """Yield the sketches of the documents of a split, shard by shard."""
    documents_before = 0
    index = read_index(corpus.directory, corpus.shards)
    for rows, hashes in zip(index, read_sketches(corpus.directory, corpus.shards), strict=True):
        split_D = corpus.split_D[documents_before : documents_before + len(rows)]
        documents_before += len(rows)
        is_chosen_D = split_D == SPLITS.index(split)
        counts_D = rows["sketch"].astype(np.int64)
        yield Sketches(hashes[np.repeat(is_chosen_D, counts_D)], counts_D[is_chosen_D])
