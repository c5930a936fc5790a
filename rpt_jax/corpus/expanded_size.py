"""How large the text of a corpus is, estimated from samples of its files: most formats are compressed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from rpt_jax.config import DataConfig
from rpt_jax.corpus.compression import DecompressedFile
from rpt_jax.corpus.files import FileRange, open_array_record
from rpt_jax.corpus.folders import file_format, is_compressed
from rpt_jax.corpus.mixture import configs_of_parts
from rpt_jax.corpus.records import document_parser

_SAMPLED_FILES = 8  # Of each format and part of a mixture.
_SAMPLED_BYTES = 2**20
_SAMPLED_RECORDS = 100


def expanded_bytes(file_ranges: Iterable[FileRange], config: DataConfig) -> int:
    """Return about how many bytes the records of a corpus have when they are decompressed.

    Args:
      file_ranges: of the corpus; those of a file count once.
      config: section `data`, which names the columns of a .parquet that are read.
    """
    parts = {file_range.path: file_range.mixture_part for file_range in file_ranges}
    configs = configs_of_parts(config)
    of_format: dict[tuple[int, str], list[Path]] = {}
    for path, part in parts.items():
        of_format.setdefault((part, path.suffix.lower()), []).append(path)
    total = 0.0
    for (part, _), files in of_format.items():
        sampled = files[:: -(-len(files) // _SAMPLED_FILES)]
        expanded = sum(_expanded_bytes(path, configs[part]) for path in sampled)
        total += expanded * _size(files) / _size(sampled)
    return round(total)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _expanded_bytes(path: Path, config: DataConfig) -> float:
    """Return the estimate for one file; its own size if it cannot be read, which is reported when its records are."""
    size = path.stat().st_size
    with contextlib.suppress(Exception):  # The libraries of the formats raise exceptions of many classes.
        if is_compressed(path):
            return size * _expansion(path)
        if file_format(path) == ".parquet":
            return _parquet_bytes(path, config)
        if file_format(path) == ".array_record":
            return _array_record_bytes(path)
    return size


def _expansion(path: Path) -> float:
    """Return the decompressed bytes per compressed byte at the beginning of a file."""
    with DecompressedFile(path) as file:
        while file.produced_bytes < _SAMPLED_BYTES and file.read(2**16):
            pass
        return file.produced_bytes / file.consumed_bytes


def _parquet_bytes(path: Path, config: DataConfig) -> int:
    """Return the bytes of the columns that are read, which the footer gives."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        read = tuple(f"{name}." for name in document_parser(config).columns(file.schema_arrow.names))
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(read))


def _array_record_bytes(path: Path) -> float:
    reader = open_array_record(path)
    count = reader.num_records()
    records = reader.read(0, min(count, _SAMPLED_RECORDS))
    return count * sum(map(len, records)) / len(records)
