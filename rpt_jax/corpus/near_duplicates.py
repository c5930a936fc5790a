"""Held-out documents that a training document contains, or nearly: found by sampled hashes of five-token runs.

A document's sketch holds the hashes of its runs that fall into a fixed eighth of all hashes ("FracMinHash", Irber et al. 2022).
Unlike the bins of MinHash, which estimate how similar two documents are as a whole, sketches tell which share of a short
document is found in a long one. Whole batches are hashed with NumPy, because every document is hashed while it is tokenized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

RUN_TOKENS = 5
MIN_SHARE = 0.8  # Share of a held-out document's runs in a training document from which it counts as a near-duplicate.
_MIN_SKETCH_SHARE = 0.5  # The same share of the sampled runs, from which all runs of the two documents are compared.
_SAMPLED_BITS = 3  # Hashes whose top bits are zero are sampled.
_COMPARED_DOCUMENTS = 1024  # Training documents that are compared at a time.
# Odd 64-bit constants, one for each token of a run.
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


class Sketches(NamedTuple):
    """The sketches of D documents: their hashes (uint32), concatenated, and the number of hashes of each, [D]."""

    hashes: np.ndarray
    counts_D: np.ndarray

    def blocks(self, documents: int) -> Iterator[Sketches]:
        """Yield the sketches in blocks of at most `documents` documents."""
        ends_D = np.cumsum(self.counts_D, dtype=np.int64)
        start = 0
        for first in range(0, len(self.counts_D), documents):
            counts_D = self.counts_D[first : first + documents]
            end = int(ends_D[first + len(counts_D) - 1])
            yield Sketches(self.hashes[start:end], counts_D)
            start = end


class NearDuplicate(NamedTuple):
    """A held-out document and the training document that has most of its runs.

    Attributes:
      held_out, train: numbers of the documents.
      share: fraction of the held-out document's distinct runs that the training document has too.
    """

    held_out: int
    train: int
    share: float


def make_sketches(ids_T: np.ndarray, sizes_D: np.ndarray, sampled_bits: int = _SAMPLED_BITS) -> Sketches:
    """Return the sketches of documents.

    Args:
      ids_T: token ids of all documents, concatenated.
      sizes_D: number of tokens of each document, at least 1.
      sampled_bits: top bits that are zero in the hashes that are sampled; 0 to keep all hashes.
    """
    hashes_R, document_R = _hash_runs(ids_T, sizes_D)
    is_sampled_R = hashes_R < 2 ** (64 - sampled_bits)
    # The bits below those are the value. Sort by document, and keep each value once.
    values = hashes_R[is_sampled_R] >> np.uint64(32 - sampled_bits) & np.uint64(0xFFFFFFFF)
    pairs = np.unique(document_R[is_sampled_R].astype(np.uint64) << np.uint64(32) | values)
    counts_D = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(sizes_D))
    return Sketches(pairs.astype(np.uint32), counts_D)


def contained_share(ids_S: np.ndarray, container_S: np.ndarray) -> float:
    """Return the fraction of a document's distinct runs that another document has too; both are token ids."""
    runs = np.unique(_hash_runs(ids_S, np.array([len(ids_S)]))[0])
    return float(np.isin(runs, _hash_runs(container_S, np.array([len(container_S)]))[0]).mean())


def _hash_runs(ids_T: np.ndarray, sizes_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of every run of five tokens of documents, uint64 [R], and the document of each, [R].

    A document of fewer than five tokens is a single run.
    """
    padding = RUN_TOKENS - 1
    document_T = np.repeat(np.arange(len(sizes_D)), sizes_D)
    offset_T = np.arange(len(ids_T)) - (np.cumsum(sizes_D) - sizes_D)[document_T]

    # Pad every document with zeros, which add nothing to a hash, so that no run crosses into the next document.
    padded_position_T = np.arange(len(ids_T)) + padding * document_T
    padded = np.zeros(len(ids_T) + padding * len(sizes_D), np.uint64)
    padded[padded_position_T] = np.asarray(ids_T, np.uint64) + np.uint64(1)
    starts_run_T = offset_T < np.maximum(1, sizes_D - padding)[document_T]

    # Hash all runs at once, then mix the bits.
    with np.errstate(over="ignore"):
        hashes = np.zeros(max(0, len(padded) - padding), np.uint64)
        for i, multiplier in enumerate(_MULTIPLIERS):
            hashes += padded[i : len(padded) - padding + i] * multiplier
        hashes_R = hashes[padded_position_T[starts_run_T]]
        hashes_R ^= hashes_R >> np.uint64(29)
        hashes_R *= _MULTIPLIERS[1]
        hashes_R ^= hashes_R >> np.uint64(32)
        hashes_R *= _MULTIPLIERS[2]
    return hashes_R, document_T[starts_run_T]


def find_candidates(held_out: Sketches, train: Iterable[Sketches]) -> list[tuple[int, int]]:
    """Find, for each held-out document, the training document that has most of its sampled runs, if these are half or more.

    Args:
      held_out: sketches of the held-out documents.
      train: sketches of the training documents, in parts; one part is in memory at a time.

    Returns: pairs of the number of a held-out document and that of a training document, in the order of the former.
    """
    # The hashes of all held-out documents in ascending order, and the document of each.
    documents = len(held_out.counts_D)
    order = np.argsort(held_out.hashes, kind="stable")
    sorted_E = held_out.hashes[order]
    document_E = np.repeat(np.arange(documents), held_out.counts_D)[order]

    # For each held-out document: most hashes in common with a training document so far, and the number of that document.
    common_H = np.zeros(documents, np.int64)
    best_H = np.zeros(documents, np.int64)
    documents_before = 0
    for part in train:
        for block in part.blocks(_COMPARED_DOCUMENTS):
            # Every pair of a training and a held-out document occurs once for every hash that they have in common.
            first_R = np.searchsorted(sorted_E, block.hashes, "left")
            matches_R = np.searchsorted(sorted_E, block.hashes, "right") - first_R
            entries = np.repeat(first_R - np.cumsum(matches_R) + matches_R, matches_R) + np.arange(matches_R.sum())
            train_document = np.repeat(np.repeat(np.arange(len(block.counts_D)), block.counts_D), matches_R)
            pairs, common = np.unique(train_document * documents + document_E[entries], return_counts=True)

            # Sort so that the best training document of a held-out one comes first, then keep it.
            order = np.argsort(-common, kind="stable")
            held_out_of_pair, first = np.unique(pairs[order] % max(1, documents), return_index=True)
            best = order[first]
            is_better = common[best] > common_H[held_out_of_pair]
            common_H[held_out_of_pair[is_better]] = common[best[is_better]]
            best_H[held_out_of_pair[is_better]] = documents_before + pairs[best[is_better]] // max(1, documents)
            documents_before += len(block.counts_D)
    is_candidate_H = (common_H > 0) & (common_H >= _MIN_SKETCH_SHARE * held_out.counts_D)
    return [(int(h), int(best_H[h])) for h in np.flatnonzero(is_candidate_H)]
