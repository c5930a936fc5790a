"""Find the files of a corpus and divide them into ranges that can be read independently."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import DataConfig
from rpt_jax.corpus.folders import DANGLING_LINK, file_format, is_compressed, read_error, walk_matches
from rpt_jax.corpus.json_files import has_a_record_per_line
from rpt_jax.corpus.mixture import configs_of_parts, parse_mixture
from rpt_jax.corpus.records import check_fields
from rpt_jax.errors import UserError
from rpt_jax.infra.storage import with_urls

logger = logging.getLogger(__name__)

# Uncompressed text files are read in ranges of about this size, in parallel. A chunk of a .txt never crosses a range.
RANGE_BYTES = 4 * 2**20
_RANGE_RECORDS = 10_000
_RECORD_FILES = (
    ".jsonl, .json, .csv or .tsv file (also .gz, .zst, .xz or .bz2), a .parquet, .arrow or .array_record file, a folder of them, "
    "or a glob"
)


class FileRange(NamedTuple):
    """A range of a file that can be read independently.

    Attributes:
      path: the file.
      name: how document names and messages refer to it.
      mixture_part: index of the part of the mixture in `data.path` that it belongs to.
      start, stop: bytes of a text file, row groups of a .parquet, or records of an .array_record; `stop` is -1 for a whole
        file that can only be read from the beginning.
    """

    path: Path
    name: str
    mixture_part: int
    start: int
    stop: int


def find_file_ranges(config: DataConfig) -> list[FileRange]:
    """List the file ranges of the corpus in order, without reading any documents, and log which files are not read.

    Raises: UserError, if a path does not exist, matches no readable file or cannot be opened, or if a field does not have one
      value for each part of a mixture.
    """
    return list_file_ranges([pattern for _, pattern in _checked_mixture(config)], config.path, "data.path")


def list_file_ranges(patterns: Sequence[str], value: str, field: str) -> list[FileRange]:
    """List the file ranges of some paths in order, without reading them, and log which files are not read.

    Args:
      patterns: files, folders or globs; a range's `mixture_part` is an index of them.
      value: the config value that they are from.
      field: the config field that has it, for messages.

    Raises: UserError, if a path does not exist, matches no readable file or cannot be opened.
    """
    file_ranges = []
    unread: dict[str, list[Path]] = {}
    for mixture_part, pattern in enumerate(patterns):
        in_folder = len(patterns) == 1 and os.path.isdir(pattern)
        for path in _find_files(pattern, unread, len(patterns) > 1, field):
            if in_folder:
                name = path.relative_to(pattern).as_posix()
            else:
                name = path.name if str(path) == value else with_urls(path.as_posix())
            try:
                limits = list(_range_limits(path))
            except Exception as error:  # noqa: BLE001 - pyarrow and array_record raise exceptions of many classes.
                raise read_error(path, 1, error, field) from error
            file_ranges += [
                FileRange(path=path, name=name, mixture_part=mixture_part, start=start, stop=stop)
                for start, stop in limits
            ]
    _log_unread(unread, field)
    return file_ranges


def check_path(config: DataConfig) -> None:
    """Check that every part of `data.path` has a file to read, without listing all of them. Raises: UserError."""
    check_patterns([pattern for _, pattern in _checked_mixture(config)], "data.path")


def check_patterns(patterns: Sequence[str], field: str) -> None:
    """Check that every path, given by the config field `field`, has a file to read. Raises: UserError."""
    for pattern in patterns:
        if not any(not reason for _, reason in walk_matches(pattern, field)):
            _find_files(pattern, {}, len(patterns) > 1, field)


def _checked_mixture(config: DataConfig) -> list[tuple[float, str]]:
    """Return the parts of `data.path`, and check the fields that say what their documents are. Raises: UserError."""
    for part in configs_of_parts(config):
        check_fields(part)
    return parse_mixture(config.path)


def _find_files(pattern: str, unread: dict[str, list[Path]], is_mixture: bool, field: str) -> list[Path]:
    """Return the files to read for a part of `field`, and add the others to `unread`, by reason. Raises: UserError."""
    # A glob with `**` matches a folder and also the files in it.
    candidates = dict(walk_matches(pattern, field))
    found = sorted(path for path, reason in candidates.items() if not reason)
    for path, reason in candidates.items():
        if reason:
            unread.setdefault(reason, []).append(path)
    if found:
        return found

    where = f"{field}: part '{pattern}' of the mixture" if is_mixture else f"{field}='{pattern}'"
    reasons = f" Not read: {describe_unread(unread)}." if candidates else ""
    if not candidates and not os.path.isdir(pattern):
        problem = "does not exist"
    elif os.path.isdir(pattern):
        problem = "is a folder without any readable file"
    else:
        problem = "matches no readable file"
    expected = f"a .txt, {_RECORD_FILES}" if field == "data.path" else f"a {_RECORD_FILES}"
    raise UserError(f"{where} {problem}: give {expected}.{reasons}", field=field)


def describe_unread(unread: dict[str, list[Path]]) -> str:
    """Return a list of files that are not read: a count and an example for each reason."""
    return "; ".join(
        f"{reason}: {len(paths):,} (such as {min(paths)})"
        for reason, paths in sorted(unread.items(), key=lambda u: -len(u[1]))
    )


def _log_unread(unread: dict[str, list[Path]], field: str) -> None:
    if dangling := unread.pop(DANGLING_LINK, []):
        logger.warning("%s: broken links are not read: %s", field, ", ".join(map(str, sorted(dangling))))
    if unread:
        logger.info("Not read of %s: %s.", field, describe_unread(unread))


def _range_limits(path: Path) -> Iterator[tuple[int, int]]:
    """Yield `start` and `stop` of the ranges of a file, see `FileRange`."""
    ending = file_format(path)
    if ending == ".parquet":
        import pyarrow.parquet

        yield from ((group, group + 1) for group in range(pyarrow.parquet.ParquetFile(path).num_row_groups))
    elif ending == ".array_record":
        count = open_array_record(path).num_records()
        yield from ((start, min(start + _RANGE_RECORDS, count)) for start in range(0, count, _RANGE_RECORDS))
    elif is_compressed(path) or ending in (".arrow", ".csv", ".tsv"):
        yield 0, -1
    elif ending == ".json" and not has_a_record_per_line(path):
        yield 0, -1
    else:
        size = path.stat().st_size
        yield from ((start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES))


def open_array_record(path: Path) -> Any:
    """Return an `ArrayRecordReader`. Raises: ValueError, if the file has no records."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.num_records():
        raise ValueError("it has no records, or was truncated")
    return reader
