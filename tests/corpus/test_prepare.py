"""A corpus on disk: what is prepared, resumed, refused, and chosen from it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax import main
from rpt_jax.config import DataConfig, Experiment, from_config_dict
from rpt_jax.corpus import entropy as score
from rpt_jax.corpus import prepared
from rpt_jax.corpus import tokenization as prepare
from rpt_jax.corpus.documents import SPLITS
from rpt_jax.corpus.near_duplicates import _PRIMES, _SHINGLE, near_duplicates, sketches
from rpt_jax.corpus.store import FIELDS, SKETCH, Records, ShardWriter, pack, read_summary, unpack
from rpt_jax.corpus.tokenization import open_tokens, parse_shard, tokenize
from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import ROOT, TINY
from tests.helpers.whole_corpus import load_corpus

TOKENIZER = load_tokenizer(TINY)


def write_corpus(folder: Path, count: int = 60) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        texts = [
            f"{name} {i}: " + " ".join(map(str, rng.integers(0, 99, rng.integers(1, 90)))) for i in range(count // 3)
        ]
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "repeated", ""]))


def quietly(words: str) -> None:
    assert words


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return DataConfig(source="path", path=str(folder), max_document_tokens=64, held_out_documents=7)


def tokenized(config: DataConfig, directory: Path, shards: int) -> prepare.Corpus:
    for shard in range(shards):
        tokenize(dataclasses.replace(config, shard=f"{shard}/{shards}"), TOKENIZER, directory, quietly)
    return open_tokens(config, directory, shards)


def test_shards_hold_the_corpus_whatever_their_number(corpus: DataConfig, tmp_path: Path) -> None:
    """Every document on its side, in windows, its bytes unchanged; the split does not depend on the shards."""
    expected = load_corpus(corpus)
    for shards in (1, 2, 5):
        opened = tokenized(corpus, tmp_path / str(shards), shards)
        for side in SPLITS:
            texts: dict[int, bytes] = {}
            windows = opened.windows(side)
            for number, ids in zip(windows.numbers_N, windows, strict=True):
                assert 0 < len(ids) <= 64
                document = int(opened.documents_W[number])
                texts[document] = texts.get(document, b"") + TOKENIZER.token_bytes(ids)
            found = [text.decode() for text in texts.values()]
            documents = [document.text for document in getattr(expected, side)]
            assert (found if shards == 1 else sorted(found)) == (documents if shards == 1 else sorted(documents))
        lengths = opened.tokens[3][1]
        assert lengths.tolist() == [len(TOKENIZER.pieces[i]) for i in opened.tokens[3][0]]
    rejected = [
        json.loads(line) for line in (tmp_path / "1" / "rejected-00000-of-00001.jsonl").read_text().splitlines()
    ]
    assert [(r["file"], r["line"], r["reason"]) for r in rejected] == [(f"{n}.jsonl", 22, "empty") for n in "abc"]
    counts = prepare.report_corpus(opened)
    assert counts["rejected"] == {"empty": 3, "duplicate": 2} and counts["documents"] == 63


def test_several_shards_are_made_in_processes(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "SHARD_BYTES", 3000)
    numbers, shards = parse_shard(corpus)
    assert shards == 3 and numbers == [0, 1, 2]
    for there in (False, True):
        told: list[str] = []
        tokenize(corpus, TOKENIZER, tmp_path / "a", told.append)
        assert len(told) == sum(map(prepare.steps, prepare.parts_to_prepare(corpus))) == 3
        assert all(("is there" in words) == there for words in told)
    tokenized(corpus, tmp_path / "b", 3)
    for name in ("tokens-00001-of-00003.array_record", "index-00002-of-00003.bin", "names-00000-of-00003.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killed in the middle of their work; else they would hold this pipe open for ever."""
    line = json.dumps({"text": "seven and five are twelve " * 400}) + "\n"
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(line * 2_000)
    script = (
        "from pathlib import Path\nfrom rpt_jax.config import DataConfig\nfrom rpt_jax.corpus import tokenization as prepare\n"
        "from rpt_jax.tokenizers import tokenizer\n"
        f"config = DataConfig(source='path', path={str(tmp_path)!r})\n"
        f"prepare.tokenize(config, tokenizer.load_tokenizer({str(TINY)!r}), Path({str(tmp_path / 'out')!r}), print)\n"
    )
    process = subprocess.Popen([sys.executable, "-u", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "documents" in process.stdout.readline()
    process.kill()
    process.communicate(timeout=20)
    assert not list(tmp_path.glob("out/tokens-*.json"))


def test_what_is_there_is_left_and_must_be_of_this_corpus(corpus: DataConfig, tmp_path: Path) -> None:
    tokenized(corpus, tmp_path, 2)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "tokens-00001-of-00002.json").unlink()
    tokenized(corpus, tmp_path, 2)
    changed = {path.name for path, when in made.items() if path.stat().st_mtime_ns != when}
    assert changed and all("-00001-" in name for name in changed)
    for other, message in (
        (dataclasses.replace(corpus, max_document_tokens=65), "another content"),
        (dataclasses.replace(corpus, path=f"{corpus.path}/a.jsonl"), "another files"),
    ):
        with pytest.raises(UserError, match=message):
            tokenized(other, tmp_path, 2)
    with pytest.raises(UserError, match="another tokenizer"):
        tokenize(
            dataclasses.replace(corpus, shard="0/2"), dataclasses.replace(TOKENIZER, fingerprint="x"), tmp_path, quietly
        )


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "1/"])
def test_shards_that_are_none(shard: str) -> None:
    with pytest.raises(UserError, match="data.shard='.*' must be a number"):
        parse_shard(DataConfig(shard=shard))


def test_every_altered_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    """Or does no harm: of every byte that was changed, reading complains, or gives what was written."""
    rng = np.random.default_rng(0)
    written = [
        (rng.integers(0, 1000, n).astype(np.uint32), rng.integers(0, 9, n).astype(np.uint16)) for n in range(1, 40)
    ]
    with ShardWriter(tmp_path, "tokens", 0, 1) as writer:
        for record in written:
            writer.write(record, [len(record[0])])
        writer.commit({})
    path = tmp_path / "tokens-00000-of-00001.array_record"
    data = path.read_bytes()
    used = len(data.rstrip(b"\0"))
    noticed = 0
    for at in [*range(0, used, 61), *rng.integers(0, used, 40)]:
        changed = bytearray(data)
        changed[at] ^= 0x11
        path.write_bytes(changed)
        try:
            found = list(Records(tmp_path, "tokens", 1))
        except (UserError, ValueError, RuntimeError):
            noticed += 1
        else:
            for ours, theirs in zip(found, written, strict=True):
                assert all(map(np.array_equal, ours, theirs)), at
    assert noticed > 20
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"tokens-00000-of-00001.array_record is damaged: \d+ bytes where"):
        Records(tmp_path, "tokens", 1)


def sent(thing: object) -> Any:
    """What a worker process gets of `thing`; small ones only, since a pipe holds them in between."""
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        sender.send(thing)
        return receiver.recv()


def test_records_can_be_sent_to_workers_and_swapped_ones_are_noticed(tmp_path: Path) -> None:
    for shard in range(2):
        with ShardWriter(tmp_path, "scores", shard, 2) as writer:
            for i in range(3):
                writer.write((np.full(2, 10 * shard + i), np.zeros(2)), [2])
            writer.commit({})
    records = Records(tmp_path, "scores", 2)
    assert [float(e[0]) for e, _ in sent(records)] == [0, 1, 2, 10, 11, 12]
    assert [float(e[0]) for e, _ in Records(tmp_path, "scores", 2, [1])] == [10, 11, 12]
    with pytest.raises(UserError, match="has no scores-00002-of-00003.json: prepare shard"):
        Records(tmp_path, "scores", 3, [2])
    with ShardWriter(tmp_path, "scores", 0, 1) as writer:
        writer._writer.write(records._source[1])
        writer.records = 1
        writer.commit({})
    with pytest.raises(UserError, match="record 0 was altered"):
        Records(tmp_path, "scores", 1)[0]


def test_a_corpus_without_a_document_is_a_sentence(tmp_path: Path) -> None:
    """All of it is rejected, which makes a shard without records; the error says what was wrong with the first line."""
    path = tmp_path / "none.jsonl"
    path.write_text('{"problem": "1 + 1 = 2"}\n' * 3)
    with pytest.raises(UserError, match="gives 0 distinct .* needed, .* has no field data.text_field='text'"):
        main.run(experiment(path), tmp_path / "run")
    assert len(Records(tmp_path / "run", "scores", 1)) == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 5), st.sampled_from(["tokens", "scores"]))
@settings(deadline=None)
def test_records_hold_windows_that_no_documents_share(sizes: list[int], longest: int, kind: str) -> None:
    rng, total = np.random.default_rng(sum(sizes)), sum(sizes)
    arrays = [rng.integers(0, 2**16, total).astype(t) for t in FIELDS[kind]]
    ends = prepare.window_ends(np.array(sizes), longest)
    found = [unpack(record, kind) for record in pack(7, arrays, ends, kind)]
    windows = [(d, o) for d, size in enumerate(sizes) for o in range(0, size, longest)]
    assert [len(a) for a, _ in found] == [min(longest, sizes[d] - o) for d, o in windows]
    for whole, parts in zip(arrays, zip(*found, strict=True), strict=True):
        assert {part.dtype for part in parts} == {whole.dtype}
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_unfinished_shard_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "scores", 0, 1) as writer:
        writer.write((np.zeros(1), np.zeros(1)), [1])
        raise KeyboardInterrupt
    assert read_summary(tmp_path, "scores", 0, 1) is None and not list(tmp_path.iterdir())


# --- near-duplicates ---------------------------------------------------------------------------------


def sketch_reference(ids: list[int]) -> list[int]:
    """One run of tokens after the other, in Python's integers."""
    primes, least = [int(prime) for prime in _PRIMES], [2**32 - 1] * SKETCH
    for start in range(max(1, len(ids) - _SHINGLE + 1)):
        run = zip(ids[start : start + _SHINGLE], primes, strict=False)
        value = sum((token + 1) * prime for token, prime in run) % 2**64
        value = (value ^ (value >> 29)) * primes[1] % 2**64
        value = (value ^ (value >> 32)) * primes[2] % 2**64
        least[value >> 60] = min(least[value >> 60], (value >> 20) % 2**32)
    return least


@given(st.lists(st.lists(st.integers(0, 2**18), min_size=1, max_size=40), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_sketches_are_those_of_each_document_alone(documents: list[list[int]]) -> None:
    ids_T, sizes_D = np.concatenate(documents).astype(np.uint32), np.array([len(ids) for ids in documents])
    assert sketches(ids_T, sizes_D).tolist() == [sketch_reference(ids) for ids in documents]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, 300) for _ in range(50)]
    train = sketches(np.concatenate(documents), np.full(50, 300))
    edited = documents[7].copy()
    edited[150] += 1
    asked = [edited, rng.integers(0, 1000, 300), documents[9], np.array([3])]
    held_out = sketches(np.concatenate(asked), np.array([len(ids) for ids in asked]))
    for parts in ([train], [train[:8], train[8:8], train[8:]]):
        assert [(p.held_out, p.train) for p in near_duplicates(held_out, parts)] == [(0, 7), (2, 9)]
    assert near_duplicates(held_out, [train[:0]]) == near_duplicates(held_out, []) == []


# --- the task ----------------------------------------------------------------------------------------


def experiment(folder: Path, **fields: object) -> Experiment:
    values = {"source": "path", "path": str(folder), "max_document_tokens": 64, "held_out_documents": 7}
    values |= {"score_batch_windows": 8, **fields}
    small = {"prompts_per_step": 8, "logit_chunk_tokens": 1024}
    return from_config_dict(
        {
            "task": "score",
            "policy": {"path": str(TINY)},
            "data": values,
            "training": small,
        }
    )


@pytest.fixture(scope="module")
def finished(corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, as two processes would make them; the second knows that all is there."""
    workdir = tmp_path_factory.mktemp("prepared")
    for shard in ("0/2", "1/2"):
        assert not (workdir / "manifest.json").exists()
        main.run(experiment(Path(corpus.path), shard=shard), workdir)
    return workdir


def test_the_task_leaves_a_manifest_and_a_plot(finished: Path, corpus: DataConfig) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["shards"] == 2 and manifest["counts"]["documents"] == 63
    assert manifest["counts"]["rejected"] == {"empty": 3, "duplicate": 2}
    shares = manifest["positions_above_nats"]
    assert 1 > shares["0.5"] > shares["1.0"] > shares["1.5"] > 0
    assert (finished / "entropy.png").read_bytes().startswith(b"\x89PNG")
    opened = prepared.open_prepared(corpus, TOKENIZER, finished)
    assert len(opened.scores) == len(opened.corpus.tokens)
    for (ids, _), (entropy, plain) in zip(opened.corpus.tokens, opened.scores, strict=True):
        assert len(ids) == len(entropy) == len(plain) and (entropy >= 0).all() and (plain >= 0).all()
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.array_record")}
    main.run(experiment(Path(corpus.path), shard="0/2"), finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*.array_record")}


def test_scoring_tells_every_forward_pass_and_how_many_there_will_be(
    finished: Path, corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it goes on: what is there counts as done."""
    shutil.copytree(finished, tmp_path / "again")
    for name in ("manifest.json", "scores-00001-of-00002.json"):
        (tmp_path / "again" / name).unlink()
    bars: list[tuple[str, int, int, list[str]]] = []

    class Bar(prepared.Progress):
        def __init__(self, name: str, total: int, done: int = 0) -> None:
            super().__init__(name, total, done)
            bars.append((name, total, done, told := []))
            self.advance = told.append

    monkeypatch.setattr(prepared, "Progress", Bar)
    monkeypatch.setattr(prepare, "parse_shard", lambda config: ([0, 1], 2))
    monkeypatch.setattr(prepared, "parse_shard", lambda config: ([0, 1], 2))
    monkeypatch.setattr(score, "_BLOCK", 2)
    main.run(experiment(Path(corpus.path)), tmp_path / "again")
    [(name, total, done, told)] = [bar for bar in bars if "score" in bar[0]]
    assert 0 < done < total and len(told) == total - done > 2 and set(told) == {"shard 1 of 2"}


def test_another_corpus_tokenizer_or_proxy_is_refused(finished: Path, corpus: DataConfig, tmp_path: Path) -> None:
    for data, tokenizer, proxy, message in (
        (
            dataclasses.replace(corpus, max_document_tokens=32),
            TOKENIZER,
            "",
            "data.max_document_tokens is 64 there and 32",
        ),
        (dataclasses.replace(corpus, entropy_top_k=4), TOKENIZER, "", "data.entropy_top_k is 16 there and 4"),
        (dataclasses.replace(corpus, path=f"{corpus.path}/a.jsonl"), TOKENIZER, "", "files is"),
        (corpus, dataclasses.replace(TOKENIZER, fingerprint="other"), "", "tokenizer is"),
        (corpus, TOKENIZER, "other", "proxy is"),
    ):
        with pytest.raises(UserError, match=f"manifest.json does not match this run: {message}"):
            prepared.open_prepared(data, tokenizer, finished, proxy)
    elsewhere = dataclasses.replace(corpus, path=str(tmp_path / "not" / "here"))
    assert prepared.open_prepared(elsewhere, TOKENIZER, finished)
    with pytest.raises(UserError, match="does not exist. Run task 'score'"):
        prepared.open_prepared(corpus, TOKENIZER, tmp_path)


def test_two_processes_score_what_one_does(finished: Path, corpus: DataConfig, tmp_path: Path) -> None:
    """On one mesh, as training has it: both compute, one writes, and what it writes is the same."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.helpers.prepare_child"]
    processes = [
        subprocess.Popen(
            [*command, str(number), "2", port, corpus.path, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert "Complete, " in output
    one, two = (prepared.open_prepared(corpus, TOKENIZER, path) for path in (finished, tmp_path))

    def by_text(opened: prepared.Prepared) -> dict[bytes, np.ndarray]:
        pairs = zip(opened.corpus.tokens, opened.scores, strict=True)
        return {ids.tobytes(): np.stack(entropies) for (ids, _), entropies in pairs}

    expected, found = by_text(one), by_text(two)
    assert expected.keys() == found.keys()
    for ids, entropies in expected.items():
        np.testing.assert_allclose(found[ids], entropies, atol=1e-5)
