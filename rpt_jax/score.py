"""Task "score": tokens and entropies of a corpus, shard by shard, for `data.prepared` of training runs."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.prepared import prepare
from rpt_jax.distributed.mesh import check_batches
from rpt_jax.setup import check_top_k, load_start


def prepare_corpus(experiment: Experiment, workdir: Path, mesh: Mesh) -> None:
    """Tokenize and score in `workdir` what is not there yet, with `policy.path` as the proxy. Raises: UserError."""
    check_batches(mesh, {"data.score_batch_windows": experiment.data.score_batch_windows})
    policy, params, tokenizer = load_start(experiment.policy, mesh)
    check_top_k(experiment.data.entropy_top_k, policy)
    prepared = prepare(experiment, policy, params, tokenizer, mesh, workdir)
    if prepared is None:
        print(f"Shard {experiment.data.shard} is complete; others of {workdir} are not yet.")
    else:
        windows = len(prepared.corpus.tokens)
        print(f"Complete, {windows:,} windows: train with --config.data.prepared={workdir}")
