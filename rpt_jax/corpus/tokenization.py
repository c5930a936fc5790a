"""Tokenize a corpus once, shard by shard, in several processes that do not import JAX."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.files import FileRange, find_file_ranges
from rpt_jax.corpus.near_duplicates import Sketches, make_sketches
from rpt_jax.corpus.sources import CorpusShard, RejectLog, document_hashes, read_corpus
from rpt_jax.corpus.store import FORMAT, INDEX, SKETCH, ShardWriter, read_summary, shard_name
from rpt_jax.errors import UserError
from rpt_jax.infra.digest import digest
from rpt_jax.infra.signals import end_with_parent
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 32 * 2**20  # Size of the files of a shard, unless data.shard sets the number of shards.
REJECTED = "rejected"  # Kind of the files that list rejected records, see `shard_name`.
# A batch of documents to tokenize ends after this many documents or characters.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2**21
# The fields of every source that determine the tokens of a corpus and its windows.
_CONTENT_FIELDS = (
    "source",
    "text_field",
    "document_template",
    "group_by",
    "max_document_bytes",
    "seed",
    "max_document_tokens",
)


# --- what is tokenized --------------------------------------------------------------------------------


class ShardPlan(NamedTuple):
    """The shards of a corpus, from one listing of its files.

    Attributes:
      numbers: of the shards that `data.shard` names.
      shards: number of shards of the corpus.
      file_ranges: of the whole corpus; None if it has no files.
      files_digest: digest of the names and sizes of the files of each part of a mixture.
    """

    numbers: Sequence[int]
    shards: int
    file_ranges: Sequence[FileRange] | None
    files_digest: str

    @property
    def whole(self) -> CorpusShard:
        """The whole corpus as one shard."""
        return CorpusShard(file_ranges=self.file_ranges)

    @property
    def to_prepare(self) -> list[CorpusShard]:
        """The shards of `numbers`."""
        return [
            CorpusShard(
                number=number,
                shards=self.shards,
                file_ranges=None if self.file_ranges is None else self.file_ranges[number :: self.shards],
            )
            for number in self.numbers
        ]


def plan_shards(config: DataConfig) -> ShardPlan:
    """List the files of the corpus and divide them into shards. Raises: UserError."""
    file_ranges = find_file_ranges(config) if config.source == "path" else None
    sizes = {(r.mixture_part, r.name): r.path.stat().st_size for r in file_ranges or []}
    if config.shard:
        number, shards = parse_shard(config.shard)
        numbers = [number]
    else:
        shards = max(1, min(len(file_ranges or []), -(-sum(sizes.values()) // SHARD_BYTES)))
        numbers = range(shards)
    return ShardPlan(
        numbers=numbers, shards=shards, file_ranges=file_ranges, files_digest=digest(sorted(sizes.items()))
    )


def parse_shard(shard: str, field: str = "data.shard") -> tuple[int, int]:
    """Return the number and the count of a part, "NUMBER/COUNT". Raises: UserError, about `field`."""
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(
            f"{field}='{shard}' must be NUMBER/COUNT with NUMBER below COUNT, such as 0/64 or 63/64.", field=field
        )
    return int(number), int(count)


def content_fields(config: DataConfig) -> dict[str, Any]:
    """Return the config fields that determine the documents of a corpus, their tokens and windows, by full name."""
    fields = {f"data.{name}": getattr(config, name) for name in _CONTENT_FIELDS}
    if config.source_options is None:
        return fields
    # A source that generates its documents may generate as many held-out ones as are requested.
    fields["data.held_out_documents"] = config.held_out_documents
    return fields | {f"data.source_options.{name}": value for name, value in leaves(config.source_options)}


def check_made_from(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    """Check that prepared data were made from what a run expects.

    Args:
      path: the directory or file, for the error message.
      found: value of "made_from" in a summary or manifest, which may be damaged.
      expected: the entries that must be equal.

    Raises: UserError, naming the first entry that differs.
    """
    found = found if isinstance(found, Mapping) else {}
    fields = {"files": "data.path", "tokenizer": "policy.path", "proxy": "policy.path"}
    for name, value in expected.items():
        if found.get(name) == value:
            continue
        if name == "format":
            raise UserError(
                f"{path} has another format of prepared corpora than this version, which reads format {FORMAT}. Prepare the "
                "corpus again in another directory.",
                field=str(path),
            )
        raise UserError(
            f"{path} does not match this run: it was prepared with {name}={found.get(name)!r}, and this run has {value!r}. "
            "Prepare the corpus again in another directory, or change the config.",
            field=name if name.startswith("data.") else fields.get(name, str(path)),
        )


# --- tokenize -----------------------------------------------------------------------------------------


def tokenize(
    config: DataConfig, plan: ShardPlan, tokenizer: Tokenizer, directory: Path, advance: Callable[[str], None]
) -> None:
    """Tokenize the shards of a plan, in parallel processes if there are several.

    Args:
      config: section `data`.
      plan: the shards.
      tokenizer: encodes the documents.
      directory: of the corpus; created if necessary.
      advance: see `tokenize_shard`.

    Raises: UserError, as `tokenize_shard` does.
    """
    shards = plan.to_prepare
    made_from = {
        "format": FORMAT,
        **content_fields(config),
        "files": plan.files_digest,
        "tokenizer": tokenizer.fingerprint,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        tokenize_shard(config, tokenizer, directory, shards[0], made_from, advance)
    else:
        _tokenize_in_processes(config, tokenizer.source, directory, shards, made_from, advance)


def _tokenize_in_processes(
    config: DataConfig,
    tokenizer_source: str,
    directory: Path,
    shards: Sequence[CorpusShard],
    made_from: Mapping[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Tokenize shards in one process for each core; see `tokenize_shard`. Raises: UserError, the first of any process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Start processes by spawning, because forking a process in which JAX runs threads may deadlock.
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(end_with_parent)
    with (
        manager,
        concurrent.futures.ProcessPoolExecutor(min(len(shards), cores), context, _start_worker) as pool,
    ):
        progress = manager.Queue()
        jobs = [
            pool.submit(_tokenize_in_worker, config, tokenizer_source, directory, shard, made_from, progress)
            for shard in shards
        ]
        # None marks the end of a job; it arrives after the last progress of this job.
        for job in jobs:
            job.add_done_callback(lambda _: progress.put(None))
        completed = concurrent.futures.as_completed(jobs)
        try:
            for _ in jobs:
                while (status := progress.get()) is not None:
                    advance(status)
                next(completed).result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    # A worker that outlived its parent would write to the same files as the next run.
    end_with_parent()
    # There is already one process for every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenize_in_worker(
    config: DataConfig,
    tokenizer_source: str,
    directory: Path,
    shard: CorpusShard,
    made_from: Mapping[str, Any],
    progress: Queue[str | None],
) -> None:
    tokenizer = _load_tokenizer_once(tokenizer_source)
    tokenize_shard(config, tokenizer, directory, shard, made_from, progress.put)


# A worker tokenizes several shards, one after the other.
_load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def tokenize_shard(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: Path,
    shard: CorpusShard,
    made_from: Mapping[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Write the tokens of one shard, unless they are already complete.

    Args:
      config: section `data`.
      tokenizer: encodes the documents.
      directory: of the corpus.
      shard: what to tokenize.
      made_from: what determines the shard's contents; stored in its summary, and compared with that of a complete shard.
      advance: called `shard.steps` times with a short status.

    Raises: UserError, if a file cannot be read, `data.strict` is set and a record is rejected, or the complete shard was made
      from something else.
    """
    number = shard.number
    shards = shard.shards

    # Skip a complete shard, but refuse one that was made from something else.
    if summary := read_summary(directory, "tokens", number, shards):
        check_made_from(directory, summary.get("made_from"), made_from)
        for _ in range(shard.steps):
            advance(f"shard {number} is already complete")
        return

    # Steps are counted when a file range has been read, but reported after its documents are written, so that the status
    # counts them.
    counts: collections.Counter = collections.Counter(documents=0, tokens=0, text_bytes=0)
    files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    unreported_steps = 0

    def count_step() -> None:
        nonlocal unreported_steps
        unreported_steps += 1

    def report_steps() -> None:
        nonlocal unreported_steps
        for _ in range(unreported_steps):
            advance(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens of shard {number}/{shards}")
        unreported_steps = 0

    # Write the records, the index, the sketches and the names. The summary, which is written last, completes the shard.
    index_path = directory / f"{shard_name('index', number, shards)}.bin"
    sketches_path = directory / f"{shard_name('sketches', number, shards)}.bin"
    names_path = directory / f"{shard_name('names', number, shards)}.txt"
    rejected_path = directory / f"{shard_name(REJECTED, number, shards)}.jsonl"
    with (
        ShardWriter(directory, "tokens", number, shards) as writer,
        RejectLog(config.strict, rejected_path) as rejects,
        index_path.open("wb") as index_file,
        sketches_path.open("wb") as sketches_file,
        names_path.open("w", encoding="utf-8") as names_file,
    ):
        documents = rejects.filter(read_corpus(config, rejects.counts, shard, count_step))
        for batch in rejects.filter(_encode(tokenizer, documents)):
            sketches = make_sketches(batch.ids_T, batch.sizes_D)
            index_file.write(_index_rows(batch, sketches, config.seed).tobytes())
            sketches_file.write(sketches.hashes.astype(SKETCH).tobytes())
            names_file.writelines(json.dumps(document.name) + "\n" for document in batch.documents)
            lengths_T = tokenizer.byte_vocab.lengths_V[batch.ids_T].astype(np.uint16)
            writer.write((batch.ids_T, lengths_T), window_ends(batch.sizes_D, config.max_document_tokens))
            for document in batch.documents:
                files[document.file]["documents"] += 1
            counts["documents"] += len(batch.documents)
            counts["tokens"] += len(lengths_T)
            counts["text_bytes"] += int(lengths_T.sum())
            report_steps()
        for file_range in shard.file_ranges or ():
            files[file_range.name].update()  # Also a file without records has an entry.
        index_file.flush()
        sketches_file.flush()
        names_file.flush()
        for file, reasons in rejects.files.items():
            files[file].update(reasons)
        summary = {
            "made_from": dict(made_from),
            **counts,
            "files": files,
            "rejected": dict(rejects.counts),
            "first_rejected": rejects.first_details,
        }
        writer.commit(summary, (index_path, sketches_path, names_path))
    report_steps()


class _TokenizedBatch(NamedTuple):
    """Some documents, their token ids concatenated (uint32 [T]), and the number of tokens of each (int64 [D])."""

    documents: list[Document]
    ids_T: np.ndarray
    sizes_D: np.ndarray


def _encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[_TokenizedBatch | Rejected]:
    """Yield tokenized batches, and the documents that the tokenizer cannot represent."""
    for batch in _batches(documents):
        try:
            yield _encode_batch(tokenizer, batch)
        except UserError:
            # A document contains a character that the tokenizer cannot represent. Find out which, and reject only that one.
            for document in batch:
                try:
                    yield _encode_batch(tokenizer, [document])
                except UserError as error:
                    line = document.name.removeprefix(document.file).partition(":")[2].partition(":")[0]
                    yield Rejected(
                        file=document.file,
                        line=int(line) if line.isdecimal() else 0,
                        reason="not in the tokenizer",
                        detail=f"{document.name}: {error}",
                        mixture_part=document.mixture_part,
                    )


def _encode_batch(tokenizer: Tokenizer, documents: list[Document]) -> _TokenizedBatch:
    ids_T, sizes_D = tokenizer.encode_batch([document.text for document in documents])
    return _TokenizedBatch(documents=documents, ids_T=ids_T, sizes_D=sizes_D)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def window_ends(sizes_D: np.ndarray, max_tokens: int) -> list[int]:
    """Divide concatenated documents into windows of at most `max_tokens` tokens, none of which spans two documents.

    Args:
      sizes_D: number of tokens of each document.

    Returns: the end of every window, in order.
    """
    ends = []
    for end, size in zip(np.cumsum(sizes_D).tolist(), sizes_D.tolist(), strict=True):
        ends += [*range(end - size + max_tokens, end, max_tokens), end]
    return ends


def _index_rows(batch: _TokenizedBatch, sketches: Sketches, seed: int) -> np.ndarray:
    """Return the index of some documents, `INDEX` [D]."""
    rows_D = np.empty(len(batch.documents), INDEX)
    hashes_Dx2 = np.array([document_hashes(document, seed) for document in batch.documents], np.uint64)
    rows_D["key_hash"] = hashes_Dx2[:, 0]
    rows_D["text_hash"] = hashes_Dx2[:, 1]
    rows_D["place"] = [document.place for document in batch.documents]
    rows_D["split"] = [document.split for document in batch.documents]
    rows_D["mixture_part"] = [document.mixture_part for document in batch.documents]
    rows_D["tokens"] = batch.sizes_D
    rows_D["sketch"] = sketches.counts_D
    return rows_D
