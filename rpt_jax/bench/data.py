"""Speed and memory of the way from text to prompts: preparing tokens, scoring them, drawing prompts from them.

A corpus of so many megabytes is generated in a temporary folder and prepared as task "score" does it. Beside preparing stands
the tokenizer alone on the same texts, already in memory: that of `tokenizer.json` as its library encodes batches on all cores.
Beside scoring, in turns, the policy's forward pass over full batches of documents of the longest length, to the log-probability
of every token and nothing more. Nothing compiles while it is measured. Peak memory is that of the largest process, which is not
this one where there are several shards.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from jax.sharding import Mesh

from rpt_jax.bench.measure import interleaved
from rpt_jax.config import DataConfig, Experiment, PolicyConfig, PromptConfig
from rpt_jax.corpus.entropy import score_part
from rpt_jax.corpus.prepared import open_reported, prepare, score_tokens, tokenize_on_leader
from rpt_jax.corpus.tokenization import Corpus
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.rendezvous import Heartbeat
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.infra.console import Progress
from rpt_jax.infra.run_context import RunContext
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import index_positions
from rpt_jax.setup import load_start
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

_WORDS = 20_000
_DOCUMENT_WORDS = 300
_PART = 16 * 10**6
_BATCH = 256
_ALONE = 10_000  # Texts that the tokenizer alone encodes,
_ALONE_BATCH = 4096  # and at a time: smaller batches are slower.


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default="configs/tiny", help="directory of a policy with its tokenizer")
    parser.add_argument(
        "--tokenizer", default="", help="directory of another tokenizer: preparing alone is measured, with it"
    )
    parser.add_argument("--megabytes", type=float, default=4.0, help="of generated text")
    parser.add_argument("--documents", type=int, default=32, help="of the longest length, in a batch that is scored")
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--batches", type=int, default=20, help=f"of {_BATCH} prompts that are drawn")
    parser.add_argument("--workers", type=int, default=0, help="processes that build prompts")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where policy or tokenizer cannot be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        _generate(path, int(options.megabytes * 1e6))
        data = DataConfig(source="path", path=str(path), max_document_tokens=options.tokens, workers=options.workers)
        tokenizer = load_tokenizer(options.tokenizer or options.policy)
        rows, corpus = _preparing(data, tokenizer, Path(folder) / "prepared")
        if not options.tokenizer:
            rows += _scoring(options, data, corpus)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3
    rows.append(["peak memory of a process", 0.0, peak, "MB"])
    return ["stage", "seconds", "figure", "unit"], rows


def _preparing(data: DataConfig, tokenizer: Tokenizer, directory: Path) -> tuple[list[list[Any]], Corpus]:
    """Tokenize the corpus and open it."""
    size = Path(data.path).stat().st_size
    alone = _tokenizer_alone(Path(data.path), tokenizer)
    start = time.perf_counter()
    tokenize_on_leader(data, tokenizer, directory)
    tokenized = time.perf_counter() - start
    corpus = open_reported(data, directory)
    opened = time.perf_counter() - start - tokenized
    rows = [
        alone,
        ["preparing: reading, tokenizing, writing", tokenized, size / tokenized / 1e6, "MB/s"],
        ["opening, splitting, looking for near-duplicates", opened, len(corpus.sizes_D) / opened, "documents/s"],
    ]
    return rows, corpus


def _scoring(options: argparse.Namespace, data: DataConfig, corpus: Corpus) -> list[list[Any]]:
    """Score the tokenized corpus and draw prompts from it."""
    mesh = make_mesh(-1, 1, 1)
    experiment = Experiment(data=dataclasses.replace(data, score_batch_windows=options.documents))
    with use_mesh(mesh):
        policy, params, tokenizer = load_start(PolicyConfig(path=options.policy, preset=""), mesh)
        rows = _full_batches(experiment, policy, params, tokenizer, mesh)
        lengths = [options.tokens >> i for i in range(options.tokens.bit_length())]  # One at least of every bucket.
        score_part(experiment, policy, params, tokenizer, mesh, [[0] * length for length in lengths])
        whole = (experiment, policy, params, tokenizer, mesh, corpus.directory)
        start = time.perf_counter()
        score_tokens(*whole, Heartbeat())
        seconds, tokens = time.perf_counter() - start, int(corpus.sizes_D.sum())
        rows.append(["scoring the corpus, with reading and writing", seconds, tokens / seconds, "tokens/s"])
        prepared = prepare(*whole, RunContext())  # All is there, but for the manifest.
        return [*rows, _prompts(experiment, tokenizer, prepared, options.batches)]


def _generate(path: Path, size: int) -> None:
    """Write documents of made-up words, frequent and rare, until `size` bytes."""
    rng = np.random.default_rng(0)
    letters = rng.integers(ord("a"), ord("z") + 1, (_WORDS, 9)).astype(np.uint8)
    words = [row[: 2 + i % 8].tobytes().decode() for i, row in enumerate(letters)]
    written, parts = 0, -(-size // _PART)
    with path.open("w") as file, Progress("generate, parts of a corpus", parts) as progress:
        for part in range(1, parts + 1):
            while written < min(size, part * _PART):
                chosen = np.minimum(rng.zipf(1.3, _DOCUMENT_WORDS), _WORDS) - 1
                written += file.write(json.dumps({"text": " ".join(words[i] for i in chosen)}) + "\n")
            progress.advance(f"{written / 1e6:,.0f} MB")


def _texts(path: Path) -> Iterator[str]:
    with path.open() as lines:
        yield from (json.loads(line)["text"] for line in lines)


def _tokenizer_alone(path: Path, tokenizer: Tokenizer) -> list[Any]:
    texts, size = [], 0
    for text in itertools.islice(_texts(path), _ALONE):
        texts.append(text)
        size += len(text)
    encode = tokenizer.encode_ordinary
    if tokenizer.source.endswith(".json"):
        library = tokenizers.Tokenizer.from_file(tokenizer.source)
        encode = functools.partial(library.encode_batch, add_special_tokens=False)
    start = time.perf_counter()
    for first in range(0, len(texts), _ALONE_BATCH):
        encode(texts[first : first + _ALONE_BATCH])
    seconds = time.perf_counter() - start
    return ["the tokenizer alone", seconds, size / seconds / 1e6, "MB/s"]


def _full_batches(
    experiment: Experiment, policy: Transformer, params: Params, tokenizer: Tokenizer, mesh: Mesh
) -> list[list[Any]]:
    shape = (experiment.data.score_batch_windows, experiment.data.max_document_tokens)
    documents = np.random.default_rng(0).integers(0, policy.config.vocab, shape).astype(np.int32)
    tokens, lengths = shard_prompts((documents, np.full(shape[0], shape[1], np.int32)), mesh)

    @jax.jit
    def forward(params: Params) -> jax.Array:
        hidden = prefill(policy, params, tokens, lengths)[0].reshape(tokens.size, -1)
        chunk = experiment.training.logit_chunk_tokens
        return token_logprobs(head(policy, params), hidden, tokens.reshape(-1), 1.0, chunk)

    def score() -> None:
        score_part(experiment, policy, params, tokenizer, mesh, documents)

    seconds = interleaved({"forward": lambda: forward(params), "score": score}, repeats=21)
    names = {"forward": "forward passes over full batches", "score": "scoring full batches, in turns with them"}
    return [[names[key], s.median, tokens.size / s.median, "tokens/s"] for key, s in seconds.items()]


def _prompts(experiment: Experiment, tokenizer: Tokenizer, prepared: Any, batches: int) -> list[Any]:
    windows = prepared.corpus.windows("train")
    stages = index_positions(experiment.data, prepared.scores, windows.numbers_N)
    order = position_order(stages, [], stage_prompts=0, batch=_BATCH, per_document=0, seed=0)
    longest = experiment.data.max_document_tokens
    builder = PromptBuilder(PromptConfig(prefill_think_token=False, max_tokens=longest), tokenizer)
    stream = PromptStream(builder, windows, order, batch=_BATCH, workers=experiment.data.workers)
    next(stream)  # The workers start.
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - start
    return ["drawing prompts", seconds, batches * _BATCH / seconds, "prompts/s"]
