"""Tokenize a corpus once, shard by shard, and open what was prepared; shards have processes of their own, without JAX."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.corpus.documents import SPLITS, Document, Rejected
from rpt_jax.corpus.files import find_units
from rpt_jax.corpus.near_duplicates import near_duplicates, sketches
from rpt_jax.corpus.sources import (
    DUPLICATE,
    CorpusShard,
    RejectLog,
    fingerprints,
    read_corpus,
    report_rejects,
    split,
)
from rpt_jax.corpus.store import (
    INDEX,
    Records,
    ShardWriter,
    document_names,
    read_index,
    read_summary,
    shard_name,
)
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.fingerprint import digest
from rpt_jax.infra.signals import end_with_parent
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

FORMAT = 3
SHARD_BYTES = 32 * 2**20  # Of files, where data.shard does not say how many shards there are.
_BATCH = 512  # Documents that are tokenized at a time,
_BATCH_BYTES = 2**21  # or fewer, where they are long.
_REJECTED = "rejected"  # What was found where a document should be.
NEAR_DUPLICATES = "near_duplicates.jsonl"
# What decides which tokens a prepared corpus holds, and in which windows.
_CONTENT = ("source", "text_field", "document_template", "max_document_bytes", "seed", "max_document_tokens")


def parse_shard(config: DataConfig) -> tuple[list[int], int]:
    """Return the shards that are to be prepared, and how many there are in all. Raises: UserError."""
    if config.shard:
        number, _, count = config.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"data.shard='{config.shard}' must be a number and how many there are, from 0/64 to 63/64 for example."
            )
        return [int(number)], int(count)
    units = find_units(config) if config.source == "path" else []
    size = sum(path.stat().st_size for path in {unit.path for unit in units})
    shards = max(1, min(len(units), -(-size // SHARD_BYTES)))
    return list(range(shards)), shards


def parts_to_prepare(config: DataConfig) -> list[CorpusShard]:
    """What `parse_shard` names, with the files that each shard is made of. Raises: UserError."""
    mine, shards = parse_shard(config)
    units = find_units(config) if config.source == "path" else None
    return [CorpusShard(shard, shards, units and units[shard::shards]) for shard in mine]


def steps(part: CorpusShard) -> int:
    """How often `tokenize_shard` tells that it got further."""
    return 1 if part.units is None else len(part.units)


def content(config: DataConfig) -> dict[str, Any]:
    """The fields that decide which tokens a prepared corpus holds."""
    fields = {f"data.{name}": getattr(config, name) for name in _CONTENT}
    if config.source_options is None:
        return fields
    # A generator may make as many held-out documents as it is asked for.
    fields["data.held_out_documents"] = config.held_out_documents
    return fields | {f"data.source_options.{name}": value for name, value in leaves(config.source_options)}


def files_digest(config: DataConfig) -> str:
    """The names and sizes of the files that are read. Raises: UserError, where they are not here."""
    units = find_units(config) if config.source == "path" else []
    return digest(FORMAT, sorted({(unit.name, unit.path.stat().st_size) for unit in units}))


def tokenize_shard(
    config: DataConfig,
    tokenizer: Tokenizer | str,
    directory: Path,
    part: CorpusShard,
    files: str,
    advance: Callable[[str], None],
) -> None:
    """Write one shard of tokens, or leave the one that is there.

    Args:
      tokenizer: or where to load it from, in another process.
      files: `files_digest`.
      advance: called with a few words, `steps(part)` times.

    Raises: UserError, where a file cannot be read, with `data.strict` for the first bad document, and where the shard that is
    there was made from another corpus or with another tokenizer.
    """
    tokenizer = _load(tokenizer) if isinstance(tokenizer, str) else tokenizer
    made_from = {"content": content(config), "files": files, "tokenizer": tokenizer.fingerprint}
    shard, shards, _ = part
    if summary := read_summary(directory, "tokens", shard, shards):
        check_same(directory, summary, made_from)
        for _ in range(steps(part)):
            advance(f"shard {shard} is there")
        return
    counts: collections.Counter = collections.Counter({"documents": 0, "tokens": 0, "text_bytes": 0})
    read: list[None] = []  # One for each unit that was read to its end, and is not told yet.

    def tell() -> None:
        while read:
            read.pop()
            advance(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens of shard {shard}/{shards}")

    index, names = (
        directory / f"{shard_name(kind, shard, shards)}{end}" for kind, end in (("index", ".bin"), ("names", ".txt"))
    )
    listing = directory / f"{shard_name(_REJECTED, shard, shards)}.jsonl"
    with (
        ShardWriter(directory, "tokens", shard, shards) as writer,
        RejectLog(config.strict, listing) as rejects,
        index.open("wb") as index_file,
        names.open("w", encoding="utf-8") as names_file,
    ):
        documents = rejects.keep(read_corpus(config, rejects.counts, part, lambda: read.append(None)))
        for batch in rejects.keep(_encode(tokenizer, documents)):
            index_file.write(_index(batch, config.seed).tobytes())
            names_file.writelines(json.dumps(document.name) + "\n" for document in batch.documents)
            lengths_T = tokenizer.byte_vocab.lengths_V[batch.ids_T].astype(np.uint16)
            counts["documents"] += len(batch.documents)
            counts["tokens"] += len(lengths_T)
            counts["text_bytes"] += int(lengths_T.sum())
            writer.write((batch.ids_T, lengths_T), window_ends(batch.sizes_D, config.max_document_tokens))
            tell()
        index_file.flush()
        names_file.flush()
        rejected = {"rejected": dict(rejects.counts), "first_rejected": rejects.first}
        writer.commit({**made_from, **counts, **rejected}, (index, names))
    tell()


_load = functools.lru_cache(maxsize=1)(load_tokenizer)  # Of a process that makes one shard after the other.


def check_same(directory: Path, summary: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    """Refuse a shard that was made from something else. Raises: UserError."""
    for name, value in made_from.items():
        if summary.get(name) != value:
            raise UserError(
                f"{directory} was prepared with another {name} ({summary.get(name)} there, {value} now): prepare in another "
                "directory, or delete that one."
            )


class _Encoded(NamedTuple):
    """Documents, all their token ids in a row, and how many are of each."""

    documents: list[Document]
    ids_T: np.ndarray
    sizes_D: np.ndarray


def _encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[_Encoded | Rejected]:
    for batch in _batches(documents):
        try:
            yield _Encoded(batch, *tokenizer.encode_batch([d.text for d in batch]))
        except UserError:  # One of them holds what the tokenizer has no token for.
            for document in batch:
                try:
                    yield _Encoded([document], *tokenizer.encode_batch([document.text]))
                except UserError as error:
                    file, _, line = document.name.partition(":")
                    number = int(line.partition(":")[0]) if line.partition(":")[0].isdecimal() else 0
                    yield Rejected(file, number, "not in the tokenizer", f"{document.name}: {error}")


def window_ends(sizes_D: np.ndarray, longest: int) -> list[int]:
    """Where windows of at most `longest` tokens end that no document shares, in a row of all documents' tokens."""
    ends = []
    for end, size in zip(np.cumsum(sizes_D).tolist(), sizes_D.tolist(), strict=True):
        ends += [*range(end - size + longest, end, longest), end]
    return ends


def _index(batch: _Encoded, seed: int) -> np.ndarray:
    """What is kept of each document, INDEX [D]."""
    rows_D = np.empty(len(batch.documents), INDEX)
    rows_D["key"], rows_D["text"] = np.array([fingerprints(d, seed) for d in batch.documents], np.uint64).T
    rows_D["side"], rows_D["part"] = np.array([(d.side, d.part) for d in batch.documents]).T
    rows_D["tokens"], rows_D["sketch"] = batch.sizes_D, sketches(batch.ids_T, batch.sizes_D)
    return rows_D


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(config: DataConfig, tokenizer: Tokenizer, directory: Path, advance: Callable[[str], None]) -> None:
    """Tokenize the shards that `data.shard` names, each in a process of its own where there are several.

    Args:
      advance: see `tokenize_shard`.

    Raises: UserError, as `tokenize_shard` does.
    """
    parts, files = parts_to_prepare(config), files_digest(config)
    directory.mkdir(parents=True, exist_ok=True)
    if len(parts) == 1:
        tokenize_shard(config, tokenizer, directory, parts[0], files, advance)
        return
    workers = min(len(parts), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Spawned, because a fork of a process in which JAX has threads may hang.
    context = multiprocessing.get_context("spawn")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Of the workers: each is one of as many as there are cores.
    told = context.SimpleQueue()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (told,)) as pool:
        jobs = [pool.submit(_tokenize_in_worker, config, tokenizer.source, directory, part, files) for part in parts]
        for job in jobs:
            job.add_done_callback(lambda _: told.put(""))  # After what it told itself.
        completed = concurrent.futures.as_completed(jobs)
        try:
            for _ in jobs:
                while words := told.get():
                    advance(words)
                next(completed).result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            del os.environ["TOKENIZERS_PARALLELISM"]


_told: Any = None  # In a worker: where it tells its progress.


def _start_worker(told: Any) -> None:
    global _told
    _told = told
    end_with_parent()  # Beside the next run it would write the same files.


def _tokenize_in_worker(*arguments: Any) -> None:
    tokenize_shard(*arguments, _told.put)


# --- the whole ------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """A prepared corpus: what is known of every document, which one every window is of, and the records of tokens."""

    directory: Path
    shards: int
    sides_D: np.ndarray  # int8; DUPLICATE for repeated documents.
    parts_D: np.ndarray  # uint16, of a mixture.
    sizes_D: np.ndarray  # uint32, in tokens.
    documents_W: np.ndarray  # uint32
    tokens: Records

    def windows(self, side: str) -> Windows:
        return Windows(self.tokens, np.flatnonzero((self.sides_D == SPLITS.index(side))[self.documents_W]))

    def token_count(self, side: str) -> int:
        return int(self.sizes_D[self.sides_D == SPLITS.index(side)].sum())


class Windows(Sequence):
    """Token ids of some of the windows, read when they are asked for."""

    def __init__(self, records: Records, numbers_N: np.ndarray):
        self.numbers_N, self._records = numbers_N, records

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, number: int) -> np.ndarray:
        """uint32 [S]."""
        return self._records[int(self.numbers_N[number])][0]


def summaries(directory: Path, kind: str, shards: int) -> list[dict[str, Any]] | None:
    """Those of all shards; None where one is not made yet."""
    found = [read_summary(directory, kind, shard, shards) for shard in range(shards)]
    return None if None in found else found


def open_tokens(config: DataConfig, directory: Path, shards: int) -> Corpus:
    """Open the tokens of all shards, with the sides of the split.

    The split and repetitions are found here, over all shards, because no shard knows the others. What stays in memory are 7
    bytes for every document and 4 for every window, of which `Windows` takes 8 more. Raises: UserError, where a shard is
    missing or damaged and where there are too few documents.
    """
    tokens = Records(directory, "tokens", shards)
    names = ("key", "text", "side", "part", "tokens")
    columns = [[rows[name].copy() for name in names] for rows in read_index(directory, shards)]
    keys_D, texts_D, sides_D, parts_D, sizes_D = map(np.concatenate, zip(*columns, strict=True))
    windows_D = -(-sizes_D.astype(np.int64) // config.max_document_tokens)
    documents_W = np.repeat(np.arange(len(sizes_D), dtype=np.uint32), windows_D)
    if len(documents_W) != len(tokens):
        raise UserError(
            f"{directory}: {len(tokens)} windows where its documents have {len(documents_W)}. Prepare it again in another "
            "directory."
        )
    example = next(
        (s["first_rejected"] for s in summaries(directory, "tokens", shards) or [] if s["first_rejected"]), ""
    )
    sides_D = split(keys_D, texts_D, sides_D, config, example)
    return Corpus(directory, shards, sides_D, parts_D, sizes_D, documents_W, tokens)


def report_corpus(corpus: Corpus) -> dict[str, Any]:
    """Print what was left out and which held-out documents training nearly repeats; return the counts."""
    parts = summaries(corpus.directory, "tokens", corpus.shards) or []
    rejected = sum((collections.Counter(part["rejected"]) for part in parts), collections.Counter())
    sides_D, directory, shards = corpus.sides_D, corpus.directory, corpus.shards
    if repeated := int(np.sum(sides_D == DUPLICATE)):
        rejected["duplicate"] += repeated
    listings = sorted(directory.glob(f"{_REJECTED}-*.jsonl"))
    report_rejects(rejected, ", ".join(map(str, listings[:3])) + ", …" * (len(listings) > 3))
    held_D, train_D = (np.flatnonzero(sides_D == SPLITS.index(side)) for side in ("held_out", "train"))
    held_out = np.concatenate(list(_sketches(corpus, "held_out")))
    pairs = [
        (int(held_D[pair.held_out]), int(train_D[pair.train]), pair.share)
        for pair in near_duplicates(held_out, _sketches(corpus, "train"))
    ]
    if pairs:
        names = document_names(directory, shards, (number for pair in pairs for number in pair[:2]))
        lines = [{"held_out": names[h], "train": names[t], "share": share} for h, t, share in pairs]
        atomic_write(directory / NEAR_DUPLICATES, "".join(json.dumps(line) + "\n" for line in lines))
        print(
            f"{len(pairs):,} of {len(held_D):,} held-out documents are nearly the same as one of training: "
            f"{directory / NEAR_DUPLICATES}."
        )
    counts = {name: sum(part[name] for part in parts) for name in ("documents", "records", "tokens", "text_bytes")}
    return {**counts, "rejected": dict(rejected), "near_duplicates": len(pairs)}


def _sketches(corpus: Corpus, side: str) -> Iterator[np.ndarray]:
    """Those of the documents of one side, shard by shard."""
    before = 0
    for rows in read_index(corpus.directory, corpus.shards):
        sides = corpus.sides_D[before : before + len(rows)]
        before += len(rows)
        yield rows["sketch"][sides == SPLITS.index(side)]
