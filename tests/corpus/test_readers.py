"""Files of text: every format gives the same documents, and invalid records are counted, listed and described."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.config import DataConfig
from rpt_jax.corpus import files, text_splitting
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.files import find_file_ranges, parse_mixture
from rpt_jax.corpus.readers import read_file_range, read_records
from rpt_jax.corpus.records import RecordText, document_parser
from rpt_jax.errors import UserError
from tests.helpers.corpora import json_lines, write_every_format, write_jsonl, zstd
from tests.helpers.whole_corpus import load_corpus

TEXTS = ["plain", "crlf\r\nlone\rend\n", "e\u0301 \ufb01 \U0001f9ee", "漢字\u2028\x85", "nul\x00 bell\x07", " spaces  "]


def read(path: Path | str, **fields: object) -> list[Document | Rejected]:
    config = DataConfig(source="path", path=str(path), **fields)
    return [item for file_range in find_file_ranges(config) for item in read_file_range(file_range, config)]


def read_documents(path: Path | str, **fields: object) -> list[Document]:
    documents = []
    for item in read(path, **fields):
        assert isinstance(item, Document), item
        documents.append(item)
    return documents


def read_texts(path: Path | str, **fields: object) -> list[str]:
    return [document.text for document in read_documents(path, **fields)]


def texts_of(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


# --- formats ---


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    paths = write_every_format(tmp_path, [{"text": text, "number": i} for i, text in enumerate(TEXTS)])
    assert len(paths) == 7
    for path in paths:
        assert read_texts(path) == TEXTS, path
    assert len(read_texts(tmp_path)) == len(read_texts(f"{tmp_path}/**")) == 7 * len(TEXTS)
    names = [document.name for document in read_documents(tmp_path)]
    assert len(set(names)) == len(names)


def test_a_template_combines_the_fields_of_a_record(tmp_path: Path) -> None:
    records = [{"problem": "1 + {x}?", "solution": "{problem} is 1 + x", "answer": "1+x"}]
    template = "Q: {problem}\n{solution} {not a field}"
    for path in write_every_format(tmp_path, records):
        texts = read_texts(path, document_template=template)
        assert texts == ["Q: 1 + {x}?\n{problem} is 1 + x {not a field}"], path
        [item] = read(path, document_template="{question}{answer}")
        assert isinstance(item, Rejected)
        assert item.reason == "no such field" and "'question' of data.document_template" in item.detail


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    texts = ["cr\r\nlf\r", "\ufeffbom", "e\u0301 \ufb01", "line\u2028separator\x85", " spaces  ", "nul\x00"]
    loaded = load_corpus(write_jsonl(tmp_path / "a.jsonl", texts))
    assert set(texts_of(loaded.train + loaded.held_out)) == set(texts)

    data = ("line\r\n" * 500 + "\r\n" + "other\r\n" * 400 + "\ufb01n  ").encode()
    (tmp_path / "b.txt").write_bytes(data)
    loaded = load_corpus(DataConfig(source="path", path=str(tmp_path / "b.txt")))
    documents = sorted(loaded.train + loaded.held_out, key=lambda d: int(d.name.partition(":")[2]))
    assert len(documents) > 2 and loaded.skipped == {}
    # A name has the line number, by which a chunk is found in its file.
    lines = data.decode().split("\r\n")
    for document in documents:
        assert lines[int(document.name.partition(":")[2]) - 1] == document.text.split("\r\n")[0]


def test_the_byte_order_mark_and_blank_lines_of_a_jsonl_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\n\n')
    documents = read_documents(tmp_path)
    assert [(d.name, d.text) for d in documents] == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]


def test_the_byte_order_mark_of_a_txt_is_skipped_and_its_line_ends_are_kept(tmp_path: Path) -> None:
    chunks = ["a" * 1990 + "\r\n\r\n", "b" * 1990 + "\r\n"]
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbf" + "".join(chunks).encode())
    for path in (tmp_path, tmp_path / "A.TXT"):
        documents = read_documents(path)
        assert [(d.name, d.text) for d in documents] == [("A.TXT:1", chunks[0]), ("A.TXT:3", chunks[1])]


def test_a_very_long_line_becomes_documents_whose_names_locate_them(tmp_path: Path) -> None:
    line = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "a.txt").write_text(f"first\n{line}\nlast")
    documents = read_documents(tmp_path / "a.txt")
    assert len(documents) > 10 and all(len(d.text) <= 2000 for d in documents)
    lines = ["", "first\n", f"{line}\n", "last"]
    for document in documents:
        _, number, *column = document.name.split(":")
        rest = "".join(lines[int(number) :])[int(column[0]) - 1 if column else 0 :]
        assert rest.startswith(document.text)
    assert len({d.name for d in documents}) == len(documents)


# --- paths ---


def test_a_folder_is_read_recursively_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("first")
    (tmp_path / "a.txt").write_text("second")
    (tmp_path / "ignored.md").write_text("third")
    write_jsonl(tmp_path / "c.jsonl", ["fourth", "fifth"])
    names = [document.name for document in read_documents(tmp_path)]
    assert names == ["a.txt:1", "b/one.txt:1", "c.jsonl:1", "c.jsonl:2"]


def test_documents_know_their_part_of_a_mixture(tmp_path: Path) -> None:
    for name in ("one, two.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert read_texts(tmp_path / "one, two.jsonl") == ["one, two.jsonl"]
    mixture = f"0.75={tmp_path}/one*, 0.25={tmp_path}/b.jsonl"
    documents = read_documents(mixture)
    assert [(d.text, d.mixture_part) for d in documents] == [("one, two.jsonl", 0), ("b.jsonl", 1)]
    assert [weight for weight, _ in parse_mixture(mixture)] == [0.75, 0.25]
    assert parse_mixture(f"2={tmp_path}/b.jsonl") == [(2.0, f"{tmp_path}/b.jsonl")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("{}/missing", "does not exist"),
        ("{}/*.txt", "does not exist"),
        ("{}/empty", "is a folder without any"),
        ("{}/a.md", r"matches no readable file: .* \.md files: 1 \(such as .*a\.md"),
        ("0.5={}/b.jsonl,{}/b.jsonl", "every part of a mixture a weight"),
        ("0=a,{}/b.jsonl,1=b", "every part of a mixture a weight"),
        ("0={}/b.jsonl,0={}/b.jsonl", "every part of a mixture a weight"),
        ("{}/b.jsonl,", "has an empty part"),
        (", {}/b.jsonl", "has an empty part"),
        ("{}/b.jsonl,{}/missing", "part '.*missing' of the mixture does not exist"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, path: str, message: str) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["text"])
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        read(path.replace("{}", str(tmp_path)))
    assert raised.value.field == "data.path"


# --- invalid records ---

INVALID = [
    (b'{"text": "\xe9"}', "not UTF-8"),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text"', "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"texts": "a"}', "no such field"),
    (b'{"text": 3}', "not a string"),
    (b'{"text": "a\\ud800"}', "unpaired surrogate"),
    (b'{"text": "' + 300 * b"x" + b'"}', "too long"),
    (b'{"text": "' + 90_000 * b"x" + b'"}', "too long"),
]


def test_invalid_records_are_counted_and_listed(tmp_path: Path) -> None:
    valid = [b'{"text": "%d"}' % i for i in range(len(INVALID) + 1)]
    lines = [line for pair in zip(valid, [line for line, _ in INVALID], strict=False) for line in pair]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, valid[-1]]))
    rejected = tmp_path / "not" / "yet" / "rejected.json"
    config = DataConfig(source="path", path=str(tmp_path), max_document_bytes=200)
    loaded = load_corpus(config, rejected)
    assert len(loaded.train + loaded.held_out) == len(valid)
    reasons = [reason for _, reason in INVALID]
    assert loaded.skipped == {reason: reasons.count(reason) for reason in reasons}
    listed = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in listed] == [
        ("a.jsonl", 2 * i, reason) for i, reason in enumerate(reasons, start=1)
    ]


@pytest.mark.parametrize("line", [line for line, _ in INVALID], ids=range(len(INVALID)))
def test_a_strict_corpus_refuses_the_first_invalid_record(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "0"}\n' + line)
    with pytest.raises(UserError, match=r"a\.jsonl:2 .*data\.strict=True") as raised:
        load_corpus(DataConfig(source="path", path=str(tmp_path), max_document_bytes=200, strict=True))
    assert raised.value.field == "data.strict"


@pytest.mark.parametrize(
    ("name", "data", "line", "located"),
    [
        ("a.txt", b"one\n\ntw\xffo", 1, "0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', 2, "byte 10 "),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', 2, ""),
        ("a.jsonl", b"[" * 200000, 1, ""),
        ("a.jsonl", b'"a"\n', 1, "str"),
        ("a.jsonl", b'{"texts": "a", "id": 3}\n', 1, "'texts'"),
        ("a.jsonl", b'{"text": 3}\n', 1, "'text'"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', 1, "character 1"),
    ],
)
def test_the_description_of_an_invalid_record_locates_it(
    tmp_path: Path, name: str, data: bytes, line: int, located: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        load_corpus(DataConfig(source="path", path=str(tmp_path / name), strict=True))
    assert raised.value.field == "data.strict"
    assert f"{name}:{line} " in str(raised.value) and located in str(raised.value)


def test_a_byte_that_is_not_utf8_invalidates_only_its_chunk(tmp_path: Path) -> None:
    chunks = ["a" * 1990 + "\n\n", "b" * 1990 + "\n\n", "c" * 1990 + "\n"]
    data = "".join(chunks).encode()
    (tmp_path / "a.txt").write_bytes(data[:2000] + b"\xff" + data[2000:])
    first, invalid, last = read(tmp_path / "a.txt")
    assert isinstance(first, Document) and isinstance(invalid, Rejected) and isinstance(last, Document)
    assert (first.text, last.text) == (chunks[0], chunks[2])
    assert (invalid.line, invalid.reason) == (3, "not UTF-8")
    assert "a.txt:3 is not UTF-8: byte 0xff" in invalid.detail


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines({"text": str(i)} for i in range(20_000)))[:-2000]),
        ("a.jsonl.zst", zstd(json_lines({"text": str(i)} for i in range(200_000)))[:-2000]),
        ("a.txt.gz", b"not gzip"),
        ("a.parquet", b"not parquet"),
        ("a.arrow", b"not arrow"),
        ("a.array_record", b"not an array record"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_for_a_damaged_file_names_the_line_that_was_reached(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"cannot read .*{name}:\d+: .+\. Repair the file") as raised:
        read(tmp_path)
    assert raised.value.field == "data.path"


# --- file ranges ---


@given(
    st.lists(st.text(alphabet="ab é漢\U0001f9ee\r\t", max_size=40), min_size=1, max_size=12),
    st.integers(1, 60),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_file_ranges_lose_nothing_and_split_no_character(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, has_final_line_end: bool
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    text = "\n".join(["x", *lines]) + "\n" * has_final_line_end  # An empty file is not read.
    (folder / "a.txt").write_bytes(text.encode())
    # Not empty, so that every one is a document.
    texts = [f"x{line}" for line in lines]
    write_jsonl(folder / "b.jsonl", texts)
    txt = DataConfig(source="path", path=str(folder / "a.txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RANGE_BYTES", size)
        records = [
            record
            for file_range in find_file_ranges(txt)
            for _, record in read_records(file_range, document_parser(txt))
        ]
        named = [item for item in read(folder / "a.txt") if isinstance(item, Document)]
        documents = read_documents(folder / "b.jsonl")
        assert len(find_file_ranges(DataConfig(source="path", path=str(folder / "b.jsonl")))) >= len(lines) * 13 // size
    chunks = [record for record in records if isinstance(record, RecordText)]
    assert len(chunks) == len(records) and "".join(chunk.text for chunk in chunks) == text
    assert all(text.encode()[chunk.place :].startswith(chunk.text.encode()) for chunk in chunks)
    assert texts_of(documents) == texts
    assert len({d.name for d in documents}) == len(documents)
    assert len({d.name for d in named}) == len(named)


@pytest.mark.parametrize("size", [1, 16, 40, 10_000])
def test_lines_are_counted_from_the_beginning_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x" if i % 7 else "" for i in range(50)])
    (tmp_path / "a.txt").write_bytes(b"".join(b"\xff\n" if i % 7 == 0 else b"x\n" for i in range(50)))
    monkeypatch.setattr(files, "RANGE_BYTES", size)
    monkeypatch.setattr(text_splitting, "CHUNK_CHARACTERS", 2)
    for name in ("a.jsonl", "a.txt"):
        invalid = [item.line for item in read(tmp_path / name) if isinstance(item, Rejected)]
        assert invalid == [i + 1 for i in range(50) if i % 7 == 0], name
