"""Documents that say nearly the same, found by sketches of a few bytes each (min-wise hashing; Broder 1997)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rpt_jax.data.shards import SKETCH

SIMILAR = 0.75  # Share of a sketch that two documents must have in common.
_SHINGLE = 5  # Tokens.
_EMPTY = 0xFFFFFFFF
_PRIMES = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)


def sketch(ids: np.ndarray) -> np.ndarray:
    """Return uint32 [SKETCH] of a document's token ids.

    Two sketches agree in a place with about the probability of the share of runs of five tokens that the documents have in
    common (Jaccard). Every run falls into one of the places, and a place keeps its least hash (one permutation hashing;
    Li, Owen and Zhang 2012).
    """
    ids = np.asarray(ids, np.uint64)
    count = max(1, len(ids) - _SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i, prime in enumerate(_PRIMES):
            part = ids[i : i + count]
            hashes[: len(part)] += (part + np.uint64(1)) * prime
        hashes ^= hashes >> np.uint64(29)
        hashes *= _PRIMES[1]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _PRIMES[2]
    result = np.full(SKETCH, _EMPTY, np.uint32)
    places = (hashes >> np.uint64(60)).astype(np.int64) % SKETCH
    np.minimum.at(result, places, ((hashes >> np.uint64(20)) & np.uint64(_EMPTY)).astype(np.uint32))
    return result


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
