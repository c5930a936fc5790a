"""A prepared corpus on disk: shards of token ids and of entropies, and a manifest that says what they were made from.

Of shard 3 of 64 there are, in this order: `tokens-00003-of-00064.array_record`, a record for every window of a document;
`index-….bin`, a row for every document; `names-….txt`, where documents are from; `tokens-….json`, which makes the shard count
as tokenized. The same with `scores-….array_record` and `scores-….json`. `manifest.json` is written when all are there.
Every record has a checksum of its number and content, every other file one of its own, and the shard's JSON all sizes.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grain
import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

MANIFEST = "manifest.json"
SKETCH = 16
INDEX = np.dtype(
    [
        ("text", "<u8"),  # See corpus.fingerprints.
        ("key", "<u8"),
        ("tokens", "<u4"),
        ("side", "i1"),
        ("part", "<u2"),
        ("sketch", "<u4", (SKETCH,)),  # See near_duplicates.sketch.
    ]
)
# The arrays of a record, each as long as its window has tokens.
FIELDS = {"tokens": ("<u4", "<u2"), "scores": ("<f4", "<f4")}


def shard_name(kind: str, shard: int, shards: int) -> str:
    return f"{kind}-{shard:05d}-of-{shards:05d}"


def pack(first: int, arrays: Sequence[np.ndarray], ends: Sequence[int], kind: str) -> Iterator[bytes]:
    """Yield the records of windows that stand in a row and end at `ends`, numbered from `first`.

    A record is a checksum of 4 bytes, then the arrays, of each first all lowest bytes, then all second ones …: bytes of a kind
    beside each other are what a fast compressor needs.
    """
    typed = [np.ascontiguousarray(a, t) for a, t in zip(arrays, FIELDS[kind], strict=True)]
    planes = [memoryview(plane.tobytes()) for a in typed for plane in a.view(np.uint8).reshape(-1, a.itemsize).T]
    start = 0
    for number, end in enumerate(ends, start=first):
        data = b"".join([plane[start:end] for plane in planes])
        yield _checksum(number, data) + data
        start = end


def _checksum(number: int, data: bytes) -> bytes:
    return zlib.crc32(data, number & 0xFFFFFFFF).to_bytes(4, "little")


class ShardWriter:
    """Writes one shard's records of one kind; whole with `commit`, and nothing without it."""

    def __init__(self, directory: Path, kind: str, shard: int, shards: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._base, self._kind = directory / shard_name(kind, shard, shards), kind
        self._path = self._base.with_name(f"{self._base.name}.array_record")
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        # Groups of one record: prompts are drawn at random, and a record should not cost the reading of others.
        self._writer = ArrayRecordWriter(str(self._partial), "group_size:1,snappy")
        self._open, self.records = True, 0

    def write(self, arrays: Sequence[np.ndarray], ends: Sequence[int]) -> None:
        """Write a record for each of the windows that stand in a row in `arrays` and end at `ends`."""
        for record in pack(self.records, arrays, ends, self._kind):
            self._writer.write(record)
        self.records += len(ends)

    def commit(self, summary: Mapping[str, Any], others: Sequence[Path] = ()) -> None:
        """Make the records, and the files `others`, the shard's; `summary` is kept beside their sizes."""
        self._writer.close()
        self._open = False
        self._partial.replace(self._path)
        sizes = {path.name: path.stat().st_size for path in (self._path, *others)}
        checksums = {path.name: zlib.crc32(path.read_bytes()) for path in others}
        content = {**summary, "records": self.records, "bytes": sizes, "checksums": checksums}
        write_json(self._base.with_name(f"{self._base.name}.json"), content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            with contextlib.suppress(Exception):
                self._writer.close()
            self._partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` in one step, as `atomic_write` does."""
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def read_summary(directory: Path, kind: str, shard: int, shards: int) -> dict[str, Any] | None:
    """Return what `commit` wrote of a shard, None where it is not made yet. Raises: UserError, where a file is cut short."""
    path = directory / f"{shard_name(kind, shard, shards)}.json"
    if not path.exists():
        return None
    summary = read_json(path)
    try:
        for name, size in summary["bytes"].items():
            found = (directory / name).stat().st_size if (directory / name).exists() else "nothing"
            if found != size:
                raise UserError(
                    f"{directory / name} is damaged: {found} bytes where {size} were written. Delete {path} and prepare again: "
                    "only this shard is made again."
                )
        return {"records": int(summary["records"]), **summary}
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(path, f"{error!r}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or not of a prepared corpus ({reason}). Delete it and prepare again.")


class Records(Sequence):
    """The records of one kind of all shards, or of `only` some, numbered through: `records[i]` is a tuple of arrays.

    Can be pickled. Raises: UserError, where a file is missing or cut short; so does reading, where a record is altered.
    """

    def __init__(self, directory: Path, kind: str, shards: int, only: Sequence[int] | None = None):
        self._directory, self._kind, self._shards = directory, kind, shards
        self._numbers = list(range(shards) if only is None else only)
        counts = []
        for shard in self._numbers:
            summary = read_summary(directory, kind, shard, shards)
            if summary is None:
                raise UserError(
                    f"{directory} has no {shard_name(kind, shard, shards)}.json: prepare shard {shard}/{shards}."
                )
            counts.append(summary["records"])
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # An empty file of records cannot be opened.
        paths = [self._path(shard) for shard, count in zip(self._numbers, counts, strict=True) if count]
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths]) if paths else ()
        except Exception as error:  # noqa: BLE001 - the library's, of a C++ reader.
            raise UserError(
                f"{directory}: the records of {kind} cannot be read ({' '.join(str(error).split())[:200]}). Prepare it again."
            ) from None
        if len(self._source) != len(self):
            raise UserError(
                f"{directory}: {len(self._source)} records where {len(self)} were written. Prepare it again."
            )

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard_name(self._kind, shard, self._shards)}.array_record"

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        return self.read([range(len(self))[number]])[0]

    def read(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """Several records at once, which takes a third of the time that they take one by one."""
        try:
            # The library hands several to threads of its own, which costs more than one record does.
            several = self._source.__getitems__ if len(numbers) > 1 else lambda some: [self._source[n] for n in some]
            found = several(numbers)
        except Exception as error:  # noqa: BLE001 - the library's, of a C++ reader.
            if len(numbers) > 1:
                return [self.read([number])[0] for number in numbers]  # To find out which.
            raise self._altered(numbers[0], f": {' '.join(str(error).split())[:200]}") from None
        for number, record in zip(numbers, found, strict=True):
            if _checksum(self._place(number)[1], record[4:]) != record[:4]:
                raise self._altered(number, "")
        return [unpack(record, self._kind) for record in found]

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a record and its number there."""
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._numbers[place], number - int(self._first[place])

    def _altered(self, number: int, reason: str) -> UserError:
        shard, inside = self._place(number)
        return UserError(
            f"{self._path(shard)}: record {inside} was altered or is damaged (its checksum is another{reason}). Delete "
            f"{shard_name(self._kind, shard, self._shards)}.json and prepare again: only this shard is made again."
        )


def unpack(record: bytes, kind: str) -> tuple[np.ndarray, ...]:
    types = [np.dtype(t) for t in FIELDS[kind]]
    tokens, arrays, at = (len(record) - 4) // sum(t.itemsize for t in types), [], 4
    for t in types:
        bytes_ = np.frombuffer(record, np.uint8, tokens * t.itemsize, at).reshape(t.itemsize, tokens)
        arrays.append(np.ascontiguousarray(bytes_.T).reshape(-1).view(t))
        at += tokens * t.itemsize
    return tuple(arrays)


def read_index(directory: Path, shards: int, only: Iterable[int] | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of each shard's documents, or of `only` some, INDEX [D]. Raises: UserError, where they were altered."""
    for shard in range(shards) if only is None else only:
        yield np.frombuffer(_read_checked(directory, "index", ".bin", shard, shards), INDEX)


def document_names(directory: Path, shards: int, numbers: Iterable[int]) -> dict[int, str]:
    """Where some documents of the corpus are from, by their numbers. Raises: UserError, as `read_index` does."""
    wanted, names, before = sorted(set(numbers)), {}, 0
    for shard in range(shards):
        lines = _read_checked(directory, "names", ".txt", shard, shards).splitlines()
        names |= {n: json.loads(lines[n - before]) for n in wanted if before <= n < before + len(lines)}
        before += len(lines)
    return names


def _read_checked(directory: Path, kind: str, ending: str, shard: int, shards: int) -> bytes:
    path, reason = directory / f"{shard_name(kind, shard, shards)}{ending}", "its checksum is another"
    summary = read_summary(directory, "tokens", shard, shards) or {}
    try:
        data = path.read_bytes()
        if zlib.crc32(data) == summary["checksums"][path.name]:
            return data
    except (KeyError, OSError) as error:
        reason = repr(error)
    raise UserError(
        f"{path} was altered or is damaged ({reason}). Delete {shard_name('tokens', shard, shards)}.json and prepare again: "
        "only this shard is made again."
    )
