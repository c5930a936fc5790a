"""Held-out documents that a training document contains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.corpus.near_duplicates import Sketches, contained_share, find_candidates, make_sketches

MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def runs(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + 5]) for start in range(max(1, len(ids) - 4))}


def sketch_reference(ids: list[int]) -> list[int]:
    """One run after the other, with Python's integers. Sketches are stored, so the hash function is fixed."""
    sketch = set()
    for run in runs(ids):
        value = sum((token + 1) * multiplier for token, multiplier in zip(run, MULTIPLIERS, strict=False)) % 2**64
        value = (value ^ (value >> 29)) * MULTIPLIERS[1] % 2**64
        value = (value ^ (value >> 32)) * MULTIPLIERS[2] % 2**64
        if value < 2**61:
            sketch.add((value >> 29) % 2**32)
    return sorted(sketch)


def sketch(documents: list[np.ndarray]) -> Sketches:
    return make_sketches(np.concatenate(documents), np.array([len(ids) for ids in documents]))


@given(st.lists(st.lists(st.integers(0, 2**18), min_size=1, max_size=60), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_sketches_of_a_batch_are_those_of_each_document_alone(documents: list[list[int]]) -> None:
    sketches = sketch([np.array(ids, np.uint32) for ids in documents])
    found = np.split(sketches.hashes, np.cumsum(sketches.counts_D)[:-1])
    assert [hashes.tolist() for hashes in found] == [sketch_reference(ids) for ids in documents]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), min_size=1, max_size=40))
@settings(deadline=None)
def test_the_contained_share_is_that_of_the_distinct_runs(ids: list[int], container: list[int]) -> None:
    share = len(runs(ids) & runs(container)) / len(runs(ids))
    assert contained_share(np.array(ids), np.array(container)) == pytest.approx(share)


@pytest.mark.parametrize("ends", [[50], [8, 8, 50]], ids=["one shard", "three shards"])
def test_a_contained_document_is_found_in_a_much_longer_one(ends: list[int]) -> None:
    """The estimate of MinHash for a half of a document is 0.5, and for a tenth 0.1."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, 3000 if i % 2 else 300) for i in range(50)]
    parts = [sketch(documents[start:end]) for start, end in zip([0, *ends], ends, strict=False) if end > start]
    edited = documents[7][:300].copy()
    edited[150] += 1
    held_out = [documents[8][:150], rng.integers(0, 1000, 300), documents[9][1000:1200], np.array([3]), edited]
    assert find_candidates(sketch(held_out), parts) == [(0, 8), (2, 9), (4, 7)]


def test_without_documents_there_are_no_candidates() -> None:
    some = sketch([np.arange(300)])
    none = Sketches(some.hashes[:0], some.counts_D[:0])
    assert find_candidates(some, [none]) == find_candidates(none, [some]) == find_candidates(some, []) == []
