"""Task "score": tokens and entropies of a corpus, shard by shard, for `data.prepared` of training runs."""

from __future__ import annotations

import logging
from pathlib import Path

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.corpus.prepared import plot_entropies, prepare
from rpt_jax.corpus.tokenization import plan_shards
from rpt_jax.infra.plots import PLOTS
from rpt_jax.infra.run_context import RunContext
from rpt_jax.setup import load_starting_policy

logger = logging.getLogger(__name__)


def score(experiment: Experiment, workdir: Path, mesh: Mesh, context: RunContext) -> None:
    """Tokenize and score the shards that `data.shard` names, with `policy.path` as the proxy model.

    Shards that are complete in `workdir` are skipped, so that the same command resumes.

    Raises:
      UserError: the corpus or the policy cannot be used.
    """
    policy, params, tokenizer = load_starting_policy(experiment.policy, mesh)
    scorer = Scorer(policy, params, tokenizer, mesh, experiment)
    prepared = prepare(scorer, plan_shards(experiment.data), workdir, context)
    if prepared is None:
        logger.info("Shard %s is complete; other shards of %s are missing.", experiment.data.shard, workdir)
    else:
        plot_entropies(prepared, workdir / PLOTS)
        windows = len(prepared.corpus.tokens)
        logger.info("Complete, %s windows: train with --config.data.prepared=%s", f"{windows:,}", workdir)
