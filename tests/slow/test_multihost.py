"""Complete runs of several processes: they train as one process does, and resume with other numbers of processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.weights.hf import load_policy
from tests.helpers.paths import ROOT
from tests.helpers.processes import CHILD_SECONDS, HERE, free_port, run_children, starter, with_devices
from tests.helpers.runs import SMALL, comparable


@pytest.fixture
def start() -> Iterator[object]:
    with starter() as start_all:
        yield start_all


RUN = SMALL | {"training.total_steps": 4, "mesh.fsdp": 2, "rollout.max_new_tokens": 16, "checkpoint.every_steps": 100}


def start_run(start, workdir: Path, processes: int, devices: int, **overrides: object) -> list[subprocess.Popen[str]]:
    """Start the processes of one run, with `devices` simulated devices each."""
    fields = [f"--config.{name}={value}" for name, value in (RUN | overrides).items()]
    common = ["--config=configs/rpt_tiny.py", f"--workdir={workdir}", *fields]
    joint = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"] if processes > 1 else []
    own = [[*common, *joint, *([f"--process={i}"] if joint else [])] for i in range(processes)]
    return start("rpt_jax.main", own, devices)


def finish(processes: Sequence[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    outputs: list[tuple[str, str]] = [("", "")] * len(processes)

    def read(number: int) -> None:  # In parallel, because a full pipe would block a process.
        outputs[number] = processes[number].communicate(timeout=CHILD_SECONDS)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def wait_for_step(workdir: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    for _ in range(1800):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        with contextlib.suppress(UserError, IndexError):
            if read_metrics(workdir / "metrics.jsonl")[-1]["step"] >= step:
                return
        time.sleep(0.5)
    raise TimeoutError(step)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of one process with four devices, data 2 × fsdp 2."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    fields = [f"--config.{name}={value}" for name, value in RUN.items()]
    command = [sys.executable, "-m", "rpt_jax.main", "--config=configs/rpt_tiny.py", f"--workdir={workdir}", *fields]
    subprocess.run(command, cwd=ROOT, env=with_devices(4), check=True, capture_output=True)
    return workdir


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """Compare metrics and weights, up to the order of sums over devices.

    Where a gradient is as small as what rounding adds, Adam's steps can differ by as much as they are long.
    """
    for mine, other in zip(comparable(ours), comparable(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-4, err_msg=f"step {mine['step']}: {name}")
    mine, other = (load_policy(workdir / "policy")[1] for workdir in (ours, theirs))
    leaves = zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True)
    differences = np.abs(np.concatenate([np.ravel(a - b) for a, b in leaves]))
    assert np.quantile(differences, 0.999) < 1e-5 and differences.max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_train_as_one_process_with_as_many_devices(
    start, alone: Path, tmp_path: Path, processes: int, devices: int
) -> None:
    outputs = finish(start_run(start, tmp_path / "run", processes, devices))
    assert_close_runs(tmp_path / "run", alone)
    assert "Complete in" in outputs[0][0], "process 0 prints the result"
    for out, _ in outputs[1:]:
        assert "rpt" not in out and "Next-token" not in out, f"the others print nothing: {out}"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["after"]
    curves = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(curves) == 1 and list((tmp_path / "run" / "plots").glob("*.png"))


@pytest.mark.slow
def test_sigterm_to_one_of_four_saves_all_and_one_or_two_processes_resume(start, alone: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    processes = start_run(start, run, 4, 1)
    wait_for_step(run, 1, processes)
    processes[2].send_signal(signal.SIGTERM)
    outputs = finish(processes, ExitCode.RESTART)
    assert "SIGTERM: stopping after this step, together with the other processes, within" in outputs[2][1]
    assert all("Stopped: everything up to step" in err for _, err in outputs)
    [saved] = (run / "checkpoints").glob("[0-9]*")
    assert 1 < int(saved.name) < RUN["training.total_steps"]
    assert len(list(saved.rglob("ocdbt.process_*"))) == 4, "all of them wrote their part"
    shutil.copytree(run, copy)
    [(out, _)] = finish(start_run(start, run, 1, 4))
    assert f"Resuming from step {saved.name}" in out
    assert_close_runs(run, alone)
    [(out, _), _] = finish(start_run(start, copy, 2, 1, **{"mesh.fsdp": 1}))
    assert f"Resuming from step {saved.name}" in out
    assert [line["step"] for line in comparable(copy)] == [line["step"] for line in comparable(alone)]


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(start, tmp_path: Path) -> None:
    port, fields = free_port(), [f"--config.{name}={value}" for name, value in RUN.items()]
    common = [
        f"--config={ROOT / 'configs' / 'rpt_tiny.py'}",
        "--workdir=run",
        f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
        *fields,
    ]
    started = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        command = [sys.executable, "-m", "rpt_jax.main", *common, f"--process={number}"]
        environ = with_devices(1) | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(command, cwd=tmp_path / str(number), env=environ, stdout=-1, stderr=-1, text=True)
        )
    for _, err in finish(started, 2):
        assert f"--workdir=run is not the same directory on {HERE} as on the host of process 0" in err


# Limits that must pass in a test, in seconds. If one strikes during startup on a busy machine, the next is tried.
STALL_SECONDS = (6, 60, 600)


def run_until_stall(start, event: str, processes: int) -> tuple[int, list[int], list[tuple[str, str]]]:
    """Run `multihost_child` with a limit that does not strike during startup; return it, and what `run_children` does."""
    limit, codes, outputs = 0, [], []
    for limit in STALL_SECONDS:
        codes, outputs = run_children(start, event, processes, limit)
        if not any("after phase startup" in err for _, err in outputs):
            break
    return limit, codes, outputs


@pytest.mark.slow
def test_all_processes_name_the_one_that_stalls(start) -> None:
    limit, codes, outputs = run_until_stall(start, "another stalls", 3)
    assert codes == [ExitCode.RESTART] * 3, outputs
    stalled = (
        f"no progress for {limit} s (--stall_seconds): all wait for process 1 on {HERE}, which stopped after phase data"
    )
    for out, err in outputs:
        assert f"error: {stalled}" in err, err
        assert not [line for line in out.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.slow
def test_a_frozen_process_0_is_detected(start) -> None:
    limit, codes, [(_, err)] = run_until_stall(start, "leader is frozen", 2)
    assert codes == [ExitCode.RESTART]
    assert f"no progress for {limit} s (--stall_seconds), and process 0 on {HERE}" in err
