"""Read a small corpus into memory, without tokenizing it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import DUPLICATE, SPLITS, Document
from rpt_jax.corpus.sources import RejectLog, document_hashes, read_corpus
from rpt_jax.corpus.splits import DocumentTable, assign_splits


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of each split; `skipped` counts, by reason, the records and draws that are not documents."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    unseen: tuple[Document, ...]
    skipped: dict[str, int]


def load_corpus(config: DataConfig, rejected_path: Path | None = None) -> Corpus:
    """Read a corpus and assign its documents to splits; rejected records are listed in `rejected_path`."""
    with RejectLog(config.strict, rejected_path) as rejects:
        documents = list(rejects.filter(read_corpus(config, rejects.counts)))
    hashes_Dx2 = np.array([document_hashes(document, config.seed) for document in documents], np.uint64).reshape(-1, 2)
    columns_3xD = np.array([[d.split, d.mixture_part, d.place] for d in documents], np.int64).reshape(-1, 3).T
    split_D = assign_splits(DocumentTable(*hashes_Dx2.T, *columns_3xD), config, rejects.first_details)
    if duplicates := int(np.sum(split_D == DUPLICATE)):
        rejects.counts["duplicate"] += duplicates
    by_split = {
        name: tuple(documents[i] for i in np.flatnonzero(split_D == split)) for split, name in enumerate(SPLITS)
    }
    return Corpus(**by_split, skipped=dict(rejects.counts))
