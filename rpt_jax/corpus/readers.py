"""Corpus source "path": read files of text as a stream of documents and rejected records.

Formats, by file ending: `.txt`, `.jsonl` (`.ndjson`), `.json`, `.csv` and `.tsv`, plain or compressed (`.gz`, `.zst`, `.xz`,
`.bz2`), `.parquet`, `.arrow` (a folder that the `datasets` library saved) and `.array_record` (each record is a JSON object, as
a line of a `.jsonl` is). No file is held in memory as a whole. Text is never normalized: the bytes that are predicted later are
the bytes of the file.
"""

from __future__ import annotations

import codecs
import collections
import csv
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.corpus.compression import DecompressedFile, open_binary
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.files import RANGE_BYTES, FileRange, check_path, find_file_ranges, open_array_record
from rpt_jax.corpus.folders import file_format, read_error
from rpt_jax.corpus.json_files import BYTE_ORDER_MARK, has_a_record_per_line, read_json_values
from rpt_jax.corpus.mixture import configs_of_parts
from rpt_jax.corpus.records import (
    BY_FILE,
    InvalidRecordError,
    RecordParser,
    RecordText,
    document_parser,
    not_utf8,
)
from rpt_jax.corpus.text_splitting import LINE_END, block_boundary, split_text
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES

_SURROGATE_ESCAPE = re.compile("[\udc80-\udcff]")  # How a byte that is not UTF-8 is decoded.
_ROWS = 256  # Rows or records that are read at a time.
_HEAD_BYTES = 2**16  # Files that begin with the same bytes are the same text for the split.

# The location of a record (line, or line:column) and what is made of it, or an `InvalidRecordError`.
RecordStream = Iterator[tuple[int | str, Any]]


def read_file_range(file_range: FileRange, config: DataConfig) -> Iterator[Document | Rejected]:
    """Yield the documents and rejected records of a file range, in order.

    Raises: UserError, naming the file, the line and the reason, if the file cannot be read to its end.
    """
    config = configs_of_parts(config)[file_range.mixture_part]
    path = file_range.path
    try:
        file_key = _file_key(path) if config.group_by == BY_FILE or file_format(path) == ".txt" else ""
    except Exception as error:  # noqa: BLE001 - as in `parse_file_range`.
        raise read_error(path, 1, error, "data.path") from error
    check = functools.partial(_check_text, config=config)
    for record in parse_file_range(file_range, document_parser(config), check):
        if isinstance(record, Rejected):
            yield record
            continue
        location, (text, group, place) = record
        yield Document(
            text=text,
            name=f"{name_prefix(file_range)}:{location}",
            key=file_key or group,
            mixture_part=file_range.mixture_part,
            file=file_range.name,
            place=place,
        )


def parse_file_range(
    file_range: FileRange, parser: RecordParser, check: Callable[[Any], Any], field: str = "data.path"
) -> Iterator[tuple[int | str, Any] | Rejected]:
    """Yield what is made of the records of a file range, each after its location, and the rejected records, in order.

    Args:
      file_range: the range.
      parser: what is made of a record.
      check: called with it; returns it, or raises an `InvalidRecordError`.
      field: the config field that names the file, for messages.

    Raises: UserError, naming the file, the line and the reason, if the file cannot be read to its end.
    """
    location: int | str = 0
    path = file_range.path
    try:
        for location, record in read_records(file_range, parser):
            try:
                if isinstance(record, InvalidRecordError):
                    raise record
                yield location, check(record)
            except InvalidRecordError as error:
                line = line_in_file(file_range, location)
                yield Rejected(
                    file=file_range.name,
                    line=line,
                    reason=error.reason,
                    detail=f"{path}:{line} {error.detail}",
                    mixture_part=file_range.mixture_part,
                )
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries raise many classes; a broken gzip alone has three.
        raise read_error(path, line_in_file(file_range, location) + 1, error, field) from error


def read_records(file_range: FileRange, parser: RecordParser) -> RecordStream:
    """Yield the location of every record of a file range, and what `parser` makes of it.

    Locations of `.txt`, `.jsonl` and JSON lines are counted from the beginning of the range, all others from that of the file.
    """
    ending = file_format(file_range.path)
    if ending in _TABLE_READERS:
        yield from _TABLE_READERS[ending](file_range, parser)
        return
    with open_binary(file_range.path) as file:
        decompressed = getattr(file, "raw", None)
        yield from _TEXT_READERS[ending](file, file_range, parser)
    if isinstance(decompressed, DecompressedFile) and decompressed.trailing_bytes:
        detail = f"ends with {decompressed.trailing_bytes:,} bytes that are not compressed data."
        yield 0, InvalidRecordError("after compressed data", detail)


def _file_key(path: Path) -> str:
    """Return a key of a file's text that does not depend on the file's name: a hash of its beginning."""
    with open_binary(path) as file:
        return f"file {hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()}"


def name_prefix(file_range: FileRange) -> str:
    """Name the file and, for text, the byte where the range starts: counting lines before it would mean reading them."""
    is_text = file_format(file_range.path) in _TEXT_READERS
    return f"{file_range.name}@{file_range.start}" if file_range.start and is_text else file_range.name


def line_in_file(file_range: FileRange, location: int | str) -> int:
    """Return the line, row or record of a file that a location in one of its ranges stands for, from 1."""
    line = int(str(location).partition(":")[0])
    return line + _lines_before(file_range.path, file_range.start, file_format(file_range.path))


@functools.lru_cache(maxsize=64)
def _lines_before(path: Path, start: int, ending: str) -> int:
    """Count the lines of a text file before the first record of the range that starts at byte `start`."""
    if ending not in _TEXT_READERS or start == 0:
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


def _check_text(record: RecordText, config: DataConfig) -> RecordText:
    """Return the record. Raises: InvalidRecordError."""
    text = record.text
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
    return record


# --- text files ---------------------------------------------------------------------------------------


def _read_txt(file: io.BufferedReader, file_range: FileRange, parser: RecordParser) -> RecordStream:
    """Yield chunks of about 2,000 characters, at `line` or `line:column`."""
    del parser
    line = 1
    column = 1
    for number, (place, block) in enumerate(_blocks(file, file_range)):
        # A byte that is not UTF-8 invalidates only the chunk that contains it.
        text = block.decode("utf-8", "surrogateescape")
        if number == 0 and file_range.start == 0:
            text = text.removeprefix(BYTE_ORDER_MARK)
        for chunk in split_text(text):
            location = line if column == 1 else f"{line}:{column}"
            escaped = _SURROGATE_ESCAPE.search(chunk)
            yield location, not_utf8(ord(escaped[0]) - 0xDC00) if escaped else RecordText(chunk, place=place)
            place += len(chunk.encode("utf-8", "surrogateescape"))
            *ended, rest = LINE_END.split(chunk)
            line += len(ended)
            column = len(rest) + (1 if ended else column)


def _blocks(file: io.BufferedReader, file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a range and where they begin, in blocks if it is a whole file of unknown size."""
    if file_range.stop >= 0:
        start = block_boundary(file, file_range.start)
        stop = block_boundary(file, file_range.stop)
        file.seek(start)
        yield start, file.read(stop - start)
        return
    start = 0
    rest = b""
    while block := file.read(RANGE_BYTES):
        block = rest + block
        end = block_boundary(io.BytesIO(block), max(0, len(block) - 2**16))
        rest = block[end:]
        yield start, block[:end]
        start += end
    yield start, rest


def _read_jsonl(file: io.BufferedReader, file_range: FileRange, parser: RecordParser) -> RecordStream:
    limit = _longest_record(parser)
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
            raw = raw.removeprefix(BYTE_ORDER_MARK.encode())
        if raw.strip():
            yield number, parser.parse_json(raw)


def _longest_record(parser: RecordParser) -> int:
    # JSON may need six bytes for a byte of text, and a record has other fields too.
    return 8 * parser.max_bytes + 2**16


def _skip_line(file: io.BufferedReader) -> int:
    """Skip to the end of the line and return the number of bytes skipped."""
    skipped = 0
    while block := file.readline(2**20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _read_json(file: io.BufferedReader, file_range: FileRange, parser: RecordParser) -> RecordStream:
    """Yield the records of a file of JSON lines, at their lines, or those of an array or of several values, numbered."""
    if file_range.stop >= 0 or has_a_record_per_line(file_range.path):
        yield from _read_jsonl(file, file_range, parser)
        return
    for number, (text, value) in enumerate(read_json_values(file, _longest_record(parser)), start=1):
        escaped = _SURROGATE_ESCAPE.search(text)
        yield number, not_utf8(ord(escaped[0]) - 0xDC00) if escaped else parser.parse(value)


def _read_csv(file: io.BufferedReader, file_range: FileRange, parser: RecordParser) -> RecordStream:
    """Yield the rows of a table whose first line that is not blank names the columns, by row number.

    Raises: ValueError, if a quote is not closed: it would take the rest of the file for one value.
    """
    if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    csv.field_size_limit(min(_longest_record(parser), 2**31 - 1))
    # Latin-1 maps every byte to a character, so a row that is not UTF-8 is rejected by itself.
    delimiter = "\t" if file_format(file_range.path) == ".tsv" else ","
    rows = csv.reader(io.TextIOWrapper(file, "latin-1", newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    columns: set[str] = set()
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise ValueError("a value begins with a quote there, and no quote ends it") from None
            number += 1
            reason = "too long" if "field limit" in str(error) else "not CSV"
            yield number, InvalidRecordError(reason, f"is not CSV: {error}.")
            continue
        if not names:
            if any(name.strip() for name in row):
                names = [name.encode("latin-1").decode("utf-8", "replace") for name in row]
                columns = set(parser.columns(names))
        elif row:
            number += 1
            yield number, _parse_row(row, names, columns, parser)


def _parse_row(row: list[str], names: list[str], columns: set[str], parser: RecordParser) -> Any:
    """Return what is made of a row that was decoded as Latin-1, or an `InvalidRecordError`."""
    if len(row) != len(names):
        detail = f"has {len(row)} columns, and the first line has {len(names)}."
        return InvalidRecordError("wrong number of columns", detail)
    return parser.parse(
        {name: value.encode("latin-1") for name, value in zip(names, row, strict=True) if name in columns}
    )


# --- tables and records -------------------------------------------------------------------------------


def _read_parquet(file_range: FileRange, parser: RecordParser) -> RecordStream:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file_range.path) as file:
        rows_before = sum(file.metadata.row_group(group).num_rows for group in range(file_range.start))
        names = parser.columns(file.schema_arrow.names)
        batches = file.iter_batches(_ROWS, range(file_range.start, file_range.stop), names)
        yield from _read_rows(batches, parser, rows_before)


def _read_arrow(file_range: FileRange, parser: RecordParser) -> RecordStream:
    import pyarrow

    with pyarrow.memory_map(str(file_range.path)) as file:
        batches: Iterable[Any]
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        yield from _read_rows(batches, parser, 0)


def _read_rows(batches: Iterable[Any], parser: RecordParser, rows_before: int) -> RecordStream:
    number = rows_before
    for batch in batches:
        selected = _with_strings_as_bytes(batch.select(parser.columns(batch.schema.names)))
        # Without validation, a damaged file may be read beyond its buffers, which crashes the process.
        selected.validate(full=True)
        for record in selected.to_pylist(maps_as_pydicts="lossy"):
            number += 1
            yield number, parser.parse(record)


def _with_strings_as_bytes(batch: Any) -> Any:
    """Return a batch whose strings are bytes: a string that is not UTF-8 would make the whole batch invalid."""
    import pyarrow

    schema = pyarrow.schema([field.with_type(_bytes_type(field.type)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def _bytes_type(kind: Any) -> Any:
    """Return an Arrow type with bytes in place of strings, in nested types too."""
    import pyarrow
    from pyarrow import types

    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_string_view(kind):
        return pyarrow.binary_view()
    if types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_bytes_type(kind.value_type)), kind.list_size)
    if types.is_map(kind):
        return pyarrow.map_(kind.key_type, _bytes_type(kind.item_type))  # The keys are names of fields.
    return kind


def _read_array_record(file_range: FileRange, parser: RecordParser) -> RecordStream:
    reader = open_array_record(file_range.path)
    for first in range(file_range.start, file_range.stop, _ROWS):
        records = reader.read(first, min(first + _ROWS, file_range.stop))
        for number, record in enumerate(records, start=first + 1):
            yield number, parser.parse_json(record)


_TEXT_READERS: dict[str, Callable[[io.BufferedReader, FileRange, RecordParser], RecordStream]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
_TABLE_READERS: dict[str, Callable[[FileRange, RecordParser], RecordStream]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".array_record": _read_array_record,
}


@CORPUS_SOURCES.register(
    "path",
    check=check_path,
    fields=("path", "text_field", "document_template", "group_by", "max_document_bytes"),
)
def read_files(config: DataConfig, skipped: collections.Counter) -> Iterator[Document | Rejected]:
    """Read the files that `data.path` names."""
    del skipped
    for file_range in find_file_ranges(config):
        yield from read_file_range(file_range, config)
