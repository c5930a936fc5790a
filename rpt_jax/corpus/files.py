"""Which files a corpus is made of, and the parts of them that can be read by themselves."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import DataConfig
from rpt_jax.errors import UserError

# Text files are read in parts of about so many bytes, each by whoever has time for it; pieces of a .txt end with it.
UNIT_BYTES = 4 * 2**20
_UNIT_RECORDS = 10_000
_KINDS = "a .txt, .jsonl (also .gz or .zst), .parquet, .arrow or .array_record file, a folder of them, or a glob"
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?)=(.+)")
_ENDINGS = (".txt", ".jsonl", ".parquet", ".arrow", ".array_record")


class FileRange(NamedTuple):
    """A part of a file that can be read by itself: bytes of a text file, a row group, records."""

    path: Path
    name: str
    part: int
    start: int
    stop: int  # -1: to the end.


def parse_mixture(path: str) -> list[tuple[float, str]]:
    """Read `data.path`: one path or glob, or several with commas between them, all or none as `weight=path`.

    Returns: of each its weight (0 without one) and its path. Raises: UserError.
    """
    if not path.strip():
        raise UserError(f"data.path is empty: data.source='path' needs {_KINDS}.")
    if Path(path).exists():  # Whatever characters its name has.
        return [(0.0, path)]
    parts = []
    for part in path.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        parts.append((float(match[1]), match[2]) if match else (0.0, part.strip()))
    weighted = sum(weight > 0 for weight, _ in parts)
    if weighted not in (0, len(parts)):
        raise UserError(f"data.path='{path}': give every part of a mixture a weight above 0 (0.7=a,0.3=b), or none.")
    return parts


def find_units(config: DataConfig) -> list[FileRange]:
    """List what is to be read, in order, from names and sizes alone. Raises: UserError, where nothing is there."""
    mixture, units = parse_mixture(config.path), []
    for part, (_, pattern) in enumerate(mixture):
        for path in _files(pattern, whole=len(mixture) == 1):
            inside = len(mixture) == 1 and Path(pattern).is_dir()
            name = path.relative_to(pattern).as_posix() if inside else path.name
            name = name if inside or str(path) == config.path else path.as_posix()
            try:
                ranges = list(_ranges(path))
            except Exception as error:  # noqa: BLE001 - pyarrow and array_record raise whatever they like.
                raise unreadable(path, 1, error) from error
            units += [FileRange(path, name, part, start, stop) for start, stop in ranges]
    return units


def _files(pattern: str, whole: bool) -> list[Path]:
    root = Path(pattern)
    where = f"data.path='{pattern}'" if whole else f"data.path: its part '{pattern}'"
    if root.is_dir():
        found = _readable(path for path in root.rglob("*") if path.is_file())
        if not found:
            raise UserError(f"{where} is a folder without any file that can be read in it: give {_KINDS}.")
    elif root.exists():
        if not (found := _readable([root])):
            raise UserError(
                f"{where} cannot be read: its ending says that it is neither a .txt nor a .jsonl; give {_KINDS}."
            )
    else:
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        if not matches:
            raise UserError(f"{where} does not exist. Give {_KINDS}.")
        lists = [_files(str(match), whole) if match.is_dir() else _readable([match]) for match in matches]
        found = list(
            dict.fromkeys(path for paths in lists for path in paths)
        )  # `**` matches a folder and what is in it.
        if not found:
            raise UserError(f"{where} matches nothing that can be read: give {_KINDS}.")
    return found


def _readable(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if kind_of(path) in _ENDINGS and _belongs(path))


def _belongs(path: Path) -> bool:
    """Whether an .arrow file is data of the folder that `datasets` saved, and not one of the caches that it leaves there."""
    state = path.with_name("state.json")
    if kind_of(path) != ".arrow" or not state.is_file():
        return True
    try:
        return path.name in {file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(state, 1, error) from error


def kind_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] in ([".gz"], [".zst"]):
        return suffixes[-2] if suffixes[-2:-1] in ([".txt"], [".jsonl"]) else ""
    return suffixes[-1] if suffixes else ""


def _ranges(path: Path) -> Iterator[tuple[int, int]]:
    kind = kind_of(path)
    if kind == ".parquet":
        import pyarrow.parquet

        yield from ((group, group + 1) for group in range(pyarrow.parquet.ParquetFile(path).num_row_groups))
    elif kind == ".array_record":
        count = open_records(path).num_records()
        yield from ((start, min(start + _UNIT_RECORDS, count)) for start in range(0, count, _UNIT_RECORDS))
    elif path.suffix.lower() == kind and kind != ".arrow":
        size = path.stat().st_size
        yield from ((start, min(start + UNIT_BYTES, size)) for start in range(0, size, UNIT_BYTES))
    else:  # What is compressed can only be read from its beginning.
        yield 0, -1


def unreadable(path: Path, line: int, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"data.path: cannot read {path}:{line}: {reason[:300]}. Mend the file or take it out of the corpus."
    )


def open_records(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.num_records():
        raise ValueError("it has no records, or was cut short")
    return reader
