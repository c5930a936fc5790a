"""Whether a long run grows: the whole loop for many tiny steps, and what it holds at their beginning and at their end.

The run is configs/rpt_tiny.py at its smallest, evaluations and checkpoints included, in a directory that is deleted. Memory is
what is resident; files and memory maps are those that are open. Shown are medians of the first and of the last fifth of the
steps, leaving out the very first tenth, in which programs are compiled. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import FILE_NAME, read_metrics
from rpt_jax.main import run

_TINY = (
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
_HELD = ("memory/resident_mb", "memory/maps", "memory/open_files")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run, at least 50")
    parser.add_argument(
        "--config", default="configs/rpt_tiny.py", help="the run, before it is made as small as it can be"
    )


def measure(options: argparse.Namespace) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the rows of the table. Raises: UserError, where there are too few steps, or not on Linux."""
    if options.steps < 50 or not sys.platform.startswith("linux"):
        raise UserError(f"--steps={options.steps} must be at least 50, and this platform ({sys.platform}) Linux.")
    overrides = [*_TINY, f"training.total_steps={options.steps}"]
    experiment = from_config_dict(load_config_file(options.config), overrides)
    with tempfile.TemporaryDirectory() as directory:
        run(experiment, Path(directory) / "run")
        lines = read_metrics(Path(directory) / "run" / FILE_NAME)
    settled, fifth = lines[len(lines) // 10 :], len(lines) // 5
    held = {name: [line[name] for line in settled] for name in _HELD}
    held["programs compiled"] = list(itertools.accumulate(line["time/compiled_programs"] for line in settled))
    rows = []
    for name, values in held.items():
        first, last = statistics.median(values[:fifth]), statistics.median(values[-fifth:])
        rows.append([name, *(round(x, 1) for x in (first, last, last - first, max(values)))])
    return ["held", "at first", "at last", "growth", "most"], rows
