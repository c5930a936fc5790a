"""One of several processes that prepare a corpus together.

Usage: `python -m tests.helpers.prepare_child NUMBER COUNT PORT CORPUS WORKDIR`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.infra.console import console_logging
from rpt_jax.infra.run_context import RunContext
from rpt_jax.score import score
from tests.helpers.corpora import scoring_experiment


def main(number: int, count: int, port: int, corpus: str, workdir: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", count, number)
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh), console_logging():
        score(scoring_experiment(Path(corpus)), Path(workdir), mesh, RunContext())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
