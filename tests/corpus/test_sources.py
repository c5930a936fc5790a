"""Splits, duplicates, and the texts that a tokenizer is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest

from rpt_jax.config import DataConfig, from_config_dict
from rpt_jax.corpus.documents import Document
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions
from rpt_jax.corpus.sources import WHOLE_CORPUS, check_source, training_texts
from rpt_jax.errors import UserError
from tests.helpers.corpora import write_jsonl
from tests.helpers.whole_corpus import load_corpus


def texts_of(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def test_the_split_does_not_depend_on_the_order_of_documents(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(30)]
    forward = load_corpus(write_jsonl(tmp_path / "a.jsonl", texts))
    backward = load_corpus(write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    assert len(forward.held_out) == 6
    assert set(texts_of(forward.held_out)) == set(texts_of(backward.held_out))
    assert set(texts_of(forward.train)) == set(texts) - set(texts_of(forward.held_out))
    # Pinned, because Python's own hash, which is salted, would also pass all of the above.
    assert texts_of(forward.held_out) == [f"document {i}" for i in (2, 5, 18, 19, 21, 29)]


def test_held_out_documents_is_a_limit_and_all_others_are_trained_on(tmp_path: Path) -> None:
    config = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    loaded = load_corpus(dataclasses.replace(config, path=str(tmp_path), held_out_documents=2))
    assert (len(loaded.train), len(loaded.held_out)) == (28, 2)
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    loaded = load_corpus(config)
    assert (len(loaded.train), len(loaded.held_out)) == (1, 1)


def test_empty_and_repeated_documents_are_counted(tmp_path: Path) -> None:
    loaded = load_corpus(write_jsonl(tmp_path / "a.jsonl", ["one", "", "two", " \n", "one", "three"]))
    assert sorted(texts_of(loaded.train + loaded.held_out)) == ["one", "three", "two"]
    assert loaded.skipped == {"empty": 2, "duplicate": 1}


@pytest.mark.parametrize(("text", "message"), [("too short", "has 1 distinct"), ("", "empty files: 1")])
def test_fewer_than_two_documents_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load_corpus(DataConfig(source="path", path=str(tmp_path / "a.txt"), strict=True))
    assert raised.value.field == "data.path"


def test_an_unknown_source_gets_a_suggestion() -> None:
    with pytest.raises(UserError) as raised:
        from_config_dict({"data": {"source": "gsm_symbolc"}})
    assert raised.value.field == "data.source"


def test_a_missing_source_is_found_before_it_is_read(tmp_path: Path) -> None:
    check_source(DataConfig())
    with pytest.raises(UserError) as raised:
        check_source(DataConfig(source="path", path=str(tmp_path / "missing.txt")))
    assert raised.value.field == "data.path"


def test_training_texts_are_the_training_documents_or_a_sample_of_them(tmp_path: Path) -> None:
    advances = []

    def sample(config: DataConfig, max_bytes: int) -> list[str]:
        return list(training_texts(config, WHOLE_CORPUS, max_bytes, lambda: advances.append(None)))

    texts = [f"text {i} {'é' * (i % 7)}" for i in range(50)]
    config = write_jsonl(tmp_path / "a.jsonl", [*texts, "text 3 ééé", ""])
    train = texts_of(load_corpus(config).train)
    assert sample(config, 2**20) == train
    assert len(advances) == 2, "the only file range is read twice"
    some = sample(config, 200)
    assert 150 < sum(len(text.encode()) for text in some) <= 200
    assert some == [text for text in train if text in some]
    backward = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    assert sample(backward, 200) == some[::-1]
    assert len(sample(config, 1)) == 1
    generated = DataConfig(
        source_options=GsmSymbolicOptions(documents=200, held_out_templates=7), held_out_documents=60
    )
    assert sample(generated, 2**30) == texts_of(load_corpus(generated).train)
