"""A corpus with its tokens and entropies: made, opened, and refused where it is not what a run asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import DataConfig, Experiment
from rpt_jax.corpus.entropy import BIN, forward_passes, keep_fraction, score_shard
from rpt_jax.corpus.store import MANIFEST, Records, read_json, read_summary, write_json
from rpt_jax.corpus.tokenization import (
    Corpus,
    content,
    files_digest,
    open_tokens,
    parse_shard,
    parts_to_prepare,
    report_corpus,
    steps,
    summaries,
    tokenize,
)
from rpt_jax.distributed.processes import is_leader, wait_for_all
from rpt_jax.distributed.rendezvous import Heartbeat
from rpt_jax.errors import UserError
from rpt_jax.infra.console import Progress
from rpt_jax.infra.fingerprint import digest, fingerprint_arrays
from rpt_jax.infra.run_context import RunContext
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.report import write_entropy_plot
from rpt_jax.tokenizers.tokenizer import Tokenizer

THRESHOLDS = (0.5, 1.0, 1.5)  # Nats; the borders of the paper's splits (section 4.1).


class Prepared(NamedTuple):
    """Tokens, the entropy of every position, and a digest of all that they were made from."""

    corpus: Corpus
    scores: Records
    fingerprint: str


def corpus_directory(workdir: Path, data: DataConfig, tokenizer: Tokenizer, *scored_by: Any) -> Path:
    """Where in `workdir` the tokens of a corpus are, or with `scored_by` its entropies too.

    Of its own for whatever it is made from: a first run that failed on a corpus may be followed by one on another.
    """
    return workdir / "corpus" / digest(content(data), files_digest(data), tokenizer.fingerprint, *scored_by)[:12]


def prepare(
    experiment: Experiment,
    policy: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    directory: Path,
    context: RunContext,
) -> Prepared | None:
    """Tokenize and score the shards that `data.shard` names, but for those that are there.

    Of several processes on one file system, one tokenizes, all score and one writes.

    Returns: the corpus, where no other shard is missing. Raises: UserError.
    """
    context.signals.set_save(lambda: f"the shards that were complete are in {directory}")
    tokenize_on_leader(experiment.data, tokenizer, directory, context.heartbeat)
    proxy = score_tokens(experiment, policy, params, tokenizer, mesh, directory, context.heartbeat)
    if is_leader() and not (directory / MANIFEST).exists():
        shards = parse_shard(experiment.data)[1]
        if all(summaries(directory, kind, shards) is not None for kind in ("tokens", "scores")):
            _write_manifest(experiment, tokenizer, proxy, directory, shards)
    wait_for_all("prepared")
    if not (directory / MANIFEST).exists():
        return None
    return open_prepared(experiment.data, tokenizer, directory, proxy)


def tokenize_on_leader(data: DataConfig, tokenizer: Tokenizer, directory: Path, heartbeat: Heartbeat) -> None:
    """`tokenize` with its progress, in one process of all; the others wait for it. Raises: UserError."""
    if is_leader():
        with Progress("tokenize, parts of files", sum(map(steps, parts_to_prepare(data)))) as progress:

            def advance(status: str) -> None:
                progress.advance(status)
                heartbeat.beat("tokenization")

            tokenize(data, tokenizer, directory, advance)
    wait_for_all("tokenized")


def score_tokens(
    experiment: Experiment,
    policy: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    directory: Path,
    heartbeat: Heartbeat,
) -> str:
    """`score_shard` with its progress, for the shards that `data.shard` names; return the policy's fingerprint."""
    mine, shards = parse_shard(experiment.data)
    proxy = fingerprint_arrays(params)
    passes = {shard: forward_passes(experiment, directory, shard, shards) for shard in mine}
    there = sum(count for shard, count in passes.items() if read_summary(directory, "scores", shard, shards))
    with Progress("score, batches of documents", sum(passes.values()), there) as progress:

        def advance(status: str) -> None:
            progress.advance(status)
            heartbeat.beat("scoring")

        for shard in mine:
            score_shard(experiment, policy, params, tokenizer, mesh, directory, shard, shards, proxy, advance)
    return proxy


def open_reported(data: DataConfig, directory: Path) -> Corpus:
    """Open the tokens of all shards, and say what was left out. Raises: UserError, as `open_tokens` does."""
    corpus = open_tokens(data, directory, parse_shard(data)[1])
    if is_leader():
        report_corpus(corpus)
    return corpus


def _write_manifest(experiment: Experiment, tokenizer: Tokenizer, proxy: str, directory: Path, shards: int) -> None:
    corpus = open_tokens(experiment.data, directory, shards)
    parts = summaries(directory, "scores", shards)
    histogram_N = np.sum([part["histogram"] for part in parts], axis=0)
    shares = {str(threshold): keep_fraction(histogram_N, threshold) for threshold in THRESHOLDS}
    write_entropy_plot(directory, histogram_N, BIN, shares)
    manifest = {
        "content": content(experiment.data),
        "files": files_digest(experiment.data),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "source": tokenizer.source},
        "proxy": {"fingerprint": proxy, "source": experiment.policy.path},
        "data.entropy_top_k": experiment.data.entropy_top_k,
        "shards": shards,
        "summaries": _digest(directory, shards),
        "counts": report_corpus(corpus),
        "positions_above_nats": shares,
    }
    write_json(directory / MANIFEST, manifest)


def _digest(directory: Path, shards: int) -> str:
    return digest([summaries(directory, kind, shards) for kind in ("tokens", "scores")])


def open_prepared(data: DataConfig, tokenizer: Tokenizer, directory: Path, proxy: str = "") -> Prepared:
    """Open a prepared corpus.

    Args:
      proxy: fingerprint of the policy that must have scored it; "" = any.

    Raises: UserError, where the manifest or a shard is missing or damaged, or not of this corpus, tokenizer or proxy.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(
            f"data.prepared: {path} does not exist. Run task 'score' with --workdir={directory}, all shards of it, and "
            "give that directory."
        )
    manifest = read_json(path)
    try:
        shards = int(manifest["shards"])
        theirs: dict[str, Any] = {**manifest["content"], "data.entropy_top_k": manifest["data.entropy_top_k"]}
        theirs |= {"tokenizer": manifest["tokenizer"]["fingerprint"], "proxy": manifest["proxy"]["fingerprint"]}
        theirs["files"], whole = manifest["files"], manifest["summaries"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Delete it and run task 'score' again.") from None
    mine = {**content(data), "data.entropy_top_k": data.entropy_top_k, "tokenizer": tokenizer.fingerprint}
    mine |= {"proxy": proxy or theirs["proxy"], "files": _files_if_here(data, theirs["files"])}
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{path} does not match this run: {name} is {theirs.get(name)!r} there and {value!r} here. Prepare the corpus "
                "again in another directory, or change the config."
            )
    if _digest(directory, shards) != whole:
        raise UserError(f"{path} does not match the shards beside it. Delete it and run task 'score' again.")
    corpus = open_tokens(data, directory, shards)
    return Prepared(corpus, Records(directory, "scores", shards), digest(manifest))


def _files_if_here(data: DataConfig, otherwise: str) -> str:
    """The files that data.path names; training may run where they are not, and then the prepared corpus is all there is."""
    try:
        return files_digest(data)
    except UserError:
        return otherwise
