"""Read a small corpus into memory, without tokenizing it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import DUPLICATE, SPLITS, Document
from rpt_jax.corpus.sources import RejectLog, assign_splits, document_hashes, read_corpus


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
    given_D = np.array([document.split for document in documents], np.int8)
    split_D = assign_splits(hashes_Dx2[:, 0], hashes_Dx2[:, 1], given_D, config, rejects.first_detail)
    if duplicates := int(np.sum(split_D == DUPLICATE)):
        rejects.counts["duplicate"] += duplicates
    by_split = {
        name: tuple(documents[i] for i in np.flatnonzero(split_D == split)) for split, name in enumerate(SPLITS)
    }
    return Corpus(**by_split, skipped=dict(rejects.counts))
