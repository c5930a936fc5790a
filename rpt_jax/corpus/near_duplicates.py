"""Documents that say nearly the same, found by sketches of a few bytes each (min-wise hashing; Broder 1997)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rpt_jax.corpus.store import SKETCH

SIMILAR = 0.75  # Share of a sketch that two documents must have in common.
_SHINGLE = 5  # Tokens.
_EMPTY = 0xFFFFFFFF
_PRIMES = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def sketches(ids_T: np.ndarray, sizes_D: np.ndarray) -> np.ndarray:
    """Return uint32 [D, SKETCH] of documents whose token ids stand in a row, `sizes_D` of each, none empty.

    Two sketches agree in a place with about the probability of the share of runs of five tokens that the documents have in
    common (Jaccard). Every run falls into one of the places, and a place keeps its least hash (one permutation hashing;
    Li, Owen and Zhang 2012). A document of fewer than five tokens is one run.
    """
    gap, documents_T = _SHINGLE - 1, np.repeat(np.arange(len(sizes_D)), sizes_D)
    inside_T = np.arange(len(ids_T)) - (np.cumsum(sizes_D) - sizes_D)[documents_T]
    # With zeros behind every document, which add nothing to a hash.
    places_T = np.arange(len(ids_T)) + gap * documents_T
    spread = np.zeros(len(ids_T) + gap * len(sizes_D), np.uint64)
    spread[places_T] = np.asarray(ids_T, np.uint64) + np.uint64(1)
    begins_T = inside_T < np.maximum(1, sizes_D - gap)[documents_T]
    with np.errstate(over="ignore"):
        hashes = sum(spread[i : len(spread) - gap + i] * prime for i, prime in enumerate(_PRIMES))
        hashes_R = hashes[places_T[begins_T]]
        hashes_R ^= hashes_R >> np.uint64(29)
        hashes_R *= _PRIMES[1]
        hashes_R ^= hashes_R >> np.uint64(32)
        hashes_R *= _PRIMES[2]
    result_DxK = np.full((len(sizes_D), SKETCH), _EMPTY, np.uint32)
    slots_R = documents_T[begins_T] * SKETCH + (hashes_R >> np.uint64(60)).astype(np.int64) % SKETCH
    np.minimum.at(result_DxK.reshape(-1), slots_R, (hashes_R >> np.uint64(20)).astype(np.uint32))
    return result_DxK


class Pair(NamedTuple):
    """A held-out document and one of training that is nearly the same: their places in the arrays, and the share."""

    held_out: int
    train: int
    share: float


def near_duplicates(held_out_HxK: np.ndarray, train: Iterable[np.ndarray]) -> list[Pair]:
    """Of each held-out document return the training document that is most like it, where that is `SIMILAR` or more.

    Args:
      train: sketches [D, SKETCH], in parts, of which one is in memory at a time.
    """
    used_HxK = held_out_HxK != _EMPTY
    (common_H, best_H), before = np.zeros((2, len(held_out_HxK)), np.int64), 0
    for part_DxK in train:
        part_KxD = np.ascontiguousarray(part_DxK.T)
        for number, one_K in enumerate(held_out_HxK):
            common_D = np.zeros(part_KxD.shape[1], np.uint8)
            for place in np.flatnonzero(used_HxK[number]):
                common_D += part_KxD[place] == one_K[place]
            if len(common_D) and common_D.max() > common_H[number]:
                common_H[number], best_H[number] = common_D.max(), before + common_D.argmax()
        before += len(part_DxK)
    shares_H = common_H / used_HxK.sum(axis=1)
    return [Pair(int(h), int(best_H[h]), float(shares_H[h])) for h in np.flatnonzero(shares_H >= SIMILAR)]
