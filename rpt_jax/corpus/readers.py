"""Corpus source "path": read files of text as a stream of documents and rejected records.

Formats, by file ending: `.txt` and `.jsonl`, plain or compressed (`.gz`, `.zst`), `.parquet`, `.arrow` (a folder that the
`datasets` library saved) and `.array_record` (each record is a JSON object, as a line of a `.jsonl` is). No file is held in
memory as a whole. Text is never normalized: the bytes that are predicted later are the bytes of the file.
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
from rpt_jax.corpus.files import RANGE_BYTES, FileRange, file_format, find_file_ranges, open_array_record, read_error
from rpt_jax.corpus.text_splitting import LINE_END, block_boundary, split_text
from rpt_jax.errors import UserError, nearest
from rpt_jax.registry import CORPUS_SOURCES

_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE_ESCAPE = re.compile("[\udc80-\udcff]")  # How a byte that is not UTF-8 is decoded.
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ROWS = 256  # Rows or records that are read at a time.


class InvalidRecordError(Exception):
    """A record that is not a valid document, with a short reason and a detailed description that follows its location."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


# The location of a record (line, or line:column) and its text, or why it has none.
RecordStream = Iterator[tuple[int | str, str | InvalidRecordError]]


def read_file_range(file_range: FileRange, config: DataConfig) -> Iterator[Document | Rejected]:
    """Yield the documents and rejected records of a file range, in order.

    Raises: UserError, naming the file, the line and the reason, if the file cannot be read to its end.
    """
    location: int | str = 0
    path = file_range.path
    try:
        for location, text in read_records(file_range, config):
            try:
                checked = _check_text(text, config)
                name = f"{_name_prefix(file_range)}:{location}"
                yield Document(text=checked, name=name, mixture_part=file_range.mixture_part)
            except InvalidRecordError as error:
                line = _line_in_file(file_range, location)
                yield Rejected(
                    file=file_range.name, line=line, reason=error.reason, detail=f"{path}:{line} {error.detail}"
                )
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries raise many classes; a broken gzip alone has three.
        raise read_error(path, _line_in_file(file_range, location) + 1, error) from error


def read_records(file_range: FileRange, config: DataConfig) -> RecordStream:
    """Yield the location and the text of every record of a file range; the text is not checked yet.

    Locations of `.txt` and `.jsonl` are counted from the beginning of the range, all others from that of the file.
    """
    return _READERS[file_format(file_range.path)](file_range, config)


def _name_prefix(file_range: FileRange) -> str:
    """Name the file and, for text, the byte where the range starts: counting lines before it would mean reading them."""
    is_text = file_format(file_range.path) in (".txt", ".jsonl")
    return f"{file_range.name}@{file_range.start}" if file_range.start and is_text else file_range.name


def _line_in_file(file_range: FileRange, location: int | str) -> int:
    line = int(str(location).partition(":")[0])
    return line + _lines_before(file_range.path, file_range.start, file_format(file_range.path))


@functools.lru_cache(maxsize=64)
def _lines_before(path: Path, start: int, ending: str) -> int:
    """Count the lines of a text file before the first record of the range that starts at byte `start`."""
    if ending not in (".txt", ".jsonl") or start == 0:
        return 0
    with path.open("rb") as file:
        if ending == ".txt":
            left = block_boundary(file, start)
            count = 0
        else:
            # The line that contains the last byte before `start` belongs to the previous range.
            left = start - 1
            count = 1
        file.seek(0)
        while left > 0 and (block := file.read(min(left, 2**20))):
            count += block.count(b"\n")
            left -= len(block)
        return count


def _check_text(text: str | InvalidRecordError, config: DataConfig) -> str:
    """Return the text. Raises: InvalidRecordError."""
    if isinstance(text, InvalidRecordError):
        raise text
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        detail = (
            f"has an unpaired surrogate at character {error.start} (a single escape from \\ud800 to \\udfff), which UTF-8 "
            "cannot encode."
        )
        raise InvalidRecordError("unpaired surrogate", detail) from None
    if not text.strip():
        raise InvalidRecordError("empty", "contains only white space.")
    if size > config.max_document_bytes:
        detail = f"has {size} bytes, more than data.max_document_bytes={config.max_document_bytes}."
        raise InvalidRecordError("too long", detail)
    return text


def _not_utf8(byte: int, offset: int | None = None) -> InvalidRecordError:
    where = "" if offset is None else f" at byte {offset} of the record"
    return InvalidRecordError("not UTF-8", f"is not UTF-8: byte 0x{byte:02x}{where}. Convert the file to UTF-8.")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(data[error.start], error.start) from None


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 2**20)
    return path.open("rb")


# --- text files ---------------------------------------------------------------------------------------


def _read_txt(file_range: FileRange, config: DataConfig) -> RecordStream:
    """Yield chunks of about 2,000 characters, at `line` or `line:column`."""
    del config
    line = 1
    column = 1
    with _open(file_range.path) as file:
        for number, block in enumerate(_blocks(file, file_range)):
            # A byte that is not UTF-8 invalidates only the chunk that contains it.
            text = block.decode("utf-8", "surrogateescape")
            if number == 0 and file_range.start == 0:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            for chunk in split_text(text):
                location = line if column == 1 else f"{line}:{column}"
                escaped = _SURROGATE_ESCAPE.search(chunk)
                yield location, _not_utf8(ord(escaped[0]) - 0xDC00) if escaped else chunk
                *ended, rest = LINE_END.split(chunk)
                line += len(ended)
                column = len(rest) + (1 if ended else column)


def _blocks(file: io.BufferedIOBase, file_range: FileRange) -> Iterator[bytes]:
    """Yield the bytes of a range, in blocks if it is a whole file of unknown size."""
    if file_range.stop >= 0:
        start = block_boundary(file, file_range.start)
        stop = block_boundary(file, file_range.stop)
        file.seek(start)
        yield file.read(stop - start)
        return
    rest = b""
    while block := file.read(RANGE_BYTES):
        block = rest + block
        end = block_boundary(io.BytesIO(block), max(0, len(block) - 2**16))
        rest = block[end:]
        yield block[:end]
    yield rest


def _read_jsonl(file_range: FileRange, config: DataConfig) -> RecordStream:
    # JSON may need six bytes for a byte of text, and a record has other fields too.
    limit = 8 * config.max_document_bytes + 2**16
    with _open(file_range.path) as file:
        offset = 0
        if file_range.start:
            # The previous range reads the line that crosses the boundary.
            file.seek(file_range.start - 1)
            _skip_line(file)
            offset = file.tell()
        number = 0
        # Only "\n" ends a line of JSON: `str.splitlines` would also split at U+2028, which is allowed inside a string.
        while (file_range.stop < 0 or offset < file_range.stop) and (raw := file.readline(limit)):
            number += 1
            offset += len(raw)
            if len(raw) == limit and not raw.endswith(b"\n"):
                offset += _skip_line(file)
                yield number, InvalidRecordError("too long", f"is longer than {limit} bytes.")
                continue
            if number == 1 and file_range.start == 0:
                raw = raw.removeprefix(_BYTE_ORDER_MARK.encode())
            if raw.strip():
                yield number, _parse_json(raw, config)


def _skip_line(file: io.BufferedIOBase) -> int:
    """Skip to the end of the line and return the number of bytes skipped."""
    skipped = 0
    while block := file.readline(2**20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


# --- records with fields ------------------------------------------------------------------------------


def _parse_json(raw: bytes, config: DataConfig) -> str | InvalidRecordError:
    try:
        record = json.loads(_decode(raw))
    except InvalidRecordError as error:
        return error
    except (ValueError, RecursionError) as error:
        return InvalidRecordError("not JSON", f"is not JSON: {error}. A .jsonl file has one JSON object per line.")
    if not isinstance(record, dict):
        expected = f"the fields {', '.join(_fields(config))}"
        if not config.document_template:
            expected = f"the field '{config.text_field}'"
        detail = f"is a JSON {type(record).__name__}: expected an object with {expected}."
        return InvalidRecordError("not a JSON object", detail)
    return _text_of_record(record, config)


def _text_of_record(record: Mapping[str, Any], config: DataConfig) -> str | InvalidRecordError:
    """Return the field `data.text_field`, or `data.document_template` with its placeholders replaced by fields."""
    values: dict[str, str] = {}
    for field in _fields(config):
        if field not in record:
            expected = f"'{field}' of data.document_template"
            if not config.document_template:
                expected = f"data.text_field='{field}'"
            detail = f"has no field {expected}; its fields: {', '.join(record) or 'none'}.{nearest(field, record)}"
            return InvalidRecordError("no such field", detail)
        value = record[field]
        if isinstance(value, bytes):
            try:
                value = _decode(value)
            except InvalidRecordError as error:
                return error
        if not isinstance(value, str):
            detail = f"has a {type(value).__name__} in its field '{field}', expected a string."
            return InvalidRecordError("not a string", detail)
        values[field] = value
    if not config.document_template:
        return values[config.text_field]
    # A placeholder's value may itself contain braces, so all are replaced in one pass.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], config.document_template)


def _fields(config: DataConfig) -> Sequence[str]:
    return list(dict.fromkeys(_PLACEHOLDER.findall(config.document_template))) or [config.text_field]


def _read_parquet(file_range: FileRange, config: DataConfig) -> RecordStream:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file_range.path) as file:
        rows_before = sum(file.metadata.row_group(group).num_rows for group in range(file_range.start))
        names = [name for name in file.schema_arrow.names if name in _fields(config)] or None
        batches = file.iter_batches(_ROWS, range(file_range.start, file_range.stop), names)
        yield from _read_rows(batches, config, rows_before)


def _read_arrow(file_range: FileRange, config: DataConfig) -> RecordStream:
    import pyarrow

    with pyarrow.memory_map(str(file_range.path)) as file:
        batches: Iterable[Any]
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        yield from _read_rows(batches, config, 0)


def _read_rows(batches: Iterable[Any], config: DataConfig, rows_before: int) -> RecordStream:
    number = rows_before
    for batch in batches:
        # Without validation, a damaged file may be read beyond its buffers, which crashes the process.
        batch.validate(full=True)
        names = [name for name in batch.schema.names if name in _fields(config)] or batch.schema.names
        for record in batch.select(names).to_pylist():
            number += 1
            yield number, _text_of_record(record, config)


def _read_array_record(file_range: FileRange, config: DataConfig) -> RecordStream:
    reader = open_array_record(file_range.path)
    for first in range(file_range.start, file_range.stop, _ROWS):
        records = reader.read(first, min(first + _ROWS, file_range.stop))
        for number, record in enumerate(records, start=first + 1):
            yield number, _parse_json(record, config)


_READERS: dict[str, Callable[[FileRange, DataConfig], RecordStream]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".array_record": _read_array_record,
}


@CORPUS_SOURCES.register("path", check=find_file_ranges)
def read_files(config: DataConfig, skipped: collections.Counter) -> Iterator[Document | Rejected]:
    """Read the files that `data.path` names."""
    del skipped
    for file_range in find_file_ranges(config):
        yield from read_file_range(file_range, config)
