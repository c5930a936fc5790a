"""Records, shards and their summaries on disk."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.corpus.store import (
    RECORD_DTYPES,
    Records,
    ShardWriter,
    decode_record,
    encode_records,
    read_json,
    read_summary,
    write_json,
)
from rpt_jax.corpus.tokenization import window_ends
from rpt_jax.errors import UserError


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 5), st.sampled_from(["tokens", "scores"]))
@settings(deadline=None)
def test_records_hold_windows_that_do_not_span_documents(sizes: list[int], max_tokens: int, kind: str) -> None:
    rng, total = np.random.default_rng(sum(sizes)), sum(sizes)
    arrays = [rng.integers(0, 2**16, total).astype(dtype) for dtype in RECORD_DTYPES[kind]]
    ends = window_ends(np.array(sizes), max_tokens)
    found = [decode_record(record, kind) for record in encode_records(7, arrays, ends, kind)]
    windows = [(document, start) for document, size in enumerate(sizes) for start in range(0, size, max_tokens)]
    assert [len(first) for first, _ in found] == [min(max_tokens, sizes[d] - start) for d, start in windows]
    for array, parts in zip(arrays, zip(*found, strict=True), strict=True):
        assert {part.dtype for part in parts} == {array.dtype}
        np.testing.assert_array_equal(np.concatenate(parts), array)


def test_an_altered_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    """After any byte of a file is changed, reading raises an error or gives what was written."""
    rng = np.random.default_rng(0)
    written = [
        (rng.integers(0, 1000, n).astype(np.uint32), rng.integers(0, 9, n).astype(np.uint16)) for n in range(1, 40)
    ]
    with ShardWriter(tmp_path, "tokens", 0, 1) as writer:
        for record in written:
            writer.write(record, [len(record[0])])
        writer.commit({})
    path = tmp_path / "tokens-00000-of-00001.array_record"
    data = path.read_bytes()
    used = len(data.rstrip(b"\0"))
    detected = 0
    for offset in [*range(0, used, 61), *rng.integers(0, used, 40)]:
        changed = bytearray(data)
        changed[offset] ^= 0x11
        path.write_bytes(changed)
        try:
            found = list(Records(tmp_path, "tokens", 1))
        except (UserError, ValueError, RuntimeError):
            detected += 1
        else:
            for ours, theirs in zip(found, written, strict=True):
                assert all(map(np.array_equal, ours, theirs)), offset
    assert detected > 20


def write_scores(directory: Path, shard: int, shards: int, values: list[float]) -> Path:
    """Write records of two tokens with the given entropies, and return their file."""
    with ShardWriter(directory, "scores", shard, shards) as writer:
        for value in values:
            writer.write((np.full(2, value), np.zeros(2)), [2])
        writer.commit({})
    return directory / f"scores-{shard:05d}-of-{shards:05d}.array_record"


def entropies(records: Any) -> list[float]:
    return [float(entropy_S[0]) for entropy_S, _ in records]


def test_a_truncated_file_is_detected_when_it_is_opened(tmp_path: Path) -> None:
    path = write_scores(tmp_path, 0, 1, [0, 1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as raised:
        Records(tmp_path, "scores", 1)
    assert raised.value.field == str(path)


def test_records_of_several_shards_are_numbered_consecutively_and_can_be_pickled(tmp_path: Path) -> None:
    write_scores(tmp_path, 0, 2, [0, 1, 2])
    write_scores(tmp_path, 1, 2, [10, 11, 12])
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        sender.send(Records(tmp_path, "scores", 2))
        assert entropies(receiver.recv()) == [0, 1, 2, 10, 11, 12]
    assert entropies(Records(tmp_path, "scores", 2, [1])) == [10, 11, 12]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no scores-00002-of-00003.json: prepare shard 2/3") as raised:
        Records(tmp_path, "scores", 3, [2])
    assert raised.value.field == str(tmp_path)


def test_swapped_records_are_detected(tmp_path: Path) -> None:
    """Each is valid by itself, but a checksum includes the number of the record."""
    path = write_scores(tmp_path, 0, 1, [1, 2])
    arrays = (np.repeat([1.0, 2.0], 2), np.zeros(4))
    writer = ArrayRecordWriter(str(path), "group_size:1,snappy")
    for record in reversed([*encode_records(0, arrays, [2, 4], "scores")]):
        writer.write(record)
    writer.close()
    summary_path = tmp_path / "scores-00000-of-00001.json"
    write_json(summary_path, read_json(summary_path) | {"bytes": {path.name: path.stat().st_size}})
    with pytest.raises(UserError, match="record 0 is damaged") as raised:
        Records(tmp_path, "scores", 1)[0]
    assert raised.value.field == str(path)


def test_an_unfinished_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "scores", 0, 1) as writer:
        writer.write((np.zeros(1), np.zeros(1)), [1])
        raise KeyboardInterrupt
    assert read_summary(tmp_path, "scores", 0, 1) is None and not list(tmp_path.iterdir())
