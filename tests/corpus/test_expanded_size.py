"""The size of a corpus' text, estimated without reading all of it."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from rpt_jax.config import DataConfig
from rpt_jax.corpus.expanded_size import expanded_bytes
from rpt_jax.corpus.files import find_file_ranges
from tests.helpers.corpora import json_lines, write_array_record

RNG = np.random.default_rng(0)
RECORDS = [{"text": " ".join(map(str, RNG.integers(0, 10**5, 200))), "id": str(i)} for i in range(1_500)]
TEXT_BYTES = sum(len(record["text"]) for record in RECORDS)
COMPRESSIONS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": zstd.compress,
}


def estimate(path: Path, **fields: str) -> int:
    config = DataConfig(source="path", path=str(path), **fields)
    return expanded_bytes(find_file_ranges(config), config)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_text_counts_as_large_as_it_is(tmp_path: Path, compression: str) -> None:
    lines = json_lines(RECORDS)
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESSIONS[compression](lines))
    assert path.stat().st_size < len(lines) / 2
    assert estimate(path) == pytest.approx(len(lines), rel=0.1)


def test_other_files_of_a_format_count_like_those_that_are_sampled(tmp_path: Path) -> None:
    lines = json_lines(RECORDS[:50])
    for number in range(20):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "plain.jsonl").write_bytes(lines)
    assert estimate(tmp_path) == pytest.approx(21 * len(lines), rel=0.01)


def test_a_parquet_file_counts_the_columns_that_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [record["text"] for record in RECORDS], "image": [b"x" * 9_000] * len(RECORDS)})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < TEXT_BYTES / 2
    assert estimate(path) == pytest.approx(TEXT_BYTES, rel=0.01)


def test_an_array_record_counts_its_records(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_array_record(path, RECORDS)
    assert estimate(path) == pytest.approx(TEXT_BYTES, rel=0.1)


def test_a_damaged_file_counts_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"not gzip")
    assert estimate(path) == 8
