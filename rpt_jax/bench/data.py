"""Speed and memory from text to prompts: tokenizing a corpus, scoring it, and building prompts.

A corpus of --megabytes is generated in a temporary folder and prepared as task "score" does it. Two baselines: the
tokenizer alone on the same texts in memory (for a `tokenizer.json` its library, which encodes batches on all cores),
and the policy's forward pass over full batches of the longest windows, to the log-probability of every token, in
turns with scoring. Compilation is not measured. Peak memory is that of the largest process, which is a worker if
there are several shards.
"""

from __future__ import annotations

import argparse
import contextlib
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

from rpt_jax.bench.measure import interleaved
from rpt_jax.bench.options import not_negative, positive, positive_number
from rpt_jax.config import DataConfig, Experiment, PolicyConfig, PromptConfig, TrainingConfig
from rpt_jax.config.loading import packaged_configs
from rpt_jax.config.user_paths import expand_home
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.corpus.prepared import PreparedCorpus, open_and_report, prepare, score_tokens, tokenize_on_leader
from rpt_jax.corpus.tokenization import plan_shards
from rpt_jax.corpus.tokenized import TokenizedCorpus
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.rendezvous import Heartbeat
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.infra.console import Progress
from rpt_jax.infra.run_context import RunContext
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import token_logprobs
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.pipeline import PromptStream, position_order
from rpt_jax.prompts.positions import Entropies, index_positions
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.setup import load_starting_policy
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.hf import check_files
from rpt_jax.weights.model_files import missing_hint

# The generated corpus.
_VOCABULARY_WORDS = 20_000
_DOCUMENT_WORDS = 300
_PROGRESS_BYTES = 16 * 10**6
_PROMPTS_PER_BATCH = 256
_LOGIT_CHUNK_TOKENS = 4096
# Texts that the tokenizer alone encodes, in all and at a time; smaller batches are slower.
_ALONE_TEXTS = 10_000
_ALONE_BATCH = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument(
        "--policy",
        type=expand_home,
        default=str(packaged_configs() / "tiny"),
        help="directory of a policy with its tokenizer; default: configs/tiny",
    )
    parser.add_argument(
        "--tokenizer",
        type=expand_home,
        default="",
        help="directory of another tokenizer; only tokenizing is measured then",
    )
    parser.add_argument("--megabytes", type=positive_number, default=4.0, help="size of the generated text")
    parser.add_argument("--score-batch-windows", type=positive, default=32, help="windows per batch of scoring")
    parser.add_argument("--max-document-tokens", type=positive, default=256, help="tokens per window")
    parser.add_argument(
        "--batches", type=positive, default=20, help=f"batches of {_PROMPTS_PER_BATCH} prompts to build"
    )
    parser.add_argument("--workers", type=not_negative, default=0, help="processes that build prompts")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: the policy or the tokenizer cannot be loaded.
    """
    if not options.tokenizer:
        check_files(options.policy, field="--policy")
    elif not Path(options.tokenizer).exists():
        hint = missing_hint(options.tokenizer)
        raise UserError(f"--tokenizer='{options.tokenizer}' does not exist.{hint}", field="--tokenizer")
    tokenizer = load_tokenizer(options.tokenizer or options.policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        generate_corpus(path, int(options.megabytes * 1e6))
        data = DataConfig(
            source="path",
            path=str(path),
            max_document_tokens=options.max_document_tokens,
            workers=options.workers,
        )
        rows, corpus = _measure_tokenizing(data, tokenizer, Path(folder) / "prepared")
        if not options.tokenizer:
            rows += _measure_scoring(options, data, corpus)
    kilobytes = [resource.getrusage(kind).ru_maxrss for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    rows.append(["peak memory of a process", 0.0, max(kilobytes) / 1e3, "MB"])
    return ["phase", "seconds", "figure", "unit"], rows


def _measure_tokenizing(
    data: DataConfig, tokenizer: Tokenizer, directory: Path
) -> tuple[list[list[Any]], TokenizedCorpus]:
    """Tokenize the corpus and open it."""
    size = Path(data.path).stat().st_size
    alone = _measure_tokenizer_alone(Path(data.path), tokenizer)
    start = time.perf_counter()
    plan = plan_shards(data)
    tokenize_on_leader(data, plan, tokenizer, directory, Heartbeat())
    tokenized = time.perf_counter()
    corpus = open_and_report(data, plan, directory)
    opened = time.perf_counter()
    documents = len(corpus.sizes_D)
    rows = [
        alone,
        ["tokenizing a corpus: read, tokenize, write", tokenized - start, size / (tokenized - start) / 1e6, "MB/s"],
        [
            "opening it: split, find near-duplicates",
            opened - tokenized,
            documents / (opened - tokenized),
            "documents/s",
        ],
    ]
    return rows, corpus


def _measure_scoring(options: argparse.Namespace, data: DataConfig, corpus: TokenizedCorpus) -> list[list[Any]]:
    """Score the tokenized corpus and build prompts from it."""
    mesh = make_mesh(-1, 1, 1)
    data = dataclasses.replace(data, score_batch_windows=options.score_batch_windows)
    experiment = Experiment(data=data, training=TrainingConfig(logit_chunk_tokens=_LOGIT_CHUNK_TOKENS))
    with use_mesh(mesh):
        policy, params, tokenizer = load_starting_policy(PolicyConfig(path=options.policy, preset=""), mesh, "--policy")
        scorer = Scorer(policy, params, tokenizer, mesh, experiment)
        plan = plan_shards(data)
        rows = _measure_full_batches(scorer)
        # Compile for every bucket of lengths.
        longest = options.max_document_tokens
        lengths = [longest >> i for i in range(longest.bit_length())]
        scorer.score([[0] * length for length in lengths])
        start = time.perf_counter()
        score_tokens(scorer, plan, corpus.directory, Heartbeat())
        seconds = time.perf_counter() - start
        tokens = int(corpus.sizes_D.sum())
        rows.append(["scoring the corpus, with reading and writing", seconds, tokens / seconds, "tokens/s"])
        # Only the manifest is missing by now.
        prepared = prepare(scorer, plan, corpus.directory, RunContext())
        if prepared is None:
            raise AssertionError("The generated corpus is not complete.")
        return [*rows, _measure_prompts(experiment, tokenizer, prepared, options.batches)]


def generate_corpus(path: Path, size: int) -> None:
    """Write documents of made-up words, with Zipf-distributed frequencies, until the file has `size` bytes."""
    rng = np.random.default_rng(0)
    letters = rng.integers(ord("a"), ord("z") + 1, (_VOCABULARY_WORDS, 9)).astype(np.uint8)
    words = [row[: 2 + i % 8].tobytes().decode() for i, row in enumerate(letters)]
    written = 0
    parts = -(-size // _PROGRESS_BYTES)
    with path.open("w") as file, Progress("generate, parts of a corpus", parts) as progress:
        for part in range(1, parts + 1):
            while written < min(size, part * _PROGRESS_BYTES):
                chosen = np.minimum(rng.zipf(1.3, _DOCUMENT_WORDS), _VOCABULARY_WORDS) - 1
                written += file.write(json.dumps({"text": " ".join(words[i] for i in chosen)}) + "\n")
            progress.advance(f"{written / 1e6:,.0f} MB")


def _read_texts(path: Path) -> Iterator[str]:
    with path.open() as lines:
        yield from (json.loads(line)["text"] for line in lines)


def _measure_tokenizer_alone(path: Path, tokenizer: Tokenizer) -> list[Any]:
    """Encode the first texts of the corpus in memory."""
    texts = list(itertools.islice(_read_texts(path), _ALONE_TEXTS))
    size = sum(map(len, texts))
    encode = tokenizer.encode_ordinary
    if tokenizer.source.endswith(".json"):
        library = tokenizers.Tokenizer.from_file(tokenizer.source)
        encode = functools.partial(library.encode_batch, add_special_tokens=False)
    start = time.perf_counter()
    for first in range(0, len(texts), _ALONE_BATCH):
        encode(texts[first : first + _ALONE_BATCH])
    seconds = time.perf_counter() - start
    return ["the tokenizer alone", seconds, size / seconds / 1e6, "MB/s"]


def _measure_full_batches(scorer: Scorer) -> list[list[Any]]:
    """Compare scoring with the policy's forward pass on a batch of the longest windows."""
    policy = scorer.policy
    windows = scorer.config.data.score_batch_windows
    length = scorer.config.data.max_document_tokens
    ids: Any = np.random.default_rng(0).integers(0, policy.config.vocab, (windows, length)).astype(np.int32)
    tokens, lengths = shard_prompts((ids, np.full(windows, length, np.int32)), scorer.mesh)

    def forward(policy: Transformer, params: Params) -> jax.Array:
        hidden = prefill(policy, params, tokens, lengths)[0].reshape(tokens.size, -1)
        chunk_tokens = scorer.config.training.logit_chunk_tokens
        return token_logprobs(
            head(policy, params), hidden, tokens.reshape(-1), temperature=1.0, logit_chunk_tokens=chunk_tokens
        )

    def score() -> None:
        scorer.score(list(ids))

    run = jax.jit(in_policy_precision(forward), static_argnums=0)
    seconds = interleaved({"forward": lambda: run(policy, scorer.params), "score": score}, repeats=21)
    names = {"forward": "forward passes over full batches", "score": "scoring full batches, in turns with them"}
    return [[names[key], s.median, tokens.size / s.median, "tokens/s"] for key, s in seconds.items()]


def _measure_prompts(experiment: Experiment, tokenizer: Tokenizer, prepared: PreparedCorpus, batches: int) -> list[Any]:
    """Build `batches` batches of prompts at the training positions of a scored corpus."""
    windows = prepared.corpus.windows("train")
    boxable_V = boxable_tokens(tokenizer.byte_vocab, experiment.prompt)
    entropies = Entropies(prepared.scores, prepared.corpus.tokens, boxable_V)
    stages = index_positions(experiment.data, entropies, windows.numbers_N)
    order = position_order(stages, [], batch=_PROMPTS_PER_BATCH, per_window=0, seed=(0,))
    longest = experiment.data.max_document_tokens
    builder = PromptBuilder(PromptConfig(prefill_think_token=False, max_tokens=longest), tokenizer)
    stream = PromptStream(builder, windows, [order], batch=_PROMPTS_PER_BATCH, workers=experiment.data.workers)
    with contextlib.closing(stream):
        next(stream)  # Start the workers.
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - start
    return ["building prompts", seconds, batches * _PROMPTS_PER_BATCH / seconds, "prompts/s"]
