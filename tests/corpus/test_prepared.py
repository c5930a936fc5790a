"""Task "score": a corpus that is tokenized, scored and opened again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rpt_jax import main
from rpt_jax.config import DataConfig
from rpt_jax.corpus import entropy, prepared, tokenization
from rpt_jax.corpus.prepared import open_prepared, tokenize_on_leader
from rpt_jax.corpus.store import Records
from rpt_jax.corpus.tokenization import plan_shards
from rpt_jax.distributed.rendezvous import Heartbeat
from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.corpora import scoring_experiment, write_number_corpus
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_number_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of two runs that prepared one shard each; the second one completed the corpus."""
    workdir = tmp_path_factory.mktemp("prepared")
    for shard in ("0/2", "1/2"):
        assert not (workdir / "manifest.json").exists()
        main.run(scoring_experiment(Path(corpus.path), shard=shard), workdir)
    return workdir


def test_scoring_all_shards_writes_a_manifest_and_a_plot(finished: Path, corpus: DataConfig) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["shards"] == 2 and manifest["counts"]["documents"] == 63
    assert manifest["counts"]["rejected"] == {"empty": 3, "duplicate": 2}
    fractions = manifest["positions_above_nats"]
    assert 1 > fractions["0.5"] > fractions["1.0"] > fractions["1.5"] > 0
    assert (finished / "plots" / "entropy.png").read_bytes().startswith(b"\x89PNG")
    opened = open_prepared(corpus, TOKENIZER, finished)
    assert len(opened.scores) == len(opened.corpus.tokens)
    for (ids, _), (renormalized, partial) in zip(opened.corpus.tokens, opened.scores, strict=True):
        assert len(ids) == len(renormalized) == len(partial)
        assert (renormalized >= 0).all() and (partial >= 0).all()


def test_complete_shards_are_not_written_again_and_the_files_are_listed_once(
    finished: Path, corpus: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.array_record")}
    list_files = tokenization.find_file_ranges
    listed = []
    monkeypatch.setattr(tokenization, "find_file_ranges", lambda data: listed.append(data) or list_files(data))
    main.run(scoring_experiment(Path(corpus.path), shard="0/2"), finished)
    assert len(listed) == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*.array_record")}


def test_progress_counts_every_batch_including_those_of_complete_shards(
    finished: Path, corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    for name in ("manifest.json", "scores-00001-of-00002.json"):
        (workdir / name).unlink()
    bars: list[tuple[str, int, int, list[str]]] = []

    class RecordingProgress(prepared.Progress):
        def __init__(self, name: str, total: int, done: int = 0) -> None:
            super().__init__(name, total, done)
            self.statuses: list[str] = []
            bars.append((name, total, done, self.statuses))

        def advance(self, status: str = "") -> None:
            self.statuses.append(status)

    monkeypatch.setattr(prepared, "Progress", RecordingProgress)
    size = sum(path.stat().st_size for path in Path(corpus.path).iterdir())
    monkeypatch.setattr(tokenization, "SHARD_BYTES", size // 2 + 1)
    monkeypatch.setattr(entropy, "BLOCK_BATCHES", 2)
    main.run(scoring_experiment(Path(corpus.path)), workdir)
    [(_, total, done, statuses)] = [bar for bar in bars if "score" in bar[0]]
    assert 0 < done < total
    assert len(statuses) == total - done > 2 and set(statuses) == {"shard 1 of 2"}


@pytest.mark.parametrize(
    ("changes", "other", "field"),
    [
        ({"max_document_tokens": 32}, "", "data.max_document_tokens"),
        ({"entropy_top_k": 4}, "", "data.entropy_top_k"),
        ({"path": "a.jsonl"}, "", "data.path"),
        ({}, "tokenizer", "policy.path"),
        ({}, "proxy", "policy.path"),
    ],
)
def test_another_corpus_tokenizer_or_proxy_is_refused(
    finished: Path, corpus: DataConfig, changes: dict[str, object], other: str, field: str
) -> None:
    if "path" in changes:
        changes = {"path": f"{corpus.path}/{changes['path']}"}
    tokenizer = dataclasses.replace(TOKENIZER, fingerprint="another") if other == "tokenizer" else TOKENIZER
    proxy = "another" if other == "proxy" else ""
    with pytest.raises(UserError, match=f"manifest.json does not match this run: .*{other}") as raised:
        open_prepared(dataclasses.replace(corpus, **changes), tokenizer, finished, proxy)
    assert raised.value.field == field


def test_a_manifest_of_an_older_format_is_refused(finished: Path, corpus: DataConfig, tmp_path: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    for older in ({"content": manifest["made_from"]}, {"made_from": manifest["made_from"] | {"format": 4}}):
        (tmp_path / "manifest.json").write_text(json.dumps(older))
        with pytest.raises(UserError) as raised:
            open_prepared(corpus, TOKENIZER, tmp_path)
        assert raised.value.field == str(tmp_path / "manifest.json")


def test_a_prepared_corpus_can_be_opened_without_its_files(finished: Path, corpus: DataConfig, tmp_path: Path) -> None:
    missing = dataclasses.replace(corpus, path=str(tmp_path / "missing"))
    assert len(open_prepared(missing, TOKENIZER, finished).scores) > 0


def test_a_directory_without_a_manifest_is_refused(corpus: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist. Run task 'score'") as raised:
        open_prepared(corpus, TOKENIZER, tmp_path)
    assert raised.value.field == "data.prepared"


def test_a_corpus_of_invalid_records_is_refused_with_the_first_of_them(tmp_path: Path) -> None:
    """Such a shard has no records."""
    path = tmp_path / "none.jsonl"
    path.write_text('{"txt": "1 + 1 = 2"}\n' * 3)
    with pytest.raises(
        UserError, match="has 0 distinct .* needed: .* has no field data.text_field='text'.* mean 'txt'\\? A"
    ):
        main.run(scoring_experiment(path), tmp_path / "run")
    assert len(Records(tmp_path / "run", "scores", 1)) == 0


def test_a_disk_without_room_for_the_corpus_is_found_before_it_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 bytes of text are about 1,000 tokens of 14 bytes."""
    (tmp_path / "a.txt").write_text("x" * 3_999 + "\n")
    data = DataConfig(source="path", path=str(tmp_path / "a.txt"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=13_999))
    with pytest.raises(UserError) as raised:
        tokenize_on_leader(data, plan_shards(data), TOKENIZER, tmp_path / "corpus", Heartbeat())
    assert raised.value.field == "--workdir" and not (tmp_path / "corpus").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=14_000))
    tokenize_on_leader(data, plan_shards(data), TOKENIZER, tmp_path / "corpus", Heartbeat())
