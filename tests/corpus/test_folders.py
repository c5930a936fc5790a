"""What a folder stands for: which files are read, and what is said about the others."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import Document
from rpt_jax.corpus.files import check_path, find_file_ranges
from rpt_jax.corpus.readers import read_file_range
from rpt_jax.errors import UserError
from rpt_jax.infra.storage import INDEX_FILES
from tests.helpers.corpora import write_jsonl


def write(path: Path) -> None:
    """Write a document that is the file's name, as JSON lines or as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".jsonl" in path.name:
        write_jsonl(path, [path.name])
    else:
        path.write_text(path.name)


def texts_of(path: Path | str) -> list[str]:
    config = DataConfig(source="path", path=str(path))
    check_path(config)
    items = [item for file_range in find_file_ranges(config) for item in read_file_range(file_range, config)]
    return [item.text if isinstance(item, Document) else item.reason for item in items]


def test_hidden_files_and_folders_are_counted_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / ".cache" / "texts"
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "b/.git/c.txt"):
        write(root / name)
    with caplog.at_level(logging.INFO):
        assert texts_of(root) == ["a.jsonl"], "the folder itself may be in a hidden one"
    assert "hidden: 4 (such as" in caplog.text
    assert texts_of(root / "._a.jsonl") == ["._a.jsonl"], "it is named"


def test_the_index_of_the_copy_of_a_url_is_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", *INDEX_FILES):
        write(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path) == ["a.jsonl"]
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "**", "*/*.jsonl", "*"])
def test_a_glob_does_not_match_hidden_folders_that_it_does_not_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    for name in ("b/a.jsonl", "__MACOSX/a.jsonl", "__MACOSX/b/._a.jsonl"):
        write(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert texts_of(f"{tmp_path}/{pattern}") == ["a.jsonl"]
    assert f"hidden: 1 (such as {tmp_path}/__MACOSX)" in caplog.text
    assert texts_of(f"{tmp_path}/__MACOSX/*.jsonl") == texts_of(f"{tmp_path}/**/__MACOSX/*.jsonl") == ["a.jsonl"]


def test_files_that_are_not_read_are_counted_by_ending_with_an_example(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.md", "sub/c.md", "LICENSE", "d.parquet.gz"):
        write(tmp_path / name)
    (tmp_path / "e.jsonl").touch()
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path) == ["a.txt"]
    for part in (
        f".md files: 2 (such as {tmp_path}/b.md)",
        "files without an ending: 1",
        ".gz files: 1",
        "empty files: 1",
    ):
        assert part in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.txt")
    write(tmp_path / "corpus" / "b" / "b.txt")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "b" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "c.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert texts_of(tmp_path / "corpus") == ["b.txt", "a.txt", "a.txt"]


def test_a_dangling_link_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl")
    link = tmp_path / "b.jsonl"
    link.symlink_to("/nowhere/b.jsonl")
    assert texts_of(tmp_path) == ["a.jsonl"]
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(link) in record.getMessage()
    with pytest.raises(UserError, match=r"broken links: 1 \(such as .*b\.jsonl") as raised:
        check_path(DataConfig(source="path", path=str(link)))
    assert raised.value.field == "data.path"


@pytest.mark.parametrize(
    ("read", "evaluation"),
    [
        (["dataset_dict.json", "train/a.jsonl"], ["test/b.jsonl", "validation/deep/c.jsonl"]),
        (["dataset_dict.json", "algebra/a.jsonl"], ["test/b.jsonl"]),
        (
            ["data/train-00000-of-00001.jsonl"],
            ["data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"],
        ),
        (["c4-train.00000-of-00002.jsonl"], ["c4-validation.00000-of-00001.jsonl"]),
        (["train.jsonl"], ["test.jsonl", "dev.jsonl"]),
        (["test/a.jsonl", "eval.txt", "a-train.txt", "b-test.txt", "test-00000-of-00001.jsonl"], []),
    ],
)
def test_evaluation_splits_next_to_training_splits_are_read_only_if_they_are_named(
    tmp_path: Path, read: list[str], evaluation: list[str]
) -> None:
    for name in read + evaluation:
        write(tmp_path / name)
    expected = [Path(name).name for name in sorted(read, key=lambda name: Path(name).parts) if ".json" != name[-5:]]
    assert texts_of(tmp_path) == expected
    for name in evaluation:
        assert texts_of(tmp_path / Path(name).parts[0])[0]
        assert texts_of(tmp_path / name) == [Path(name).name]


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("data/*.jsonl", ["train-00000-of-00001.jsonl"]),
        ("data/test-*.jsonl", ["test-00000-of-00001.jsonl"]),
        ("dict/*", ["a.jsonl"]),
        ("dict/**", ["a.jsonl"]),
        ("dict/**/*.jsonl", ["a.jsonl"]),
        ("*/t*/*.jsonl", ["a.jsonl"]),
        ("dict/test/*.jsonl", ["b.jsonl"]),
        ("*/test/*.jsonl", ["b.jsonl"]),
    ],
)
def test_a_glob_matches_evaluation_splits_only_if_it_names_them(
    tmp_path: Path, pattern: str, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        write(tmp_path / "data" / name)
    for name in ("dataset_dict.json", "train/a.jsonl", "test/b.jsonl"):
        write(tmp_path / "dict" / name)
    assert texts_of(tmp_path / pattern) == read
    monkeypatch.chdir(tmp_path)
    assert texts_of(pattern) == read, "also below the current folder"


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="Permission denied") as raised:
        check_path(DataConfig(source="path", path=str(tmp_path)))
    assert raised.value.field == "data.path"


def test_the_check_of_the_path_does_not_walk_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write(tmp_path / f"{number}" / "a.txt")
    listed = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    check_path(DataConfig(source="path", path=str(tmp_path)))
    assert len(listed) == 2
