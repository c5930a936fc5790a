"""Near-duplicate detection with MinHash signatures (Broder 1997).

The `datasketch` library hashes one document at a time in Python; here whole batches are hashed with NumPy, because every
document of a corpus is hashed while it is tokenized.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rpt_jax.corpus.store import SIGNATURE_BINS

MIN_SIMILARITY = 0.75  # Estimated Jaccard similarity from which two documents count as near-duplicates.
SHINGLE_TOKENS = 5  # Length of the n-grams of tokens that documents are compared by.
_EMPTY_BIN = 0xFFFFFFFF
# Odd 64-bit constants, one for each token of a shingle.
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def minhash_signatures(ids_T: np.ndarray, sizes_D: np.ndarray) -> np.ndarray:
    """Return the MinHash signatures of documents, uint32 [D, SIGNATURE_BINS].

    The fraction of bins in which two signatures agree estimates the Jaccard similarity of the documents' sets of shingles
    (5-grams of tokens). One permutation hashing (Li, Owen and Zhang 2012): every shingle falls into one of the bins, and a bin
    keeps the least hash. A document of fewer than five tokens is a single shingle.

    Args:
      ids_T: token ids of all documents, concatenated.
      sizes_D: number of tokens of each document, at least 1.
    """
    padding = SHINGLE_TOKENS - 1
    document_T = np.repeat(np.arange(len(sizes_D)), sizes_D)
    offset_T = np.arange(len(ids_T)) - (np.cumsum(sizes_D) - sizes_D)[document_T]

    # Pad every document with zeros, which add nothing to a hash, so that no shingle crosses into the next document.
    padded_position_T = np.arange(len(ids_T)) + padding * document_T
    padded = np.zeros(len(ids_T) + padding * len(sizes_D), np.uint64)
    padded[padded_position_T] = np.asarray(ids_T, np.uint64) + np.uint64(1)
    starts_shingle_T = offset_T < np.maximum(1, sizes_D - padding)[document_T]

    # Hash all shingles at once, then mix the bits.
    with np.errstate(over="ignore"):
        hashes = np.zeros(max(0, len(padded) - padding), np.uint64)
        for i, multiplier in enumerate(_MULTIPLIERS):
            hashes += padded[i : len(padded) - padding + i] * multiplier
        hashes_R = hashes[padded_position_T[starts_shingle_T]]
        hashes_R ^= hashes_R >> np.uint64(29)
        hashes_R *= _MULTIPLIERS[1]
        hashes_R ^= hashes_R >> np.uint64(32)
        hashes_R *= _MULTIPLIERS[2]

    # The top bits choose the bin, 32 of the others are the value.
    signatures_DxK = np.full((len(sizes_D), SIGNATURE_BINS), _EMPTY_BIN, np.uint32)
    bin_R = (
        document_T[starts_shingle_T] * SIGNATURE_BINS + (hashes_R >> np.uint64(60)).astype(np.int64) % SIGNATURE_BINS
    )
    np.minimum.at(signatures_DxK.reshape(-1), bin_R, (hashes_R >> np.uint64(20)).astype(np.uint32))
    return signatures_DxK


class NearDuplicate(NamedTuple):
    """A held-out document and the training document most similar to it.

    Attributes:
      held_out, train: row numbers of their signatures.
      similarity: estimated Jaccard similarity, from 0 to 1.
    """

    held_out: int
    train: int
    similarity: float


def near_duplicates(held_out_HxK: np.ndarray, train: Iterable[np.ndarray]) -> list[NearDuplicate]:
    """Find, for each held-out document, the most similar training document, if they are near-duplicates.

    Args:
      held_out_HxK: uint32, signatures of the held-out documents.
      train: signatures of the training documents in blocks, uint32 [D, K]; one block is in memory at a time.
    """
    # For each held-out document: most bins that agree with a training document so far, and the number of that document.
    # Empty bins of the held-out document do not count.
    is_filled_HxK = held_out_HxK != _EMPTY_BIN
    matches_H = np.zeros(len(held_out_HxK), np.int64)
    best_H = np.zeros(len(held_out_HxK), np.int64)
    documents_before = 0
    for block_DxK in train:
        block_KxD = np.ascontiguousarray(block_DxK.T)
        for number, signature_K in enumerate(held_out_HxK):
            matches_D = np.zeros(block_KxD.shape[1], np.uint8)
            for k in np.flatnonzero(is_filled_HxK[number]):
                matches_D += block_KxD[k] == signature_K[k]
            if len(matches_D) and matches_D.max() > matches_H[number]:
                matches_H[number] = matches_D.max()
                best_H[number] = documents_before + matches_D.argmax()
        documents_before += len(block_DxK)
    similarity_H = matches_H / is_filled_HxK.sum(axis=1)
    return [
        NearDuplicate(held_out=int(h), train=int(best_H[h]), similarity=float(similarity_H[h]))
        for h in np.flatnonzero(similarity_H >= MIN_SIMILARITY)
    ]
