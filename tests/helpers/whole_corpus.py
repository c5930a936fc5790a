"""A corpus read as a whole: for corpora that a test can hold in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import SPLITS, Document
from rpt_jax.corpus.sources import DUPLICATE, RejectLog, fingerprints, read_corpus, split


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by their side; `skipped` counts, by reason, what was found or generated and left out."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    unseen: tuple[Document, ...]
    skipped: dict[str, int]


def load_corpus(config: DataConfig, listing: Path | None = None) -> Corpus:
    with RejectLog(config.strict, listing) as rejects:
        documents = list(rejects.keep(read_corpus(config, rejects.counts)))
    hashes = [fingerprints(document, config.seed) for document in documents]
    keys_D, texts_D = np.array(hashes, np.uint64).reshape(-1, 2).T
    sides_D = split(keys_D, texts_D, np.array([d.side for d in documents], np.int8), config, rejects.first)
    if repeated := int(np.sum(sides_D == DUPLICATE)):
        rejects.counts["duplicate"] += repeated
    parts = {name: tuple(documents[i] for i in np.flatnonzero(sides_D == side)) for side, name in enumerate(SPLITS)}
    return Corpus(**parts, skipped=dict(rejects.counts))
