"""Files of text as documents, one after the other: no file is ever held whole, and what is no document says why.

Formats, by the ending: `.txt` and `.jsonl`, plain or compressed (`.gz`, `.zst`), `.parquet`, `.arrow` (a folder that the
`datasets` library saved) and `.array_record`, each record of which is what a line of a `.jsonl` is. Text is never normalized:
the bytes that are predicted later are the bytes of the file.
"""

from __future__ import annotations

import collections
import functools
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.files import UNIT_BYTES, FileRange, find_units, kind_of, open_records, unreadable
from rpt_jax.corpus.text_splitting import LINE_END, cut_block, split_text
from rpt_jax.errors import UserError, nearest
from rpt_jax.registry import CORPUS_SOURCES

_ESCAPED = re.compile("[\udc80-\udcff]")  # How a byte that is no UTF-8 is decoded.
_SLOT = re.compile(r"\{(\w+)\}")


class _NoDocumentError(Exception):
    """(reason, detail)."""


def read_unit(unit: FileRange, config: DataConfig) -> Iterator[Document | Rejected]:
    """Yield every document of `unit`, and what stood in place of others.

    Raises: UserError, naming the file, the line and the reason, where the file itself cannot be read to its end.
    """
    place = 0
    try:
        for place, text in _READERS[kind_of(unit.path)](unit, config):
            try:
                yield Document(_accepted(text, config), f"{_origin(unit)}:{place}", part=unit.part)
            except _NoDocumentError as error:
                number = int(str(place).partition(":")[0]) + _lines_before(unit.path, unit.start, kind_of(unit.path))
                reason, detail = error.args
                yield Rejected(unit.name, number, reason, f"{unit.path}:{number} {detail}")
    except Exception as error:  # noqa: BLE001 - as above; a broken gzip alone has three classes.
        if isinstance(error, UserError):
            raise
        line = int(str(place).partition(":")[0]) + 1 + _lines_before(unit.path, unit.start, kind_of(unit.path))
        raise unreadable(unit.path, line, error) from error


def _origin(unit: FileRange) -> str:
    """Lines of a large file are counted from the byte where a part of it begins: counting them all would be reading it all."""
    return f"{unit.name}@{unit.start}" if unit.start and kind_of(unit.path) in (".txt", ".jsonl") else unit.name


@functools.lru_cache(maxsize=64)
def _lines_before(path: Path, start: int, kind: str) -> int:
    if kind not in (".txt", ".jsonl") or start == 0:
        return 0
    with path.open("rb") as file:
        # A line of JSON that reaches across the border belongs to the part before it.
        left, count = (cut_block(file, start), 0) if kind == ".txt" else (start - 1, 1)
        file.seek(0)
        while left > 0 and (block := file.read(min(left, 2**20))):
            count, left = count + block.count(b"\n"), left - len(block)
        return count


def _accepted(text: str | _NoDocumentError, config: DataConfig) -> str:
    """Return the text, or raise _NoDocumentError with what is wrong with it."""
    if isinstance(text, _NoDocumentError):
        raise text
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        detail = (
            f"has half a surrogate pair at character {error.start} (an escape from \\ud800 to \\udfff on its own), "
        )
        raise _NoDocumentError("half a surrogate pair", detail + "which UTF-8 cannot express.") from None
    if not text.strip():
        raise _NoDocumentError("empty", "holds nothing but white space.")
    if size > config.max_document_bytes:
        detail = f"is {size} bytes long, and data.max_document_bytes={config.max_document_bytes}."
        raise _NoDocumentError("too long", detail)
    return text


def _not_utf8(byte: int, offset: int | None = None) -> str:
    where = "" if offset is None else f" at byte {offset} of it"
    return f"is not UTF-8: byte 0x{byte:02x}{where}. Convert the file to UTF-8."


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NoDocumentError("not UTF-8", _not_utf8(data[error.start], error.start)) from None


Found = Iterator[tuple[int | str, str | _NoDocumentError]]  # Where it is (line, or line:column), and what it is.


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 2**20)
    return path.open("rb")


def _blocks(file: io.BufferedIOBase, unit: FileRange) -> Iterator[bytes]:
    if unit.stop >= 0:
        start, stop = cut_block(file, unit.start), cut_block(file, unit.stop)
        file.seek(start)
        yield file.read(stop - start)
        return
    rest = b""
    while block := file.read(UNIT_BYTES):
        block = rest + block
        end = cut_block(io.BytesIO(block), max(0, len(block) - 2**16))
        rest = block[end:]
        yield block[:end]
    yield rest


def _read_txt(unit: FileRange, config: DataConfig) -> Found:
    """Yield pieces of about 2,000 characters, at `line` or `line:column`."""
    del config
    line, column = 1, 1
    with _open(unit.path) as file:
        for number, block in enumerate(_blocks(file, unit)):
            # Bytes that are no UTF-8 stay in their piece, and the others are documents.
            text = block.decode("utf-8", "surrogateescape")
            if number == unit.start == 0:
                text = text.removeprefix("\ufeff")
            for piece in split_text(text):
                place, bad = line if column == 1 else f"{line}:{column}", _ESCAPED.search(piece)
                yield place, _NoDocumentError("not UTF-8", _not_utf8(ord(bad[0]) - 0xDC00)) if bad else piece
                *ended, rest = LINE_END.split(piece)
                line, column = line + len(ended), len(rest) + (1 if ended else column)


def _read_jsonl(unit: FileRange, config: DataConfig) -> Found:
    limit = 8 * config.max_document_bytes + 2**16  # JSON may write a byte in six, and has other fields.
    with _open(unit.path) as file:
        # Only "\n" ends a line of JSON: `str.splitlines` would also cut at U+2028, which may stand inside a string.
        if unit.start:
            file.seek(unit.start - 1)
            _skip_line(file)
        at, number = (file.tell() if unit.start else 0), 0
        while (unit.stop < 0 or at < unit.stop) and (raw := file.readline(limit)):
            number, at = number + 1, at + len(raw)
            if len(raw) == limit and not raw.endswith(b"\n"):
                at += _skip_line(file)
                yield number, _NoDocumentError("too long", f"is longer than {limit} bytes.")
                continue
            if number == 1 and unit.start == 0:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, _from_json(raw, config)


def _skip_line(file: io.BufferedIOBase) -> int:
    skipped = 0
    while part := file.readline(2**20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _from_json(raw: bytes, config: DataConfig) -> str | _NoDocumentError:
    try:
        record = json.loads(_decode(raw))
    except _NoDocumentError as error:
        return error
    except (ValueError, RecursionError) as error:
        return _NoDocumentError("not JSON", f"is not JSON: {error}. A .jsonl file has one JSON object per line.")
    if not isinstance(record, dict):
        detail = f"is a JSON {type(record).__name__}: expected an object with {_wanted(config)}."
        return _NoDocumentError("not a JSON object", detail)
    return _from_record(record, config)


def _from_record(record: Mapping[str, Any], config: DataConfig) -> str | _NoDocumentError:
    """Return the text of a record: its field `data.text_field`, or `data.document_template` with its fields put in."""
    for field in _fields(config):
        if field not in record:
            detail = f"has no field {_wanted(config, field)}; its fields: {', '.join(record) or 'none'}.{nearest(field, record)}"
            return _NoDocumentError("no such field", detail)
        if isinstance(value := record[field], bytes):
            try:
                record = {**record, field: _decode(value)}
            except _NoDocumentError as error:
                return error
        elif not isinstance(value, str):
            return _NoDocumentError(
                "not a string", f"has a {type(value).__name__} in its field '{field}', expected a string."
            )
    if not config.document_template:
        return record[config.text_field]
    return _SLOT.sub(lambda slot: record[slot[1]], config.document_template)


def _fields(config: DataConfig) -> Sequence[str]:
    return list(dict.fromkeys(_SLOT.findall(config.document_template))) or [config.text_field]


def _wanted(config: DataConfig, field: str = "") -> str:
    if config.document_template:
        return f"'{field}' of data.document_template" if field else f"the fields {', '.join(_fields(config))}"
    return f"data.text_field='{config.text_field}'" if field else f"the field '{config.text_field}'"


def _read_parquet(unit: FileRange, config: DataConfig) -> Found:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(unit.path) as file:
        first = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        names = [name for name in file.schema_arrow.names if name in _fields(config)] or None
        yield from _rows(file.iter_batches(256, range(unit.start, unit.stop), names), config, first)


def _read_arrow(unit: FileRange, config: DataConfig) -> Found:
    import pyarrow

    with pyarrow.memory_map(str(unit.path)) as file:
        if file.read(6) == b"ARROW1":
            whole = pyarrow.ipc.open_file(file)
            batches: Iterator[Any] = (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from _rows(batches, config, 0)


def _rows(batches: Iterable[Any], config: DataConfig, number: int) -> Found:
    for batch in batches:
        batch.validate(full=True)  # Else a damaged file may be read beyond its buffers, which ends the process.
        names = [name for name in batch.schema.names if name in _fields(config)] or batch.schema.names
        for record in batch.select(names).to_pylist():
            number += 1
            yield number, _from_record(record, config)


def _read_array_record(unit: FileRange, config: DataConfig) -> Found:
    reader = open_records(unit.path)
    for first in range(unit.start, unit.stop, 256):
        records = reader.read(first, min(first + 256, unit.stop))
        yield from ((first + i, _from_json(record, config)) for i, record in enumerate(records, start=1))


_READERS: dict[str, Callable[[FileRange, DataConfig], Found]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".array_record": _read_array_record,
}


@CORPUS_SOURCES.register("path", check=find_units)
def read_files(config: DataConfig, skipped: collections.Counter) -> Iterator[Document | Rejected]:
    """Read the files that `data.path` names (see the module's docstring)."""
    del skipped
    for unit in find_units(config):
        yield from read_unit(unit, config)
