"""Memory, memory maps and open files over a long run: whether they grow.

The run is configs/rpt_tiny.py at its smallest, with evaluations and checkpoints, in a temporary directory. The table
shows medians of the first and the last fifth of the steps; the first tenth, in which programs are compiled, is left
out. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rpt_jax.bench.options import positive
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_format import METRICS

_SMALLEST_RUN = (
    "data.source_options.documents=60",
    "data.held_out_documents=20",
    "data.max_document_tokens=128",
    "prompt.max_tokens=128",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=8",
    "training.prompts_per_step=2",
    "training.microbatch_tokens=256",
    "training.dynamic_sampling_from=20",
    "training.log_rollouts_every=100",
    "evaluation.positions=4",
    "evaluation.unseen_positions=2",
    "evaluation.every_steps=50",
    "checkpoint.every_steps=25",
    "checkpoint.keep=1",
)
_METRICS = ("memory/resident_mb", "memory/maps", "memory/open_files")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--steps", type=positive, default=1000, help="steps of the run, at least 50")
    parser.add_argument("--config", default="configs/rpt_tiny.py", help="config of the run, before it is made smaller")


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table.

    Raises:
      UserError: there are too few steps, this is not Linux, or the run failed.
    """
    if options.steps < 50:
        raise UserError(f"--steps={options.steps} must be at least 50.", field="--steps")
    if not sys.platform.startswith("linux"):
        raise UserError(f"bench soak runs on Linux only; this platform is {sys.platform}.", field="soak")

    # A separate process, so that the figures do not include the memory of this one.
    overrides = [f"--config.{field}" for field in (*_SMALLEST_RUN, f"training.total_steps={options.steps}")]
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        command = [sys.executable, "-m", "rpt_jax.main", f"--config={options.config}", f"--workdir={workdir}"]
        code = subprocess.run([*command, *overrides], check=False).returncode
        if code:
            raise UserError(f"the run exited with code {code}; its last message says why.", field="--config")
        lines = read_metrics(workdir / METRICS)

    # Compare the beginning with the end, without the steps that compile.
    settled = lines[len(lines) // 10 :]
    fifth = len(lines) // 5
    series = {name: [line[name] for line in settled] for name in _METRICS}
    series["programs compiled"] = list(itertools.accumulate(line["time/compiled_programs"] for line in settled))
    rows = []
    for name, values in series.items():
        first = statistics.median(values[:fifth])
        last = statistics.median(values[-fifth:])
        rows.append([name, *(round(x, 1) for x in (first, last, last - first, max(values)))])
    return ["quantity", "first fifth", "last fifth", "growth", "maximum"], rows
