"""A corpus that two processes prepare together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rpt_jax import main
from rpt_jax.corpus.prepared import PreparedCorpus, open_prepared
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.corpora import scoring_experiment, write_number_corpus
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import CHILD_SECONDS

pytestmark = pytest.mark.slow


def test_two_processes_write_the_scores_of_one(tmp_path: Path) -> None:
    """On a mesh of two processes, as in training, both compute and one writes."""
    (tmp_path / "texts").mkdir()
    corpus = write_number_corpus(tmp_path / "texts")
    one, both = tmp_path / "one", tmp_path / "both"
    main.run(scoring_experiment(Path(corpus.path)), one)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.helpers.prepare_child"]
    processes = [
        subprocess.Popen(
            [*command, str(number), "2", port, corpus.path, str(both)],
            cwd=ROOT,
            env=os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=CHILD_SECONDS)
        assert process.returncode == 0, output
        assert "Complete, " in output

    tokenizer = load_tokenizer(TINY)

    def by_tokens(opened: PreparedCorpus) -> dict[bytes, np.ndarray]:
        pairs = zip(opened.corpus.tokens, opened.scores, strict=True)
        return {ids.tobytes(): np.stack(entropies) for (ids, _), entropies in pairs}

    expected = by_tokens(open_prepared(corpus, tokenizer, one))
    found = by_tokens(open_prepared(corpus, tokenizer, both))
    assert expected.keys() == found.keys()
    for ids, entropies in expected.items():
        np.testing.assert_allclose(found[ids], entropies, atol=1e-5)
