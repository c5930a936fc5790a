"""Runs that are killed again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpt_jax.errors import ExitCode
from rpt_jax.infra.metrics import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS
from tests.helpers.runs import SMALL, comparable, tensorboard_events

KILLS = 50
SHORT = SMALL | {
    "training.prompts_per_step": 2,
    "training.total_steps": 40,
    "training.dynamic_sampling_from": 6,
    "rollout.max_new_tokens": 16,
    "evaluation.every_steps": 3,
    "checkpoint.every_steps": 1,
}


def start_run(workdir: Path, cache: Path) -> subprocess.Popen[bytes]:
    overrides = [f"--config.{name}={value}" for name, value in SHORT.items()]
    run = [sys.executable, "-m", "rpt_jax.main", f"--workdir={workdir}", "--config=configs/rpt_tiny.py", *overrides]
    # Later runs read compiled programs from this cache. Otherwise most of the kills would hit a compilation.
    keep = {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    return subprocess.Popen(run, cwd=ROOT, env=os.environ | keep, stdout=log, stderr=log)


def tensorboard_steps(workdir: Path) -> dict[str, list[int]]:
    """Return the steps of each TensorBoard curve, in the order of the files."""
    curves: dict[str, list[int]] = {}
    for event in tensorboard_events(workdir):
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append(event.step)
    return curves


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Return a complete run, a cache of its programs, and the seconds that a run with this cache takes."""
    directory = tmp_path_factory.mktemp("whole")
    for name in ("first", "second"):
        start = time.monotonic()
        assert start_run(directory / name, directory / "cache").wait(timeout=CHILD_SECONDS) == 0, (
            directory / f"{name}.log"
        )
    return directory / "second", directory / "cache", time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_at_random_equals_an_uninterrupted_one(uninterrupted, tmp_path, kind):
    whole, cache, seconds = uninterrupted
    rng, kills, workdir = random.Random(8), 0, tmp_path / "run"
    while True:
        process = start_run(workdir, cache)
        # Late enough to reach every phase, early enough that the run is not complete before it was killed often enough.
        delay = rng.uniform(0.1, 0.7) * seconds if kills < KILLS else 1800
        try:
            code = process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            code = process.wait(timeout=CHILD_SECONDS)
            kills += 1
        if code == 0 and kills < KILLS:
            # The run was complete before the last kill: compare it, and start another one.
            assert comparable(workdir) == comparable(whole)
            workdir = tmp_path / f"run-{kills}"
            continue
        if code == 0:
            break
        # Before the handlers are installed, a signal simply ends the process.
        assert code in ((-kind,) if kind == signal.SIGKILL else (-kind, ExitCode.RESTART)), code
    assert comparable(workdir) == comparable(whole)
    steps = [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]
    curves = tensorboard_steps(workdir)
    assert steps == list(range(41)) and curves["reward/mean"] == steps[1:] and curves["time/step"] == steps
    assert not (workdir / "damaged").exists()
