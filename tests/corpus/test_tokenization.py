"""Tokenizing a corpus into shards: their contents, their number, and what is kept of an earlier run."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus import tokenization
from rpt_jax.corpus.documents import SPLITS
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions
from rpt_jax.corpus.store import document_names
from rpt_jax.corpus.tokenization import parse_shard, plan_shards, tokenize
from rpt_jax.corpus.tokenized import NEAR_DUPLICATES, TokenizedCorpus, open_tokens, report_corpus
from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.corpora import write_jsonl, write_number_corpus
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import CHILD_SECONDS
from tests.helpers.whole_corpus import load_corpus

TOKENIZER = load_tokenizer(TINY)


def ignore_progress(status: str) -> None:
    assert status


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_number_corpus(tmp_path_factory.mktemp("corpus"))


def tokenize_corpus(
    config: DataConfig,
    directory: Path,
    advance: Callable[[str], None] = ignore_progress,
    tokenizer: Tokenizer = TOKENIZER,
) -> None:
    tokenize(config, plan_shards(config), tokenizer, directory, advance)


def tokenize_shards(config: DataConfig, directory: Path, shards: int) -> TokenizedCorpus:
    """Tokenize one shard after the other, as separate runs do."""
    for shard in range(shards):
        tokenize_corpus(dataclasses.replace(config, shard=f"{shard}/{shards}"), directory)
    return open_tokens(config, directory, shards)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_document_is_in_its_split_with_its_bytes_unchanged(
    corpus: DataConfig, tmp_path: Path, shards: int
) -> None:
    """The split does not depend on the number of shards."""
    expected = load_corpus(corpus)
    opened = tokenize_shards(corpus, tmp_path, shards)
    for split in SPLITS:
        texts: dict[int, bytes] = {}
        windows = opened.windows(split)
        for number, ids in zip(windows.numbers_N, windows, strict=True):
            assert 0 < len(ids) <= 64
            document = int(opened.document_W[number])
            texts[document] = texts.get(document, b"") + TOKENIZER.token_bytes(ids)
        found = [text.decode() for text in texts.values()]
        documents = [document.text for document in getattr(expected, split)]
        assert sorted(found) == sorted(documents)
        if shards == 1:
            assert found == documents
        assert opened.token_count(split) == sum(map(len, windows))
    ids, lengths = opened.tokens[3]
    assert lengths.tolist() == [len(TOKENIZER.pieces[i]) for i in ids]


def test_windows_of_a_document_are_one_cluster(corpus: DataConfig, tmp_path: Path) -> None:
    opened = tokenize_shards(corpus, tmp_path, 2)
    for split in ("train", "held_out"):
        clusters = opened.clusters(split).tolist()
        documents = opened.document_W[opened.windows(split).numbers_N].tolist()
        assert len(set(clusters)) == len(set(documents)) == len(set(zip(clusters, documents, strict=True)))
        assert len(set(clusters)) < len(clusters), "no document has several windows"


def test_records_of_a_group_are_one_cluster_and_pieces_of_a_text_are_another(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    records = [{"text": f"solution {i}", "problem": i // 2} for i in range(20)]
    (texts / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(source="path", path=str(texts), group_by="problem")
    clusters = tokenize_shards(config, tmp_path / "tokens", 1).clusters("held_out").tolist()
    assert len(clusters) == 4 and len(set(clusters)) == 2

    (texts / "a.txt").write_text("".join(f"{i} {'seven and five ' * 100}\n\n" for i in range(20)))
    config = DataConfig(source="path", path=str(texts / "a.txt"))
    clusters = tokenize_shards(config, tmp_path / "pieces", 1).clusters("held_out").tolist()
    assert len(clusters) >= 4 and len(set(clusters)) == 1


def test_unseen_documents_of_one_template_are_one_cluster(tmp_path: Path) -> None:
    options = GsmSymbolicOptions(documents=12, held_out_templates=3)
    config = DataConfig(source_options=options, held_out_documents=36, max_document_tokens=64)
    opened = tokenize_shards(config, tmp_path, 2)
    documents = opened.document_W[opened.windows("unseen").numbers_N].tolist()
    names = document_names(opened.directory, opened.shards, documents)
    templates = [names[document].split(":")[1] for document in documents]
    clusters = opened.clusters("unseen").tolist()
    assert len(set(templates)) == len(set(clusters)) == len(set(zip(templates, clusters, strict=True))) == 3
    assert len(set(documents)) == 12


def test_rejected_records_are_listed_and_counted(
    corpus: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = tokenize_shards(corpus, tmp_path, 1)
    path = tmp_path / "rejected-00000-of-00001.jsonl"
    rejected = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejected] == [(f"{n}.jsonl", 22, "empty") for n in "abc"]
    with caplog.at_level(logging.INFO):
        counts = report_corpus(opened)
    assert counts["rejected"] == {"empty": 3, "duplicate": 2} and counts["documents"] == 63
    assert "3 empty, 2 duplicate" in caplog.text and str(path) in caplog.text


def test_near_duplicates_of_training_documents_are_listed_by_name(tmp_path: Path) -> None:
    texts = [" ".join(str(7 * i + j) for j in range(60)) for i in range(0, 600, 20)]
    config = write_jsonl(tmp_path / "a.jsonl", [text + end for text in texts for end in ("", ".")])
    opened = tokenize_shards(config, tmp_path / "tokens", 2)
    counts = report_corpus(opened)
    pairs = [json.loads(line) for line in (tmp_path / "tokens" / NEAR_DUPLICATES).read_text().splitlines()]
    assert len(pairs) == counts["near_duplicates"] > 3
    # The two documents of a text are in consecutive lines.
    for pair in pairs:
        held_out, train = (int(pair[split].partition(":")[2]) - 1 for split in ("held_out", "train"))
        assert held_out // 2 == train // 2 and 0.8 <= pair["share"] <= 1


def test_a_part_of_a_training_document_counts_as_its_near_duplicate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [" ".join(str(97 * i + j) for j in range(200)) for i in range(0, 900, 30)]
    halves = [text[half] for text in texts for half in (slice(len(text) // 2), slice(len(text) // 2, None))]
    config = write_jsonl(tmp_path / "a.jsonl", [*texts, *halves])
    opened = tokenize_shards(config, tmp_path / "tokens", 2)
    with caplog.at_level(logging.INFO):
        counts = report_corpus(opened)
    expected = {
        text
        for text in load_corpus(config).held_out
        if text.text in halves
        and texts[halves.index(text.text) // 2] in {document.text for document in load_corpus(config).train}
    }
    pairs = [json.loads(line) for line in (tmp_path / "tokens" / NEAR_DUPLICATES).read_text().splitlines()]
    assert {pair["held_out"] for pair in pairs} == {document.name for document in expected}
    assert len(pairs) == counts["near_duplicates"] > 3 and counts["held_out"] == 18
    assert min(pair["share"] for pair in pairs) > 0.95
    assert f"{len(pairs)} of 18 held-out documents ({100 * len(pairs) / 18:.0f} %)" in caplog.text


def test_files_without_documents_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write_jsonl(texts / "a.jsonl", ["one", "two", ""])
    (texts / "b.jsonl").write_text('{"problem": "1 + 1 = 2"}\n' * 700 + "x\n")
    (texts / "c.csv").write_text("text,id\n")
    config = DataConfig(source="path", path=str(texts))
    report_corpus(tokenize_shards(config, tmp_path / "tokens", 2))
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert "b.jsonl (700 no such field, 1 not JSON)" in message and "c.csv (no records)" in message
    assert "a.jsonl" not in message


@pytest.mark.parametrize(("names", "warnings"), [("a", 1), ("abcdefghij", 0)])
def test_a_text_that_is_divided_between_the_splits_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: str, warnings: int
) -> None:
    for name in names:
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} {'seven and five ' * 100}\n\n" for i in range(10)))
    config = DataConfig(source="path", path=str(tmp_path))
    report_corpus(tokenize_shards(config, tmp_path / "tokens", 1))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == warnings and all(message.startswith("2 held-out documents") for message in messages)


def test_the_cache_of_a_corpus_depends_on_the_order_of_a_mixture(corpus: DataConfig) -> None:
    paths = [f"{corpus.path}/{name}.jsonl" for name in "ab"]
    digests = {
        plan_shards(dataclasses.replace(corpus, path=",".join(order))).files_digest for order in (paths, paths[::-1])
    }
    assert len(digests) == 2


def test_several_shards_are_tokenized_in_processes(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "SHARD_BYTES", 3000)
    plan = plan_shards(corpus)
    assert (list(plan.numbers), plan.shards) == ([0, 1, 2], 3)
    for is_complete in (False, True):
        statuses: list[str] = []
        tokenize_corpus(corpus, tmp_path / "a", statuses.append)
        assert len(statuses) == sum(shard.steps for shard in plan.to_prepare) == 3
        assert all(("already complete" in status) == is_complete for status in statuses)
    tokenize_shards(corpus, tmp_path / "b", 3)
    for name in ("tokens-00001-of-00003.array_record", "index-00002-of-00003.bin", "names-00000-of-00003.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_error_of_a_process_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "SHARD_BYTES", 20)
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, ["some text", "", "more text"])
    config = DataConfig(source="path", path=str(tmp_path), strict=True)
    with pytest.raises(UserError, match=r"\.jsonl:2 contains only white space"):
        tokenize_corpus(config, tmp_path / "tokens")


def test_the_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Otherwise they would keep this test's pipe open."""
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, ["seven and five are twelve " * 400] * 2_000)
    script = (
        "from pathlib import Path\n"
        "from rpt_jax.config import DataConfig\n"
        "from rpt_jax.corpus.tokenization import plan_shards, tokenize\n"
        "from rpt_jax.tokenizers.tokenizer import load_tokenizer\n"
        f"config = DataConfig(source='path', path={str(tmp_path)!r})\n"
        f"tokenize(config, plan_shards(config), load_tokenizer({str(TINY)!r}), Path({str(tmp_path / 'out')!r}), print)\n"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and "documents" in process.stdout.readline()
    process.kill()
    process.communicate(timeout=CHILD_SECONDS)
    assert not list(tmp_path.glob("out/tokens-*.json"))


def test_tokenizing_does_not_import_jax() -> None:
    script = "import sys, rpt_jax.corpus.tokenization; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_only_the_missing_shard_is_tokenized_again(corpus: DataConfig, tmp_path: Path) -> None:
    tokenize_shards(corpus, tmp_path, 2)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "tokens-00001-of-00002.json").unlink()
    tokenize_shards(corpus, tmp_path, 2)
    changed = {path.name for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert changed and all("-00001-" in name for name in changed)


@pytest.mark.parametrize("field", ["data.max_document_tokens", "data.path", "policy.path"])
def test_a_shard_of_another_corpus_or_tokenizer_is_refused(corpus: DataConfig, tmp_path: Path, field: str) -> None:
    tokenize_shards(corpus, tmp_path, 2)
    config, tokenizer = dataclasses.replace(corpus, shard="0/2"), TOKENIZER
    if field == "data.max_document_tokens":
        config = dataclasses.replace(config, max_document_tokens=65)
    elif field == "data.path":
        config = dataclasses.replace(config, path=f"{corpus.path}/a.jsonl")
    else:
        tokenizer = dataclasses.replace(TOKENIZER, fingerprint="x")
    with pytest.raises(UserError) as raised:
        tokenize_corpus(config, tmp_path, tokenizer=tokenizer)
    assert raised.value.field == field


def test_a_shard_of_an_older_format_is_refused(corpus: DataConfig, tmp_path: Path) -> None:
    tokenize_shards(corpus, tmp_path, 1)
    path = tmp_path / "tokens-00000-of-00001.json"
    summary = json.loads(path.read_text())
    summary["content"] = summary.pop("made_from")
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError) as raised:
        tokenize_shards(corpus, tmp_path, 1)
    assert raised.value.field == str(tmp_path)


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "1/"])
def test_an_impossible_shard_is_refused(shard: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_shard(shard)
    assert raised.value.field == "data.shard"
