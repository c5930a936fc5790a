"""Prepare a corpus (tokens and entropies), open it, and check that it matches a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpt_jax import __version__
from rpt_jax.config import DataConfig, Experiment
from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.corpus.entropy import BIN_NATS, Scorer, fraction_above
from rpt_jax.corpus.expanded_size import expanded_bytes
from rpt_jax.corpus.store import FORMAT, MANIFEST, Records, read_json, read_summaries, read_summary, write_json
from rpt_jax.corpus.tokenization import ShardPlan, check_made_from, content_fields, plan_shards, tokenize
from rpt_jax.corpus.tokenized import TokenizedCorpus, open_tokens, report_corpus
from rpt_jax.distributed.processes import is_leader
from rpt_jax.distributed.rendezvous import Heartbeat
from rpt_jax.errors import UserError
from rpt_jax.infra.console import Progress
from rpt_jax.infra.digest import digest
from rpt_jax.infra.disk import check_free_space
from rpt_jax.infra.plots import write_entropy_plot
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.shared_files import share
from rpt_jax.infra.storage import with_urls
from rpt_jax.registry import POSITION_CHOICES
from rpt_jax.tokenizers.tokenizer import Tokenizer

# 2 bytes of window lengths, 4 of token ids, 8 of two entropies.
CORPUS_BYTES_PER_TOKEN = 2 + 4 + 8
_TEXT_BYTES_PER_TOKEN = 4  # About, with a large vocabulary.


class PreparedCorpus(NamedTuple):
    """A corpus with the entropy of every position.

    Attributes:
      corpus: tokens and splits.
      scores: entropies of each window, see `entropy.stored_entropies`.
      fingerprint: digest of everything that the corpus was made from.
    """

    corpus: TokenizedCorpus
    scores: Records
    fingerprint: str


def corpus_directory(workdir: Path, data: DataConfig, plan: ShardPlan, tokenizer: Tokenizer, *scored_by: Any) -> Path:
    """Return the directory in `workdir` for the tokens of a corpus, or with `scored_by` also for its entropies.

    It is different for every combination of what the corpus is made from, so that a corpus that failed does not prevent a run
    on another one.

    Args:
      workdir: directory of the run.
      data: section `data`.
      plan: the shards of the corpus.
      tokenizer: encodes the documents.
      scored_by: JSON values that determine the entropies.
    """
    made_from = (FORMAT, content_fields(data), plan.files_digest, tokenizer.fingerprint, *scored_by)
    return workdir / "corpus" / digest(*made_from)[:12]


def prepare(scorer: Scorer, plan: ShardPlan, directory: Path, context: RunContext) -> PreparedCorpus | None:
    """Tokenize and score the shards of a plan, except those that are already complete.

    With several processes on one file system, the leader tokenizes and writes, and all of them score.

    Args:
      scorer: the proxy, and the config that names the corpus.
      plan: the shards.
      directory: where the corpus is stored.
      context: signals and heartbeats.

    Returns: the corpus, or None if other shards are not complete yet. Raises: UserError.
    """
    context.signals.set_kept(lambda: f"the complete shards are in {directory}")
    data = scorer.config.data
    tokenize_on_leader(data, plan, scorer.tokenizer, directory, context.heartbeat)
    score_tokens(scorer, plan, directory, context.heartbeat)
    share(directory, "scored")
    if is_leader() and not (directory / MANIFEST).exists():
        if all(read_summaries(directory, kind, plan.shards) is not None for kind in ("tokens", "scores")):
            write_manifest(scorer.config, plan, scorer.tokenizer, scorer.fingerprint, directory)
    share(directory, "prepared")
    if not (directory / MANIFEST).exists():
        return None
    return open_prepared(data, scorer.tokenizer, directory, scorer.fingerprint, plan)


def tokenize_on_leader(
    data: DataConfig, plan: ShardPlan, tokenizer: Tokenizer, directory: Path, heartbeat: Heartbeat
) -> None:
    """Run `tokenize` on the leader, with a progress bar; the other processes wait. Raises: UserError."""
    if is_leader():
        _check_disk(data, plan, directory)
        with Progress("tokenize, file ranges", sum(shard.steps for shard in plan.to_prepare)) as progress:

            def advance(status: str) -> None:
                progress.advance(status)
                heartbeat.beat("tokenization")

            tokenize(data, plan, tokenizer, directory, advance)
    share(directory, "tokenized")


def _check_disk(data: DataConfig, plan: ShardPlan, directory: Path) -> None:
    """Check that the disk has room for the shards that are not tokenized yet, by a rough estimate. Raises: UserError."""
    missing = [number for number in plan.numbers if not read_summary(directory, "tokens", number, plan.shards)]
    if plan.file_ranges is None or not missing:
        return  # The source generates its documents, or nothing is left to do.
    text_bytes = expanded_bytes(plan.file_ranges, data) * len(missing) // plan.shards
    needed = text_bytes // _TEXT_BYTES_PER_TOKEN * CORPUS_BYTES_PER_TOKEN
    check_free_space(directory, needed, "the token ids and entropies of the corpus", "prepare fewer files")


def score_tokens(scorer: Scorer, plan: ShardPlan, directory: Path, heartbeat: Heartbeat) -> None:
    """Score the tokenized shards of a plan, with a progress bar. Raises: UserError."""
    shards = plan.shards
    batches = {number: scorer.count_batches(directory, number, shards) for number in plan.numbers}
    done = sum(count for number, count in batches.items() if read_summary(directory, "scores", number, shards))
    with Progress("score, batches of windows", sum(batches.values()), done) as progress:

        def advance(status: str) -> None:
            progress.advance(status)
            heartbeat.beat("scoring")

        for number in batches:
            scorer.score_shard(directory, number, shards, advance)


def open_and_report(data: DataConfig, plan: ShardPlan, directory: Path) -> TokenizedCorpus:
    """Open the tokens of all shards and log what was skipped. Raises: UserError, as `open_tokens` does."""
    corpus = open_tokens(data, directory, plan.shards)
    if is_leader():
        report_corpus(corpus)
    return corpus


def write_manifest(config: Experiment, plan: ShardPlan, tokenizer: Tokenizer, proxy: str, directory: Path) -> None:
    """Complete a corpus whose shards are all tokenized and scored.

    Args:
      config: the experiment that scored it.
      plan: its shards.
      tokenizer: encoded the documents.
      proxy: fingerprint of the policy that scored it.
      directory: of the corpus.

    Raises: UserError, if a shard is missing or damaged.
    """
    data = config.data
    shards = plan.shards
    counts = report_corpus(open_tokens(data, directory, shards))
    manifest = {
        "version": __version__,
        "made_from": {
            "format": FORMAT,
            **content_fields(data),
            "data.entropy_top_k": data.entropy_top_k,
            "files": plan.files_digest,
            "tokenizer": tokenizer.fingerprint,
            "proxy": proxy,
        },
        "sources": {"tokenizer": with_urls(tokenizer.source), "proxy": with_urls(config.policy.path)},
        "shards": shards,
        "summaries": _summaries_digest(directory, shards),
        "counts": counts,
        "positions_above_nats": _fractions_above(_histogram(directory, shards)),
    }
    write_json(directory / MANIFEST, manifest)


def position_flops(data: DataConfig, prepared: PreparedCorpus) -> float:
    """Return the model FLOPs of scoring that the choice of training positions depends on: those of the training documents.

    The documents of other splits are scored to evaluate. Of the FLOPs of all, training documents have their share of the tokens.

    Args:
      data: names the choice; 0 for one that does not depend on entropies.
      prepared: the corpus, scored in this run or before.
    """
    if not POSITION_CHOICES[data.positions].requirements.scored:
        return 0.0
    corpus = prepared.corpus
    flops = sum(summary["flops"] for summary in read_summaries(corpus.directory, "scores", corpus.shards) or [])
    return float(flops * corpus.token_count("train") / corpus.sizes_D.sum())


def plot_entropies(prepared: PreparedCorpus, directory: Path) -> None:
    """Write the histogram of the corpus' entropies to `directory/entropy.png`, on the leader."""
    if is_leader():
        histogram_N = _histogram(prepared.corpus.directory, prepared.corpus.shards)
        write_entropy_plot(directory, histogram_N, BIN_NATS, _fractions_above(histogram_N))


def _histogram(directory: Path, shards: int) -> np.ndarray:
    """Return the number of positions in each bin of entropy, int64 [N]."""
    return np.sum([s["histogram"] for s in read_summaries(directory, "scores", shards) or []], axis=0)


def _fractions_above(histogram_N: np.ndarray) -> dict[str, float]:
    """Return the fraction of positions above each difficulty's entropy, by that entropy in nats."""
    return {str(threshold): fraction_above(histogram_N, threshold) for threshold in DIFFICULTIES.values()}


def _summaries_digest(directory: Path, shards: int) -> str:
    return digest([read_summaries(directory, kind, shards) for kind in ("tokens", "scores")])


def check_prepared(directory: Path) -> None:
    """Check that `directory` has a prepared corpus. Raises: UserError."""
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(
            f"data.prepared: {path} does not exist. Run task 'score' with --workdir={directory} for all shards, then set "
            "data.prepared to that directory.",
            field="data.prepared",
        )


def open_prepared(
    data: DataConfig, tokenizer: Tokenizer, directory: Path, proxy: str = "", plan: ShardPlan | None = None
) -> PreparedCorpus:
    """Open a prepared corpus.

    Args:
      data: section `data` of the run, which the corpus must match.
      tokenizer: must have encoded the documents.
      directory: of the corpus.
      proxy: fingerprint of the policy that must have scored it; "" = any.
      plan: its shards; None = list its files, if they are present, to compare them.

    Raises: UserError, if the manifest or a shard is missing or damaged, has another format, or belongs to another corpus,
      tokenizer or proxy.
    """
    check_prepared(directory)
    path = directory / MANIFEST
    manifest = read_json(path)

    # Compare what the corpus was made from with what this run expects.
    expected = {
        "format": FORMAT,
        **content_fields(data),
        "data.entropy_top_k": data.entropy_top_k,
        "tokenizer": tokenizer.fingerprint,
    }
    if proxy:
        expected["proxy"] = proxy
    # A run can train from a prepared corpus alone, on a machine that does not have the text files.
    with contextlib.suppress(UserError):
        expected["files"] = (plan or plan_shards(data)).files_digest
    check_made_from(path, manifest.get("made_from"), expected)

    # Compare the shards with those that were complete when the manifest was written.
    try:
        shards = int(manifest["shards"])
        summaries = manifest["summaries"]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}). Delete it and run task 'score' again.", field=str(path)
        ) from None
    if _summaries_digest(directory, shards) != summaries:
        raise UserError(
            f"{path} does not match the shards in its directory. Delete it and run task 'score' again.", field=str(path)
        )
    return PreparedCorpus(
        corpus=open_tokens(data, directory, shards),
        scores=Records(directory, "scores", shards),
        fingerprint=digest(manifest),
    )
