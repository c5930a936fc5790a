"""A small experiment for preflight, and its programs compiled on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from rpt_jax.config import Experiment, from_config_dict, load_config_file
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.preflight.check import ProgramReport, check_programs
from rpt_jax.preflight.costs import flops_per_chip
from rpt_jax.preflight.programs import Step, make_step
from rpt_jax.preflight.topology import parse_topology
from tests.helpers.paths import CONFIGS, ROOT
from tests.helpers.processes import CHILD_SECONDS

SMALL = [
    "policy.path=",
    "data.max_document_tokens=32",
    "data.min_context=16",
    "prompt.max_tokens=16",
    "rollout.max_new_tokens=8",
    "rollout.samples_per_prompt=2",
    "training.prompts_per_step=2",
    "training.microbatch_tokens=64",
    "data.score_batch_windows=2",
    "policy.remat=none",
    "rollout.decode_slots=4",
    "training.logit_chunk_tokens=4096",
]


class SmallStep(NamedTuple):
    experiment: Experiment
    step: Step
    mesh: Mesh


def small_experiment(*overrides: str) -> Experiment:
    return from_config_dict(load_config_file(str(CONFIGS / "rpt_tiny.py")), [*SMALL, *overrides])


def make_small_step(*overrides: str) -> SmallStep:
    experiment, mesh = small_experiment(*overrides), make_mesh(1, 1, 1, jax.devices()[:1])
    with use_mesh(mesh):
        return SmallStep(experiment, make_step(experiment, mesh), mesh)


def check_small_step(small: SmallStep, *names: str) -> dict[str, ProgramReport]:
    """Compile the named programs of a step as if for an H100 and return their reports."""
    step = small.step._replace(programs=tuple(p for p in small.step.programs if p.name in names))
    with use_mesh(small.mesh):
        flops = flops_per_chip(small.experiment, small.step)
        return {r.program: r for r in check_programs(small.experiment, step, parse_topology("h100:1"), flops, {})}


def run_preflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command for the small experiment in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_OPTIMIZATION_LEVEL": "O0"}
    overrides = [f"--config.{field}" for field in SMALL]
    command = [sys.executable, "-m", "rpt_jax.preflight", "--config=configs/rpt_tiny.py", *overrides, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
