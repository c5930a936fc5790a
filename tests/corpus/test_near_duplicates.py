"""MinHash signatures, and the near-duplicates that they find."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.corpus.near_duplicates import minhash_signatures, near_duplicates

SHINGLE = 5
BINS = 16
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def signature_reference(ids: list[int]) -> list[int]:
    """One shingle after the other, with Python's integers. Signatures are stored, so the hash function is fixed."""
    least = [2**32 - 1] * BINS
    for start in range(max(1, len(ids) - SHINGLE + 1)):
        shingle = zip(ids[start : start + SHINGLE], MULTIPLIERS, strict=False)
        value = sum((token + 1) * multiplier for token, multiplier in shingle) % 2**64
        value = (value ^ (value >> 29)) * MULTIPLIERS[1] % 2**64
        value = (value ^ (value >> 32)) * MULTIPLIERS[2] % 2**64
        least[value >> 60] = min(least[value >> 60], (value >> 20) % 2**32)
    return least


@given(st.lists(st.lists(st.integers(0, 2**18), min_size=1, max_size=40), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_signatures_of_a_batch_are_those_of_each_document_alone(documents: list[list[int]]) -> None:
    ids_T, sizes_D = np.concatenate(documents).astype(np.uint32), np.array([len(ids) for ids in documents])
    assert minhash_signatures(ids_T, sizes_D).tolist() == [signature_reference(ids) for ids in documents]


def test_near_duplicates_are_found_and_other_documents_are_not() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, 300) for _ in range(50)]
    train = minhash_signatures(np.concatenate(documents), np.full(50, 300))
    edited = documents[7].copy()
    edited[150] += 1
    held_out_documents = [edited, rng.integers(0, 1000, 300), documents[9], np.array([3])]
    sizes_H = np.array([len(ids) for ids in held_out_documents])
    held_out = minhash_signatures(np.concatenate(held_out_documents), sizes_H)
    for blocks in ([train], [train[:8], train[8:8], train[8:]]):
        pairs = near_duplicates(held_out, blocks)
        assert [(pair.held_out, pair.train) for pair in pairs] == [(0, 7), (2, 9)]
        assert 0.75 <= pairs[0].similarity <= pairs[1].similarity == 1
    assert near_duplicates(held_out, [train[:0]]) == near_duplicates(held_out, []) == []
