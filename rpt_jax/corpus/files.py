"""Find the files of a corpus and divide them into ranges that can be read independently."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import DataConfig
from rpt_jax.errors import UserError

# Uncompressed text files are read in ranges of about this size, in parallel. A chunk of a .txt never crosses a range.
RANGE_BYTES = 4 * 2**20
_RANGE_RECORDS = 10_000
_FORMATS = (".txt", ".jsonl", ".parquet", ".arrow", ".array_record")
_EXPECTED = "a .txt, .jsonl (also .gz or .zst), .parquet, .arrow or .array_record file, a folder of them, or a glob"
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?)=(.+)")


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


def parse_mixture(path: str) -> list[tuple[float, str]]:
    """Parse `data.path`: a path or glob, or several separated by commas, all with or all without a weight (`weight=path`).

    Returns: (weight, path) of each part; the weight is 0 if none is given. Raises: UserError.
    """
    if not path.strip():
        raise UserError(f"data.path is empty: data.source='path' needs {_EXPECTED}.", field="data.path")
    if Path(path).exists():  # The name of a file may contain "," and "=".
        return [(0.0, path)]
    parts = []
    for part in path.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        parts.append((float(match[1]), match[2]) if match else (0.0, part.strip()))
    weighted = sum(weight > 0 for weight, _ in parts)
    if weighted not in (0, len(parts)):
        raise UserError(
            f"data.path='{path}': give every part of a mixture a weight above 0 (0.7=a,0.3=b), or none.",
            field="data.path",
        )
    return parts


def find_file_ranges(config: DataConfig) -> list[FileRange]:
    """List the file ranges of the corpus in order, without reading any documents.

    Raises: UserError, if a path does not exist, matches no readable file or cannot be opened.
    """
    mixture = parse_mixture(config.path)
    file_ranges = []
    for mixture_part, (_, pattern) in enumerate(mixture):
        in_folder = len(mixture) == 1 and Path(pattern).is_dir()
        for path in _find_files(pattern, is_mixture=len(mixture) > 1):
            if in_folder:
                name = path.relative_to(pattern).as_posix()
            else:
                name = path.name if str(path) == config.path else path.as_posix()
            try:
                limits = list(_range_limits(path))
            except Exception as error:  # noqa: BLE001 - pyarrow and array_record raise exceptions of many classes.
                raise read_error(path, 1, error) from error
            file_ranges += [
                FileRange(path=path, name=name, mixture_part=mixture_part, start=start, stop=stop)
                for start, stop in limits
            ]
    return file_ranges


def _find_files(pattern: str, is_mixture: bool) -> list[Path]:
    root = Path(pattern)
    where = f"data.path: part '{pattern}' of the mixture" if is_mixture else f"data.path='{pattern}'"
    if root.is_dir():
        found = _readable(path for path in root.rglob("*") if path.is_file())
        problem = f"{where} is a folder without any readable file: give {_EXPECTED}."
    elif root.exists():
        found = _readable([root])
        problem = f"{where} has an unknown file ending, neither .txt nor .jsonl: give {_EXPECTED}."
    else:
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        if not matches:
            raise UserError(f"{where} does not exist. Give {_EXPECTED}.", field="data.path")
        nested = [_find_files(str(match), is_mixture) if match.is_dir() else _readable([match]) for match in matches]
        # `**` matches a folder and also the files in it.
        found = list(dict.fromkeys(path for paths in nested for path in paths))
        problem = f"{where} matches no readable file: give {_EXPECTED}."
    if not found:
        raise UserError(problem, field="data.path")
    return found


def _readable(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if file_format(path) in _FORMATS and not _is_dataset_cache(path))


def _is_dataset_cache(path: Path) -> bool:
    """Return whether an .arrow file is a cache in a folder that the `datasets` library saved, not one of its data files."""
    state = path.with_name("state.json")
    if file_format(path) != ".arrow" or not state.is_file():
        return False
    try:
        return path.name not in {file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise read_error(state, 1, error) from error


def file_format(path: Path) -> str:
    """Return the lower-case ending that names the format, such as ".jsonl" for "a.jsonl.gz"; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] in ([".gz"], [".zst"]):
        return suffixes[-2] if suffixes[-2:-1] in ([".txt"], [".jsonl"]) else ""
    return suffixes[-1] if suffixes else ""


def _range_limits(path: Path) -> Iterator[tuple[int, int]]:
    """Yield `start` and `stop` of the ranges of a file, see `FileRange`."""
    ending = file_format(path)
    is_compressed = path.suffix.lower() != ending
    if ending == ".parquet":
        import pyarrow.parquet

        yield from ((group, group + 1) for group in range(pyarrow.parquet.ParquetFile(path).num_row_groups))
    elif ending == ".array_record":
        count = open_array_record(path).num_records()
        yield from ((start, min(start + _RANGE_RECORDS, count)) for start in range(0, count, _RANGE_RECORDS))
    elif ending == ".arrow" or is_compressed:
        yield 0, -1
    else:
        size = path.stat().st_size
        yield from ((start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES))


def read_error(path: Path, line: int, error: Exception) -> UserError:
    """Return the `UserError` for a file that cannot be read beyond `line`."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"data.path: cannot read {path}:{line}: {reason[:300]}. Repair the file or remove it from the corpus.",
        field="data.path",
    )


def open_array_record(path: Path) -> Any:
    """Return an `ArrayRecordReader`. Raises: ValueError, if the file has no records."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.num_records():
        raise ValueError("it has no records, or was truncated")
    return reader
