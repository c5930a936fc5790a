"""Run the commands of a study one after another, as processes of their own."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from rpt_jax.errors import ExitCode, UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.console import Progress
from rpt_jax.infra.run_format import format_stamp
from rpt_jax.infra.signals import StopSignals
from rpt_jax.study.file_lock import locked
from rpt_jax.study.outcome import Failure
from rpt_jax.study.plan import Run, UnitPlan, cost

logger = logging.getLogger(__name__)

FAILURE = "failure.json"
_LOG_BYTES = 10_000  # Read from the end of a log for the message of a failure.
_LOG_LINES = 5


class RunFailed(Exception):
    """A run ended without its result; the message says why, in a line or a few."""


class Stopped(Exception):
    """A stop signal has arrived; `StopSignals` ends the process."""


class Executor:
    """Runs the commands of a study.

    A run that is complete is skipped, and any other resumes from its own checkpoints. A run that failed is not tried again by
    this object, so that it fails every unit that shares it.

    Args:
      directory: of the study.
      signals: a stop signal is passed on to the running process, which saves and ends.
    """

    def __init__(self, directory: Path, signals: StopSignals):
        self._directory = directory
        self._signals = signals
        self._child: subprocess.Popen[bytes] | None = None
        self._current = ""  # What the child runs.
        self._failed: dict[Path, str] = {}  # Messages of the runs that failed, by their directories.
        signals.set_save(self._stop_child)
        signals.on_exit = self._kill_child

    def run_unit(self, unit: UnitPlan, completed: Callable[[Run], None]) -> Failure | None:
        """Run what is left of a unit.

        Args:
          unit: the unit.
          completed: called after every run of it.

        Returns: the failure, which is also written to the directory of the unit; None if the unit is complete.
        """
        unit.directory.mkdir(parents=True, exist_ok=True)
        (unit.directory / FAILURE).unlink(missing_ok=True)
        for run in unit.runs:
            try:
                self.run(run)
            except RunFailed as failed:
                failure = Failure(
                    arm=unit.unit.arm,
                    seed=unit.unit.seed,
                    budget=unit.unit.budget,
                    stage=run.name,
                    message=str(failed),
                    log=str(run.log.relative_to(self._directory)),
                )
                write_failure(unit.directory, failure)
                return failure
            completed(run)
        return None

    def run(self, run: Run) -> None:
        """Run a command unless it is complete, or wait for another process that runs it. Raises: RunFailed, Stopped."""
        if run.directory in self._failed:
            raise RunFailed(self._failed[run.directory])
        try:
            if not run.is_complete:
                run.directory.parent.mkdir(parents=True, exist_ok=True)
                with locked(run.lock, self._waiting_for(run)) as lock:
                    if not run.is_complete:
                        self._run_process(run, [*run.command, *budget_arguments(run)], lock)
            check_budget_spent(run)
        except (RunFailed, UserError) as error:
            self._failed[run.directory] = str(error)
            raise RunFailed(str(error)) from None

    def _run_process(self, run: Run, command: Sequence[str], lock: int) -> None:
        """Run a command to its end. Raises: RunFailed, Stopped."""
        command = [*command, f"--workdir={run.directory}"]
        name = run.directory.relative_to(self._directory)
        logger.info("%s: output in %s", name, run.log)
        with run.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            # A stop signal waits until the child is known. The child inherits the lock, in case this process is killed. It
            # runs in a new session, so that Ctrl-C in a terminal reaches this process only.
            with self._signals.defer():
                self._raise_if_stopped()
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
                self._current = str(name)
        code = self._child.wait()
        self._raise_if_stopped()
        self._child = None
        if code != ExitCode.COMPLETE or not run.is_complete:
            raise RunFailed(f"{_describe_exit(code, run)}: {last_lines(run.log)}")

    def _waiting_for(self, run: Run) -> Callable[[], None]:
        """Return what `locked` calls while another process runs the same."""
        logged: list[str] = []

        def waiting() -> None:
            self._raise_if_stopped()
            if not logged:
                logged.append(run.name)
                logger.info("Waiting for another process that runs %s.", run.directory.relative_to(self._directory))

        return waiting

    def _raise_if_stopped(self) -> None:
        if self._signals.requested:
            raise Stopped

    def _stop_child(self) -> str:
        """Ask the running process to save and end, and wait for it; return what was stopped."""
        child = self._child
        if child is None:
            return "between two runs"
        # A scheduler may have sent the same SIGTERM to all processes. A second one would end the child at once; SIGUSR1 does not.
        if child.poll() is None:
            child.send_signal(signal.SIGUSR1)
        child.wait()
        return f"{self._current} ended with exit code {child.returncode}"

    def _kill_child(self, code: int, reason: str) -> None:
        """End the running process, if it still runs; its latest checkpoint remains."""
        del code, reason
        if self._child and self._child.poll() is None:
            self._child.kill()


def run_units(units: Sequence[UnitPlan], executor: Executor, record: Callable[[], object]) -> int:
    """Run units one after another, with a progress bar; return how many failed. A failure does not stop the others.

    Args:
      units: what to run.
      executor: runs them.
      record: called after every unit.

    Raises: Stopped.
    """
    left = {run.directory for unit in units for run in unit.runs if not run.is_complete}
    total = len({run.directory for unit in units for run in unit.runs})
    failed = 0
    with Progress("study, runs", total, total - len(left)) as progress:
        for unit in units:

            def completed(run: Run, unit: UnitPlan = unit) -> None:
                if run.directory in left:
                    left.remove(run.directory)
                    progress.advance(f"{unit.unit}: {run.name}")

            if failure := executor.run_unit(unit, completed):
                failed += 1
                logger.warning("%s failed: %s: %s (%s)", unit.unit, failure.stage, failure.message, failure.log)
                skipped = {run.directory for run in unit.runs} & left
                left.difference_update(skipped)
                progress.total -= len(skipped)
            record()
    return failed


def planned_command(run: Run) -> list[str]:
    """Return the command of a run as far as it is known before the runs that share its budget."""
    budget = ""
    if run.budget is not None:
        spent = "".join(f" minus that of {directory.name}" for directory in run.charged)
        budget = f"--config.{run.budget_field}={run.budget!r}{spent}"
    return [*run.command, *([budget] if budget else []), f"--workdir={run.directory}"]


def budget_arguments(run: Run) -> list[str]:
    """Return the argument for what is left of the budget of a run. Raises: RunFailed, if nothing is; UserError."""
    if run.budget is None:
        return []
    left = run.budget - sum(cost(directory)[run.budget_field] for directory in run.charged)
    if left <= 0:
        raise RunFailed(f"the stages before it have spent the budget of {run.budget:g}: raise it, or make them smaller")
    return [f"--config.{run.budget_field}={left!r}"]


def check_budget_spent(run: Run) -> None:
    """Check that a run with a budget has spent it. Raises: RunFailed, if it ended before; UserError."""
    if run.budget is not None and run.spent() < run.budget:
        raise RunFailed(
            f"it ended after training.total_steps, with {run.spent():.4g} of the budget of {run.budget:.4g} spent: raise it in "
            "the overrides of the stage, and run the study in another --workdir, with --results for the units that are complete"
        )


def _describe_exit(code: int, run: Run) -> str:
    """Return how a process without a result ended."""
    if code == ExitCode.COMPLETE:
        return f"exit code 0, but no {run.result}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}"


def last_lines(log: Path) -> str:
    """Return the last lines of a log, in one line."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return " / ".join([line.strip() for line in lines if line.strip()][-_LOG_LINES:])


def write_failure(directory: Path, failure: Failure) -> None:
    """Write the failure of a unit to its directory."""
    atomic_write(directory / FAILURE, json.dumps(format_stamp() | dataclasses.asdict(failure), indent=1) + "\n")


def read_failure(unit: UnitPlan) -> Failure | None:
    """Return the failure of a unit that another process or an earlier call has recorded, None if there is none.

    Raises: UserError, if it is damaged.
    """
    path = unit.directory / FAILURE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        return Failure(**{field.name: values[field.name] for field in dataclasses.fields(Failure)})
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: delete it, and run the study again.", field=str(path)) from None
