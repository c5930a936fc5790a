"""Files as documents: every format gives the same ones, and what is none is counted, listed and named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.config import DataConfig
from rpt_jax.corpus import files, readers
from rpt_jax.corpus.documents import Document
from rpt_jax.corpus.files import find_units, parse_mixture
from rpt_jax.corpus.readers import read_unit
from rpt_jax.errors import UserError
from tests.helpers.whole_corpus import load_corpus

TEXTS = ["plain", "crlf\r\nlone\rend\n", "e\u0301 \ufb01 \U0001f9ee", "漢字\u2028\x85", "nul\x00 bell\x07", " spaces  "]


def read(path, **fields):
    config = DataConfig(source="path", path=str(path), **fields)
    return [item for unit in find_units(config) for item in read_unit(unit, config)]


def texts(path, **fields):
    return [item.text for item in read(path, **fields)]


def lines(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def write_array_record(path: Path, records) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


def write_all(folder: Path, records) -> list[Path]:
    """The records in every format that has records."""
    columns = pyarrow.table({name: [r[name] for r in records] for name in records[0]})
    (folder / "a.jsonl").write_bytes(lines(records))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(records)))
    (folder / "c.JSONL.ZST").write_bytes(zstd(lines(records[:1])) + zstd(lines(records[1:])))
    pyarrow.parquet.write_table(columns, folder / "d.parquet", row_group_size=2)
    saved = folder / "saved"  # As `datasets` saves it.
    saved.mkdir()
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", columns.schema) as stream:
        stream.write_table(columns, max_chunksize=2)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved / "cache-0123.arrow").write_bytes(b"what a map() left here")
    with pyarrow.ipc.new_file(folder / "f.arrow", columns.schema) as file:
        file.write_table(columns)
    write_array_record(folder / "g.array_record", records)
    return [*(path for path in sorted(folder.iterdir()) if path != saved), saved]


def test_every_format_gives_the_same_documents(tmp_path):
    records = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    paths = write_all(tmp_path, records)
    assert len(paths) == 7
    for path in paths:
        assert texts(path) == TEXTS, path
    assert len(texts(tmp_path)) == len(texts(f"{tmp_path}/**")) == 7 * len(TEXTS)
    names = [item.name for item in read(tmp_path)]
    assert len(set(names)) == len(names)


def test_a_problem_and_its_solution(tmp_path):
    records = [{"problem": "1 + {x}?", "solution": "{problem} is 1 + x", "answer": "1+x"}]
    template = "Q: {problem}\n{solution} {not a field}"
    for path in write_all(tmp_path, records):
        assert texts(path, document_template=template) == ["Q: 1 + {x}?\n{problem} is 1 + x {not a field}"], path
        [item] = read(path, document_template="{question}{answer}")
        assert item.reason == "no such field" and "'question' of data.document_template" in item.detail


def test_mixtures(tmp_path):
    for name in ("one, two.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines([{"text": name}]))
    assert texts(tmp_path / "one, two.jsonl") == ["one, two.jsonl"]
    mixture = f"0.75={tmp_path}/one*, 0.25={tmp_path}/b.jsonl"
    assert [(d.text, d.part) for d in read(mixture)] == [("one, two.jsonl", 0), ("b.jsonl", 1)]
    assert [weight for weight, _ in parse_mixture(mixture)] == [0.75, 0.25]
    for wrong, message in (
        (f"0.5={tmp_path}/b.jsonl,{tmp_path}/b.jsonl", "every part of a mixture a weight"),
        (f"0=a,{tmp_path}/b.jsonl,1=b", "every part of a mixture a weight"),
        (f"{tmp_path}/b.jsonl,{tmp_path}/none", "its part '.*none' does not exist"),
        (f"{tmp_path}/*.txt", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            read(wrong)


BAD = [
    (b'{"text": "\xe9"}', "not UTF-8"),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text"', "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"texts": "a"}', "no such field"),
    (b'{"text": 3}', "not a string"),
    (b'{"text": "a\\ud800"}', "half a surrogate pair"),
    (b'{"text": "' + 300 * b"x" + b'"}', "too long"),
    (b'{"text": "' + 90_000 * b"x" + b'"}', "too long"),
]


def test_what_is_no_document_is_counted_listed_and_not_fatal(tmp_path):
    good = [b'{"text": "%d"}' % i for i in range(len(BAD) + 1)]
    data = b"".join(a + b"\n" + b[0] + b"\n" for a, b in zip(good, BAD, strict=False)) + good[-1]
    (tmp_path / "a.jsonl").write_bytes(data)
    config = DataConfig(source="path", path=str(tmp_path), max_document_bytes=200)
    corpus = load_corpus(config, tmp_path / "not" / "yet" / "rejected.json")
    assert len(corpus.train + corpus.held_out) == len(good)
    expected = [reason for _, reason in BAD]
    assert corpus.skipped == {reason: expected.count(reason) for reason in expected}
    listed = [json.loads(line) for line in (tmp_path / "not" / "yet" / "rejected.json").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in listed] == [
        ("a.jsonl", 2 * i, reason) for i, reason in enumerate(expected, start=1)
    ]
    for line, _ in BAD:
        (tmp_path / "a.jsonl").write_bytes(good[0] + b"\n" + line)
        with pytest.raises(UserError, match=r"a\.jsonl:2 .*data\.strict=True"):
            load_corpus(DataConfig(source="path", path=str(tmp_path), max_document_bytes=200, strict=True))


def test_bytes_that_are_no_text_cost_their_piece_only(tmp_path):
    pieces = ["a" * 1990 + "\n\n", "b" * 1990 + "\n\n", "c" * 1990 + "\n"]
    data = "".join(pieces).encode()
    (tmp_path / "a.txt").write_bytes(data[:2000] + b"\xff" + data[2000:])
    first, bad, last = read(tmp_path / "a.txt")
    assert (first.text, last.text) == (pieces[0], pieces[2])
    assert (bad.line, bad.reason) == (3, "not UTF-8") and "a.txt:3 is not UTF-8: byte 0xff" in bad.detail


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(lines([{"text": str(i)} for i in range(20_000)]))[:-2000]),
        ("a.jsonl.zst", zstd(lines([{"text": str(i)} for i in range(200_000)]))[:-2000]),
        ("a.txt.gz", b"no gzip"),
        ("a.parquet", b"no parquet"),
        ("a.arrow", b"no arrow"),
        ("a.array_record", b"no array record"),
    ],
)
def test_a_damaged_file_is_named_with_the_line_that_was_reached(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"data.path: cannot read .*{name}:\d+: .+\. Mend the file"):
        read(tmp_path)


# --- large files -------------------------------------------------------------------------------------


@given(
    st.lists(st.text(alphabet="ab é漢\U0001f9ee\r\t", max_size=40), min_size=1, max_size=12),
    st.integers(1, 60),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_units_cut_a_file_without_loss_and_characters_nowhere(tmp_path_factory, parts, size, ended):
    folder = tmp_path_factory.mktemp("units")
    (folder / "a.txt").write_bytes(("\n".join(parts) + "\n" * ended).encode())
    (folder / "b.jsonl").write_bytes(lines([{"text": part} for part in parts]))
    with mock.patch.object(files, "UNIT_BYTES", size), mock.patch.object(readers, "_accepted", lambda text, _: text):
        pieces, documents = read(folder / "a.txt"), read(folder / "b.jsonl")
        assert len(find_units(DataConfig(path=str(folder / "b.jsonl")))) >= len(parts) * 13 // size
    assert all(isinstance(piece, Document) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == "\n".join(parts) + "\n" * ended
    assert [document.text for document in documents] == parts
    assert len({d.name for d in documents}) == len(documents)


@pytest.mark.parametrize("size", [1, 16, 40, 10_000])
def test_lines_are_counted_from_the_beginning_of_the_file(tmp_path, size):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x" if i % 7 else ""} for i in range(50)]))
    (tmp_path / "a.txt").write_bytes(b"".join(b"\xff\n" if i % 7 == 0 else b"x\n" for i in range(50)))
    with mock.patch.object(files, "UNIT_BYTES", size), mock.patch("rpt_jax.corpus.text_splitting.PIECE_CHARACTERS", 2):
        for name in ("a.jsonl", "a.txt"):
            bad = [item.line for item in read(tmp_path / name) if not isinstance(item, Document)]
            assert bad == [i + 1 for i in range(50) if i % 7 == 0], name
