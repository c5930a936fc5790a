"""launch/slurm_gpu.sh on a real Slurm, which is started on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from tests.helpers.launchers import wait_until
from tests.helpers.runs import SMALL
from tests.helpers.slurm import Slurm, make_environment, running_slurm

pytestmark = pytest.mark.slow

JOB = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2"]
RUN = SMALL | {
    "mesh.fsdp": 2,
    "rollout.max_new_tokens": 16,
    "evaluation.every_steps": 1000,
    "checkpoint.every_steps": 1000,
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


class Job:
    """A job that runs `launch/slurm_gpu.sh` on both nodes."""

    def __init__(self, slurm: Slurm, directory: Path, *options: str, **fields: object) -> None:
        """
        Args:
          slurm: where it runs.
          directory: an empty directory, for its workdir and its log.
          options: of sbatch.
          fields: changes of `RUN`.
        """
        self.slurm = slurm
        self.workdir = directory / "run"
        self.log_file = directory / "job.log"
        make_environment(directory / "venv")
        overrides = [f"--config.{name}={value}" for name, value in (RUN | fields).items()]
        script = ["launch/slurm_gpu.sh", "--config=configs/rpt_tiny.py", f"--workdir={self.workdir}", *overrides]
        environ = {"RPT_VENV": str(directory / "venv"), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        self.number = slurm.submit(*JOB, *options, f"--output={self.log_file}", *script, **environ)

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def field(self, name: str) -> str:
        return self.slurm.job(self.number)[name]

    def steps(self) -> list[int]:
        """Return the steps that the metrics have."""
        with contextlib.suppress(UserError):
            return [line["step"] for line in read_metrics(self.workdir / "metrics.jsonl")]
        return []

    def wait_for_step(self, step: int) -> None:
        def has_come() -> bool:
            assert self.field("JobState") in ("PENDING", "RUNNING", "COMPLETING"), self.log()
            return step in self.steps()

        wait_until(has_come, f"step {step}", seconds=1800)

    def wait_for_end(self) -> None:
        wait_until(lambda: self.field("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), "the end", seconds=1800)


def test_a_time_limit_saves_and_the_requeued_job_resumes(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--time=60", "--signal=B:TERM@60", **{"training.total_steps": 100_000})
    job.wait_for_step(2)
    # Let the time limit strike soon, however long the start took: TERM comes 60 to 120 s before it.
    hours, minutes, _ = map(int, job.field("RunTime").split(":"))
    slurm.call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 3}")
    wait_until(lambda: job.field("Restarts") == "1", "the requeue")
    stopped = job.log()
    assert stopped.count("SIGUSR1: stopping after this step, together with the other processes") == 2, stopped
    assert "srun: forcing job termination" not in stopped
    [saved] = (job.workdir / "checkpoints").glob("[0-9]*")
    assert int(saved.name) >= job.steps()[-1] >= 2
    assert f"Stopped: everything up to step {saved.name}" in stopped

    slurm.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.wait_for_step(int(saved.name) + 1)
    assert f"Resuming from step {saved.name}" in job.log().removeprefix(stopped)
    steps = job.steps()
    assert steps == list(range(len(steps)))
    slurm.call("scancel", job.number)
    job.wait_for_end()
    assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "1")


def test_a_job_ends_with_its_run(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, **{"training.total_steps": 1})
    wait_until(lambda: f"StepId={job.number}.0 " in slurm.call("scontrol", "show", "steps"), "the step of srun")
    assert "CPUs=4 Tasks=2" in slurm.call("scontrol", "show", "step", f"{job.number}.0")
    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("COMPLETED", "0:0", "0"), job.log()
    assert (job.workdir / "result.json").exists()


def test_a_mistake_ends_the_job_without_a_restart(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, **{"training.total_steps": 0})
    job.wait_for_end()
    assert (job.field("JobState"), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "2:0", "0"), job.log()
    assert job.log().count("training.total_steps=0 must be at least 1") == 2
