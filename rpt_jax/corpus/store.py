"""On-disk format of a prepared corpus: shards of token ids and of entropies, and a manifest.

Files of shard 3 of 64, in the order in which they are written:

    tokens-00003-of-00064.array_record  a record of token ids and byte lengths for every window
    index-00003-of-00064.bin            a row of `INDEX` for every document
    sketches-00003-of-00064.bin         hashes of some five-token runs of every document, 32 bits each
    names-00003-of-00064.txt            the name of every document, a JSON string a line
    tokens-00003-of-00064.json          summary: what the shard was made from, counts, sizes and checksums of its files
    scores-00003-of-00064.array_record  a record of entropies for every window
    scores-00003-of-00064.json          its summary

A shard is complete once its summary exists, the corpus once `manifest.json` does. A record has a CRC-32 of its number and
content, and the summaries hold those of the other files, so that damaged and swapped data are detected.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

FORMAT = 6  # Of all files of a prepared corpus; corpora of another format are refused.
MANIFEST = "manifest.json"
INDEX = np.dtype(
    [
        ("text_hash", "<u8"),  # See sources.document_hashes.
        ("key_hash", "<u8"),
        ("place", "<i8"),  # See documents.Document.
        ("tokens", "<u4"),
        ("split", "i1"),  # As the source assigned it, see documents.Document.
        ("mixture_part", "<u2"),
        ("sketch", "<u4"),  # Number of hashes of the document, see near_duplicates.Sketches.
    ]
)
SKETCH = np.dtype("<u4")
# The arrays of a record, each with an element for every token of its window: "tokens" are ids and lengths in bytes,
# "scores" are entropies, renormalized and not.
RECORD_DTYPES = {"tokens": ("<u4", "<u2"), "scores": ("<f4", "<f4")}
_CHECKSUM_BYTES = 4


def shard_name(kind: str, shard: int, shards: int) -> str:
    """Return the file name of a shard without its ending, such as "tokens-00003-of-00064"."""
    return f"{kind}-{shard:05d}-of-{shards:05d}"


# --- records ------------------------------------------------------------------------------------------


def encode_records(first: int, arrays: Sequence[np.ndarray], ends: Sequence[int], kind: str) -> Iterator[bytes]:
    """Yield one record for each window of concatenated arrays.

    A record is a checksum of 4 bytes, then the arrays, byte-shuffled: all lowest bytes of an array, then all second bytes, and
    so on. Bytes of the same significance compress better together.

    Args:
      first: number of the first record in its shard, which its checksum includes.
      arrays: [T] each, of the dtypes in `RECORD_DTYPES[kind]`.
      ends: where the windows end, in order, the last one at T.
    """
    typed = [np.ascontiguousarray(a, dtype) for a, dtype in zip(arrays, RECORD_DTYPES[kind], strict=True)]
    planes = [memoryview(plane.tobytes()) for a in typed for plane in a.view(np.uint8).reshape(-1, a.itemsize).T]
    start = 0
    for number, end in enumerate(ends, start=first):
        data = b"".join([plane[start:end] for plane in planes])
        yield _checksum(number, data) + data
        start = end


def decode_record(record: bytes, kind: str) -> tuple[np.ndarray, ...]:
    """Return the arrays of a record, [S] each, of the dtypes in `RECORD_DTYPES[kind]`. The checksum is not verified."""
    dtypes = [np.dtype(dtype) for dtype in RECORD_DTYPES[kind]]
    tokens = (len(record) - _CHECKSUM_BYTES) // sum(dtype.itemsize for dtype in dtypes)
    arrays = []
    offset = _CHECKSUM_BYTES
    for dtype in dtypes:
        planes = np.frombuffer(record, np.uint8, tokens * dtype.itemsize, offset).reshape(dtype.itemsize, tokens)
        arrays.append(np.ascontiguousarray(planes.T).reshape(-1).view(dtype))
        offset += tokens * dtype.itemsize
    return tuple(arrays)


def _checksum(number: int, data: bytes) -> bytes:
    return zlib.crc32(data, number & 0xFFFFFFFF).to_bytes(_CHECKSUM_BYTES, "little")


class ShardWriter:
    """Writes the records of one kind of a shard; they only become part of the corpus with `commit`.

    A context manager that deletes the records on exit unless they were committed.

    Args:
      kind: key of `RECORD_DTYPES`.
      shard, shards: number of the shard, and how many there are.

    Attributes:
      records: number of records written so far.
    """

    def __init__(self, directory: Path, kind: str, shard: int, shards: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.records = 0
        self._kind = kind
        self._base = directory / shard_name(kind, shard, shards)
        self._path = self._base.with_name(f"{self._base.name}.array_record")
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        # One record a group, because prompts read records in random order and a whole group is decompressed for each.
        self._writer = ArrayRecordWriter(str(self._partial), "group_size:1,snappy")
        self._is_open = True

    def write(self, arrays: Sequence[np.ndarray], ends: Sequence[int]) -> None:
        """Write one record for each window of concatenated arrays, see `encode_records`."""
        for record in encode_records(self.records, arrays, ends, self._kind):
            self._writer.write(record)
        self.records += len(ends)

    def commit(self, summary: Mapping[str, Any], others: Sequence[Path] = ()) -> None:
        """Complete the shard.

        Args:
          summary: JSON values that are stored in the shard's summary, with the sizes and checksums of its files.
          others: further files of the shard.
        """
        self._writer.close()
        self._is_open = False
        self._partial.replace(self._path)
        sizes = {path.name: path.stat().st_size for path in (self._path, *others)}
        checksums = {path.name: zlib.crc32(path.read_bytes()) for path in others}
        content = {**summary, "records": self.records, "bytes": sizes, "checksums": checksums}
        write_json(self._base.with_name(f"{self._base.name}.json"), content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            with contextlib.suppress(Exception):
                self._writer.close()
            self._partial.unlink(missing_ok=True)


class Records(Sequence):
    """The records of one kind, of all shards or some, numbered consecutively: `records[i]` is a tuple of arrays.

    Can be pickled.

    Args:
      kind: key of `RECORD_DTYPES`.
      shards: number of shards of the corpus.
      only: the shards to open; None = all.

    Raises: UserError, if a file is missing or truncated; reading raises it if a record is damaged.
    """

    def __init__(self, directory: Path, kind: str, shards: int, only: Sequence[int] | None = None):
        # Importing grain imports JAX, which the processes that tokenize do not need.
        import grain

        self._directory = directory
        self._kind = kind
        self._shards = shards
        self._numbers = list(range(shards) if only is None else only)
        counts = []
        for shard in self._numbers:
            summary = read_summary(directory, kind, shard, shards)
            if summary is None:
                raise UserError(
                    f"{directory} has no {shard_name(kind, shard, shards)}.json: prepare shard {shard}/{shards}.",
                    field=str(directory),
                )
            counts.append(summary["records"])

        # Number the records consecutively over the shards, and compare with what the files contain.
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # A file without records cannot be opened.
        paths = [self._path(shard) for shard, count in zip(self._numbers, counts, strict=True) if count]
        try:
            # Any, because the declared type lacks `__getitems__` and `__len__`.
            self._source: Any = grain.sources.ArrayRecordDataSource([str(path) for path in paths]) if paths else ()
        except Exception as error:  # noqa: BLE001 - of the library's C++ reader.
            raise UserError(
                f"{directory}: cannot open the records of {kind} ({_one_line(error)}). Prepare the corpus again.",
                field=str(directory),
            ) from None
        if len(self._source) != len(self):
            raise UserError(
                f"{directory}: found {len(self._source)} records of {kind}, expected {len(self)}. Prepare the corpus again.",
                field=str(directory),
            )

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard_name(self._kind, shard, self._shards)}.array_record"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        return self.read([range(len(self))[number]])[0]

    def read(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """Read several records at once, which is about three times as fast as one by one."""
        try:
            if len(numbers) > 1:
                found = self._source.__getitems__(numbers)
            else:
                # `__getitems__` starts threads, which is slower than reading one record.
                found = [self._source[number] for number in numbers]
        except Exception as error:  # noqa: BLE001 - of the library's C++ reader.
            if len(numbers) > 1:
                # Find out which record it is.
                return [self.read([number])[0] for number in numbers]
            raise self._damaged_record(numbers[0], f": {_one_line(error)}") from None
        for number, record in zip(numbers, found, strict=True):
            _, number_in_shard = self._locate(number)
            if _checksum(number_in_shard, record[_CHECKSUM_BYTES:]) != record[:_CHECKSUM_BYTES]:
                raise self._damaged_record(number)
        return [decode_record(record, self._kind) for record in found]

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the shard of a record and its number there."""
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._numbers[index], number - int(self._starts[index])

    def _damaged_record(self, number: int, reason: str = "") -> UserError:
        shard, number_in_shard = self._locate(number)
        return UserError(
            f"{self._path(shard)}: record {number_in_shard} is damaged (its checksum does not match{reason}). Delete "
            f"{shard_name(self._kind, shard, self._shards)}.json and prepare again: only this shard is prepared again.",
            field=str(self._path(shard)),
        )


# --- summaries, manifest and index --------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: UserError."""
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, TypeError, ValueError) as error:
        raise _damaged_file(path, str(error)) from None


def read_summary(directory: Path, kind: str, shard: int, shards: int) -> dict[str, Any] | None:
    """Return the summary of a shard, or None if it is not complete.

    Raises: UserError, if the summary is damaged or a file of the shard is missing or truncated.
    """
    path = directory / f"{shard_name(kind, shard, shards)}.json"
    if not path.exists():
        return None
    summary = read_json(path)
    try:
        for name, size in summary["bytes"].items():
            file = directory / name
            found = f"{file.stat().st_size} bytes" if file.exists() else "no file"
            if found != f"{size} bytes":
                raise UserError(
                    f"{file} is damaged: found {found}, expected {size} bytes. Delete {path} and prepare again: only this shard "
                    "is prepared again.",
                    field=str(file),
                )
        return {**summary, "records": int(summary["records"])}
    except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        raise _damaged_file(path, f"{error!r}") from None


def read_summaries(directory: Path, kind: str, shards: int) -> list[dict[str, Any]] | None:
    """Return the summaries of all shards, or None if one is not complete. Raises: UserError, as `read_summary` does."""
    summaries = []
    for shard in range(shards):
        summary = read_summary(directory, kind, shard, shards)
        if summary is None:
            return None
        summaries.append(summary)
    return summaries


def read_index(directory: Path, shards: int, only: Iterable[int] | None = None) -> Iterator[np.ndarray]:
    """Yield the index of each shard, or of those in `only`: a row for every document, `INDEX` [D].

    Raises: UserError, if a file is missing or damaged.
    """
    for shard in range(shards) if only is None else only:
        yield np.frombuffer(_read_checked(directory, "index", ".bin", shard, shards), INDEX)


def read_sketches(directory: Path, shards: int) -> Iterator[np.ndarray]:
    """Yield the hashes of the sketches of each shard, uint32. Raises: UserError, as `read_index` does."""
    for shard in range(shards):
        yield np.frombuffer(_read_checked(directory, "sketches", ".bin", shard, shards), SKETCH)


def document_names(directory: Path, shards: int, numbers: Iterable[int]) -> dict[int, str]:
    """Return the names of documents by their number in the corpus. Raises: UserError, as `read_index` does."""
    wanted = sorted(set(numbers))
    names: dict[int, str] = {}
    documents_before = 0
    for shard in range(shards):
        lines = _read_checked(directory, "names", ".txt", shard, shards).splitlines()
        for number in wanted:
            if documents_before <= number < documents_before + len(lines):
                names[number] = json.loads(lines[number - documents_before])
        documents_before += len(lines)
    return names


def _read_checked(directory: Path, kind: str, ending: str, shard: int, shards: int) -> bytes:
    """Read a file whose checksum is in the shard's summary. Raises: UserError."""
    path = directory / f"{shard_name(kind, shard, shards)}{ending}"
    reason = "its checksum does not match"
    summary = read_summary(directory, "tokens", shard, shards) or {}
    try:
        data = path.read_bytes()
        if zlib.crc32(data) == summary["checksums"][path.name]:
            return data
    except (KeyError, OSError, TypeError) as error:
        reason = repr(error)
    raise UserError(
        f"{path} is damaged ({reason}). Delete {shard_name('tokens', shard, shards)}.json and prepare again: only this shard is "
        "prepared again.",
        field=str(path),
    )


def _damaged_file(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged or does not belong to a prepared corpus ({reason}). Delete it and prepare again.",
        field=str(path),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
