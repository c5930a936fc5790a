"""Whole steps of a run by phase: task "rpt" with a policy of SmolLM2's size in bfloat16.

Weights are random and documents are made of random words, so nothing is learned. Only responses near the length limit are
penalized, because a step in which all rewards are equal has no update.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from rpt_jax.bench.data import generate_corpus
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.rollouts import DTYPE, HEAD_PRECISION
from rpt_jax.bench.device.sizes import SAMPLES, Sizes
from rpt_jax.config.loading import packaged_configs
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_format import METRICS
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.tokenizers.export import exported_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import save_policy

_STEPS = 6
_CORPUS_BYTES = 60_000
_POLL_SECONDS = 0.5


def measure(report: Report, sizes: Sizes) -> None:
    """Run a few training steps in a separate process, and report each step when it is done."""
    # The device belongs to the process of the run: this one only writes files.
    jax.config.update("jax_platforms", "cpu")
    model = sizes.models[-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_policy(folder / "policy", model)
        generate_corpus(folder / "corpus.jsonl", _CORPUS_BYTES)
        config = packaged_configs() / "rpt_tiny.py"
        command = [sys.executable, "-m", "rpt_jax.main", f"--config={config}", f"--workdir={folder / 'run'}"]
        overrides = [f"--config.{field}" for field in _overrides(folder, model, sizes)]
        _report_steps(report, subprocess.Popen([*command, *overrides]), folder / "run" / METRICS)


def _write_policy(directory: Path, model: str) -> None:
    """Write random weights with the tokenizer of the packaged policy, whose ids are the first ones of the vocabulary."""
    policy = Transformer(preset(model))
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
    tokenizer = load_tokenizer(packaged_configs() / "tiny")
    save_policy(directory, policy.config, params, exported_files(tokenizer), tokenizer.fingerprint)


def _overrides(folder: Path, model: str, sizes: Sizes) -> list[str]:
    tokens = sizes.step_tokens
    return [
        f"policy.path={folder / 'policy'}",
        f"policy.preset={model}",
        f"policy.dtype={DTYPE}",
        f"policy.head_precision={HEAD_PRECISION}",
        "data.source=path",
        f"data.path={folder / 'corpus.jsonl'}",
        "data.held_out_documents=5",
        f"data.max_document_tokens={tokens}",
        "data.min_context=8",
        f"prompt.max_tokens={tokens}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.max_new_tokens={tokens}",
        "objective.overlong_weight=1.0",
        f"objective.overlong_tokens={tokens // 2}",
        f"training.prompts_per_step={sizes.step_prompts}",
        f"training.total_steps={_STEPS}",
        "training.dynamic_sampling_from=1000",
        "training.microbatch_tokens=0",
        "training.log_rollouts_every=1000",
        "evaluation.every_steps=1000",
        "evaluation.positions=4",
        "evaluation.unseen_positions=1",
        "checkpoint.every_steps=1000",
    ]


def _report_steps(report: Report, run: subprocess.Popen[bytes], path: Path) -> None:
    """Report the lines of a run's metrics as they come. Raises: UserError, if the run fails."""
    reported = 0
    while True:
        running = run.poll() is None
        lines = read_metrics(path) if path.exists() else []
        for line in lines[reported:]:
            # Line 0 is the evaluation of the starting policy.
            if line["step"] > 0:
                phases = {k.removeprefix("time/"): v for k, v in line.items() if k.startswith("time/")}
                seconds = phases.pop("step")
                named = {k: line[k] for k in ("rollout/occupancy", "speed/mfu", "speed/tokens_per_second") if k in line}
                report.figure(step=line["step"], seconds=seconds, **phases, **named)
        reported = len(lines)
        if reported > _STEPS or not running:
            break
        time.sleep(_POLL_SECONDS)
    # What the run writes after its last step takes time and measures nothing.
    if run.poll() is None:
        run.kill()
        run.wait()
    elif run.returncode:
        raise UserError(f"the run exited with code {run.returncode}; the log says why.", field="step")
