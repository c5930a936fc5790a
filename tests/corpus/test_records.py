"""Records as people store them: fields, compressions and formats."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from rpt_jax.config import DataConfig
from rpt_jax.corpus import json_files
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.files import find_file_ranges
from rpt_jax.corpus.readers import read_file_range
from rpt_jax.errors import UserError
from tests.helpers.corpora import json_lines, write_every_format

TEXTS = ["plain", 'crlf\r\n"quoted", and\ttab\n', "漢字\u2028\U0001f9ee", " spaces  "]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def read(path: Path, **fields: object) -> list[Document | Rejected]:
    config = DataConfig(source="path", path=str(path), **fields)
    return [item for file_range in find_file_ranges(config) for item in read_file_range(file_range, config)]


def texts_or_reasons(path: Path, **fields: object) -> list[str]:
    return [item.text if isinstance(item, Document) else item.reason for item in read(path, **fields)]


# --- formats ---


def as_table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


FORMATS = {
    "a.ndjson": json_lines(RECORDS),
    "lines.json": b"\n" + json_lines(RECORDS),
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "several.json": b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS),
    "a.csv": as_table(","),
    "mark.csv": b"\xef\xbb\xbf" + as_table(","),
    "a.tsv": as_table("\t"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, compression: str
) -> None:
    monkeypatch.setattr(json_files, "BLOCK_CHARACTERS", 7)
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[name]))
    items = read(path)
    assert [item.text for item in items if isinstance(item, Document)] == TEXTS
    assert len({item.name for item in items if isinstance(item, Document)}) == len(items) == len(TEXTS)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'[{"text": "a"}, 3, ["b"], {"text": "\xff"}, {"text": "\\udc80"}, {"texts": "c"}, {"text": "d"}]',
         ["a", "not a JSON object", "not a JSON object", "not UTF-8", "unpaired surrogate", "no such field", "d"]),
        (b'{\n"data": [{"text": "a"}]}', ["no such field"]),
        (b"[]", []),
        (b"\n", []),
    ],
)  # fmt: skip
def test_invalid_values_of_a_json_file_are_rejected_one_by_one(tmp_path: Path, data: bytes, found: list[str]) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert texts_or_reasons(tmp_path / "a.json") == found


@pytest.mark.parametrize(
    "data", [b'[{"text": "a"}, {"text"; 3}, {}]', b'[{"text": "a"}, {"text": "b', b'[{"text": "a"}']
)
def test_a_damaged_json_file_is_refused_where_it_is_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read .*a\.json:2: ") as raised:
        read(tmp_path)
    assert raised.value.field == "data.path"


def test_rows_of_a_table_with_another_number_of_columns_are_rejected_at_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,id\na,1\nb\n\xff,2\n"c, d",3\ne\xe4,4,5\n')
    items = read(tmp_path / "a.csv")
    found = [(item.text if isinstance(item, Document) else item.reason) for item in items]
    assert found == ["a", "wrong number of columns", "not UTF-8", "c, d", "wrong number of columns"]
    assert [item.line for item in items if isinstance(item, Rejected)] == [2, 3, 5]
    assert texts_or_reasons(tmp_path / "a.csv", text_field="problem")[0] == "no such field"


@pytest.mark.parametrize(
    ("name", "data", "row"),
    [
        ("a.csv", b'text,id\na,1\n"never closed,2\nb,3\nc,4\n', 2),
        ("a.csv", b'text,id\na,1\nb,"trunca', 2),
        ("a.csv", b'text,id\n"a ""b"",1\n', 1),
        ("a.tsv", b'text\tid\n"Well\t1\nb\t2\n', 1),
    ],
)
def test_a_quote_that_is_not_closed_is_refused_at_its_row(tmp_path: Path, name: str, data: bytes, row: int) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"cannot read .*{name}:{row}: a value begins with a quote") as raised:
        read(tmp_path / name)
    assert raised.value.field == "data.path"


def test_a_row_of_a_table_that_is_no_csv_or_too_long_is_rejected_by_itself(tmp_path: Path) -> None:
    rows = [b"text,id", b'"a\nb ""c""",1', b'"d"e,2', b"f" * 200_000 + b",3", b'g "h",4']
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(rows))
    assert texts_or_reasons(tmp_path / "a.csv", max_document_bytes=1000) == ['a\nb "c"', "not CSV", "too long", 'g "h"']
    assert texts_or_reasons(tmp_path / "a.csv", max_document_bytes=2**31 - 1)[2] == "f" * 200_000


@pytest.mark.parametrize("data", [b"\n", b"text,id", b"text,id\n", b"text,id\n\n\n"])
def test_a_table_without_rows_has_no_documents(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert texts_or_reasons(tmp_path / "a.csv") == []


def test_blank_lines_in_front_of_a_table_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\n\r\ntext,id\na,1\n")
    assert texts_or_reasons(tmp_path / "a.csv") == ["a"]


def test_numbers_of_any_length_are_read(tmp_path: Path) -> None:
    numbers = ["1" * 5000, "-" + "9" * 100_000, "1." + "3" * 5000, "1e99999"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {number}, "text": "t"}}\n' for number in numbers))
    (tmp_path / "b.json").write_text("[" + ",".join(f'{{"id": {number}, "text": "t"}}' for number in numbers) + "]")
    assert texts_or_reasons(tmp_path, group_by="id") == ["t"] * 8


# --- compression ---


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])
def test_data_behind_compressed_data_are_rejected_and_the_rest_is_read(tmp_path: Path, compression: str) -> None:
    compress = COMPRESSIONS[compression]
    for ending, write in (
        (".jsonl", json_lines),
        (".txt", lambda records: "\n".join(r["text"] for r in records).encode()),
    ):
        path = tmp_path / f"a{ending}{compression}"
        data = write(RECORDS[:1])
        path.write_bytes(compress(data) + compress(data) + bytes(100))
        assert all(isinstance(item, Document) for item in read(path)), "several streams, padded with zeros"
        path.write_bytes(compress(data) + b"garbage")
        *texts, reason = texts_or_reasons(path)
        assert texts == ["plain"] and reason == "after compressed data"


def test_a_window_of_zstd_long_is_read(tmp_path: Path) -> None:
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.compression_level: 1}
    compressor = zstd.ZstdCompressor(options=options)
    path = tmp_path / "a.jsonl.zst"
    # The size of the data is unknown when the header is written, so that the window is not made smaller.
    path.write_bytes(compressor.compress(json_lines(RECORDS), compressor.FLUSH_BLOCK) + compressor.flush())
    with pytest.raises(OSError, match="memory"):
        pyarrow.input_stream(str(path), compression="zstd").read()
    assert texts_or_reasons(path) == TEXTS


# --- tables ---


def invalid_utf8(values: Iterable[bytes]) -> Any:
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(binary), *binary.buffers()[1:], binary.buffers()[0])


@pytest.mark.parametrize("form", ["string", "field", "list"])
def test_a_row_that_is_not_utf8_does_not_invalidate_the_others(tmp_path: Path, form: str) -> None:
    column = invalid_utf8([b"a", b"\xff", b"c"])
    if form == "field":
        column = pyarrow.StructArray.from_arrays([column], ["text"])
    if form == "list":
        column = pyarrow.FixedSizeListArray.from_arrays(column, 1)
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        found = texts_or_reasons(tmp_path / name, text_field="text.text" if form == "field" else "text")
        assert found == ["a", "not UTF-8", "c"], name


def test_a_column_of_maps_has_named_fields(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    rows = [[("text", "a"), ("id", "1")], [("id", "2")]]
    columns = {"meta": pyarrow.array(rows, kind), "turns": pyarrow.array([[row] for row in rows], pyarrow.list_(kind))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert texts_or_reasons(tmp_path / "a.parquet", text_field="meta.text") == ["a", "no such field"]
    assert texts_or_reasons(tmp_path / "a.parquet", document_template="{turns.0.id}") == ["1", "2"]


# --- fields ---

MESSAGES = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": [{"type": "text", "text": "2."}, {"type": "text", "text": "Done."}]},
]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text_field": "doc.text"}, "nested"),
        ({"text_field": "a.b"}, "flat"),
        ({"text_field": "messages"}, "1 + 1?\n\n2.\n\nDone."),
        ({"text_field": "messages.0.content"}, "1 + 1?"),
        ({"text_field": "turns"}, "q\n\na"),
        ({"text_field": "parts"}, "one\n\ntwo"),
        ({"document_template": "{doc.text}: {messages.1.content.1.text} {doc text}"}, "nested: Done. {doc text}"),
        ({"text_field": "doc.txt"}, "no such field"),
        ({"text_field": "messages.7.content"}, "no such field"),
        ({"text_field": "doc"}, "not a string"),
        ({"text_field": "tools"}, "not a string"),
        ({"text_field": "none"}, "empty"),
    ],
)
def test_fields_may_be_nested_and_lists_of_messages(tmp_path: Path, fields: dict[str, str], text: str) -> None:
    record = {
        "doc": {"text": "nested"},
        "a": {"b": "nested"},
        "a.b": "flat",
        "messages": MESSAGES,
        "turns": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "parts": ["one", "two"],
        "tools": [{"role": "assistant", "content": None}],
        "none": [],
    }
    (tmp_path / "a.jsonl").write_bytes(json_lines([record]))
    assert texts_or_reasons(tmp_path / "a.jsonl", **fields) == [text]


def test_nested_fields_and_messages_are_read_from_every_format(tmp_path: Path) -> None:
    records = [{"doc": {"text": f"{i}"}, "messages": [{"role": "user", "content": f"m{i}"}] * 2} for i in range(3)]
    for path in write_every_format(tmp_path, records):
        assert texts_or_reasons(path, text_field="doc.text") == ["0", "1", "2"]
        assert texts_or_reasons(path, text_field="messages") == ["m0\n\nm0", "m1\n\nm1", "m2\n\nm2"]


def test_a_missing_nested_field_is_described_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"doc": {"text": "a"}}]))
    [item] = read(tmp_path / "a.jsonl", text_field="doc.txt")
    assert isinstance(item, Rejected) and "data.text_field='doc.txt'" in item.detail and "'text'" in item.detail


def test_a_template_without_a_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(RECORDS))
    with pytest.raises(UserError) as raised:
        read(tmp_path / "a.jsonl", document_template="no field {problem text}")
    assert raised.value.field == "data.document_template"
