"""The workdir of a run: its lock, the names of its files, and the check that a resumed run has the same config."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rpt_jax.config import Experiment, TrainingConfig
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.distributed.processes import is_leader
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.budget import budget_used
from rpt_jax.infra.rollout_files import ROLLOUTS
from rpt_jax.infra.run_format import CHECKPOINTS, METRICS, POLICY, RESULT, check_format, format_stamp
from rpt_jax.infra.shared_files import share
from rpt_jax.infra.storage import checkpoint_directory
from rpt_jax.infra.total_steps import consequences_of_total_steps

logger = logging.getLogger(__name__)

RUN_CONFIG = "run_config.json"
TRACKERS_FILE = "trackers.json"  # The id of the run at each tracker.
COLD_START = "cold_start"  # The folder of the cold start.
TRACES = "traces"  # The folder of task "traces".
_FORMAT_1_CONFIG = "config.json"
_LOCK = "lock"  # An empty file; it stays after the run.
_SHARED_FILE_ATTEMPTS = 10  # A network file system may show a new file late: look this many times, one second apart.
# Files that a run leaves in its workdir, which another run would resume from or overwrite.
_OUTPUTS = (
    f"{CHECKPOINTS}/*",
    METRICS,
    ROLLOUTS,
    TRACKERS_FILE,
    RESULT,
    "tokenizer.model",
    "tokenizer_config.json",
    POLICY,
    COLD_START,
    TRACES,
)
# Fields and sections that may change when a run is resumed. None of them changes what is learned from which data, except for the
# number of steps and the precision, which are only ever changed on purpose.
_MAY_CHANGE = (
    "checkpoint",
    "divergence",
    "evaluation",
    "logging",
    "mesh",
    "multiple_choice",
    "profile",
    "training.total_steps",
    "training.flops_budget",
    "training.seconds_budget",
    "training.log_rollouts_every",
    "training.kept_prompts_per_step",
    "training.microbatch_tokens",
    "training.logit_chunk_tokens",
    "rollout.decode_slots",
    "rollout.prefill_tokens",
    "policy.dtype",
    "policy.precision",
    "policy.head_precision",
    "policy.remat",
    "policy.attention",
    "data.workers",
    "data.score_batch_windows",
)


@contextlib.contextmanager
def claimed_workdir(workdir: Path, experiment: Experiment, force: bool = False) -> Iterator[None]:
    """Lock `workdir` for this run, and write its config there or compare it with the one that is there.

    If a UserError ends the run before its first step, a new workdir without outputs is released again, so that the user can fix a
    typo and use it, and an existing one has its config, its result and its policy as before.

    A finished run goes on if `training.total_steps` or its budget has grown; its result and its policy are kept as
    `result_<steps>.json` and `policy_<steps>`. Otherwise it is left as it is.

    With several processes, process 0 does this and the others check that they see the same directory.

    Args:
      workdir: directory of the run; created if it is missing.
      experiment: the config of the run.
      force: accept changes of all fields. Without it, only fields that do not change the experiment may differ.

    Raises:
      UserError: another run uses the workdir, its config differs in other fields, it has completed more than
        `training.total_steps` steps, or it cannot be read or written.
    """
    if not is_leader():
        share(workdir, "claimed")
        _check_shared(workdir, experiment)
        yield
        return
    with _lock(workdir, experiment):
        progress = _progress(workdir)
        release = _claim(workdir, experiment, force)
        share(workdir, "claimed")
        try:
            yield
        except UserError:
            if _progress(workdir) == progress:
                release()
            raise


def is_run_directory(path: Path) -> bool:
    """Return whether `path` is the workdir of a run, of this format or an older one."""
    return (path / RUN_CONFIG).is_file() or _has_format_1(path)


def _has_format_1(workdir: Path) -> bool:
    """Return whether there is a run config of format 1, which has the name of a model's config."""
    try:
        content = json.loads((workdir / _FORMAT_1_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "policy.path" in content


def read_run_config(workdir: Path) -> dict[str, Any]:
    """Return the config of the run in `workdir`, by field.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or of another format.
    """
    path = workdir / RUN_CONFIG
    if not path.exists() and _has_format_1(workdir):
        check_format({}, workdir / _FORMAT_1_CONFIG)
    try:
        content = {**json.loads(path.read_bytes())}
    except (TypeError, ValueError, RecursionError):
        raise _damaged(path) from None
    check_format(content, path)
    try:
        return {**content["config"]}
    except (KeyError, TypeError):
        raise _damaged(path) from None


def finished_steps(workdir: Path) -> int | None:
    """Return the number of steps of the finished run in `workdir`, None if it has none. Raises: UserError, as `read_result`."""
    result = read_result(workdir)
    return result["steps"] if result else None


def is_complete(workdir: Path, training: TrainingConfig) -> bool:
    """Return whether the training run in `workdir` is finished: it has all its steps, or has used its budget.

    Raises: UserError, as `read_result`.
    """
    result = read_result(workdir)
    if result is None:
        return False
    is_used_up = budget_used(training, result["flops"], result["seconds"]) >= 1.0
    return is_used_up or result["steps"] == training.total_steps


def read_result(workdir: Path) -> dict[str, Any] | None:
    """Return the result of the finished run in `workdir`, None if it has none.

    Raises: UserError, if the result is damaged or of another format.
    """
    path = workdir / RESULT
    if not path.exists():
        return None
    try:
        result = {**json.loads(path.read_bytes())}
    except (TypeError, ValueError, RecursionError):
        result = {}
    if result:
        check_format(result, path)
    numbers = (result.get("flops"), result.get("seconds"))
    if not isinstance(result.get("steps"), int) or not all(isinstance(number, int | float) for number in numbers):
        raise UserError(
            f"{path} is damaged, or an early version wrote it. Move it away and rerun the same command to resume from the latest "
            "checkpoint.",
            field="--workdir",
        )
    return result


def _saved_step(workdir: Path) -> int | None:
    """Return the step of the newest checkpoint, None if there is none."""
    steps = [int(path.name) for path in checkpoint_directory(workdir).glob("*") if path.name.isdecimal()]
    return max(steps, default=None)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or not the config of a run; choose another --workdir.", field="--workdir")


def _lock(workdir: Path, experiment: Experiment) -> IO[str]:
    """Create the workdir and lock it. The lock ends when the file is closed, however the process ends."""
    # Several processes of task "score" prepare shards of one corpus in the same workdir.
    kind = fcntl.LOCK_SH if experiment.task == "score" else fcntl.LOCK_EX
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / _LOCK).open("a")
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--workdir={workdir} is in use by another run. Wait until it ends, or choose another --workdir.",
            field="--workdir",
        ) from None
    except OSError as error:
        raise _unusable(workdir, error) from None
    return file


def _check_shared(workdir: Path, experiment: Experiment) -> None:
    """Check that the config that process 0 wrote is visible here. Raises: UserError."""
    for _ in range(_SHARED_FILE_ATTEMPTS):
        with contextlib.suppress(OSError, UserError):
            if is_complete(workdir, experiment.training) or read_run_config(workdir) == _values(experiment):
                return
        time.sleep(1.0)
    raise UserError(
        f"--workdir={workdir} is not the same directory on {socket.gethostname()} as on the host of process 0: it must be on a "
        "file system that all hosts share.",
        field="--workdir",
    )


def _values(experiment: Experiment) -> dict[str, Any]:
    values = dict(leaves(experiment))
    del values["data.shard"]  # Says which part of the work this process does. All parts share a workdir.
    return values


def _progress(workdir: Path) -> tuple[int | None, int]:
    """Return the step of the newest checkpoint and the size of the metrics, which the first step of a run changes."""
    metrics = workdir / METRICS
    return _saved_step(workdir), metrics.stat().st_size if metrics.exists() else 0


def _claim(workdir: Path, experiment: Experiment, force: bool) -> Callable[[], None]:
    """Write or compare the config; return what takes that back."""
    path = workdir / RUN_CONFIG
    try:
        if path.exists():
            return _claim_existing(workdir, experiment, force)
        _check_unclaimed(workdir)
        _write_config(path, _values(experiment))
        return lambda: None if _outputs(workdir) else path.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(workdir, error) from None


def _claim_existing(workdir: Path, experiment: Experiment, force: bool) -> Callable[[], None]:
    """Compare the config with that of the run in `workdir`, and write it if the run goes on; return what takes that back.

    Raises: UserError.
    """
    # Refuse what the run cannot continue with.
    ours = _values(experiment)
    # A field that the run does not know has been added since; until then, its default was what the run did.
    theirs = _values(Experiment()) | read_run_config(workdir)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    refused = [name for name in differing if not force and not _may_change(name)]
    if refused:
        is_finished = (workdir / RESULT).exists()
        advice = "." if is_finished else ", or add --force to resume with the new values."
        raise UserError(
            f"--workdir={workdir} belongs to a {'finished ' if is_finished else ''}run with another config "
            f"({_changes(refused, theirs, ours)}). Choose another --workdir{advice}",
            field=refused[0],
        )
    total_steps = experiment.training.total_steps
    complete = experiment.trains and is_complete(workdir, experiment.training)

    # A complete run keeps the config that it was made with.
    changes = _changes(differing, theirs, ours)
    if complete:
        if differing:
            logger.info("The run is complete, so these changes have no effect: %s.", changes)
        return lambda: None
    finished = finished_steps(workdir) if experiment.trains else None
    completed = _check_total_steps(workdir, total_steps, finished)

    # Any other run goes on with the new config.
    if _saved_step(workdir) is not None:
        _check_beginning(workdir, theirs, ours)
    earlier_config = (workdir / RUN_CONFIG).read_bytes()
    if differing:
        logger.info("The config changed: %s.", changes)
        _write_config(workdir / RUN_CONFIG, ours)
    in_vain = [name for name in differing if name.partition(".")[0] in ("cold_start", "pretrain")]
    if in_vain and ours["cold_start.total_steps"] and (workdir / COLD_START / POLICY).exists():
        logger.warning(
            "The cold start of this run is complete, so these changes have no effect: %s.",
            _changes(in_vain, theirs, ours),
        )
    earlier_total = theirs.get("training.total_steps", total_steps)
    for consequence in consequences_of_total_steps(experiment, earlier_total, completed):
        logger.warning(consequence)
    renamed = _keep_outputs(workdir, completed) if experiment.trains and total_steps > completed else {}

    def take_back() -> None:
        atomic_write(workdir / RUN_CONFIG, earlier_config)
        for output, kept in renamed.items():
            kept.replace(output)

    return take_back


def _check_beginning(workdir: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Check that a run with a checkpoint keeps its task and its adapters, and its cold start if it had one. Raises: UserError."""
    adapters = [name for name in ours if name.startswith("policy.lora.")]
    if ours["policy.lora.rank"]:
        adapters.append("policy.dtype")  # The frozen weights are stored in it.
    for name, is_same in (
        ("task", theirs.get("task") == ours["task"]),
        ("cold_start.total_steps", bool(theirs.get("cold_start.total_steps")) == bool(ours["cold_start.total_steps"])),
        *((name, theirs.get(name) == ours[name]) for name in adapters),
    ):
        if not is_same:
            raise UserError(
                f"{_changes([name], theirs, ours)}: the run in --workdir={workdir} has a checkpoint already, so that --force "
                "cannot change this. Choose another --workdir, with policy.path to start from a policy of this run.",
                field=name,
            )


def _keep_outputs(workdir: Path, steps: int) -> dict[Path, Path]:
    """Rename the result and the policy of a run that was finished after `steps` steps and goes on; return the new paths."""
    renamed = {}
    for output, kept in ((RESULT, f"result_{steps}.json"), (POLICY, f"{POLICY}_{steps}")):
        if (workdir / output).exists():
            shutil.rmtree(workdir / kept, ignore_errors=True)
            (workdir / output).replace(workdir / kept)
            renamed[workdir / output] = workdir / kept
            logger.info("The finished run goes on: %s is now called %s.", workdir / output, kept)
    return renamed


def _check_total_steps(workdir: Path, total_steps: int, finished: int | None) -> int:
    """Check that a run can go on to `total_steps` steps, and return how many it has completed.

    Args:
      workdir: directory of the run.
      total_steps: of the config.
      finished: number of steps of the run if it is finished.

    Raises: UserError.
    """
    saved = _saved_step(workdir)
    completed = max(saved or 0, finished or 0)
    if total_steps < completed:
        raise UserError(
            f"training.total_steps={total_steps} must be at least {completed}, the number of steps that the run in "
            f"--workdir={workdir} has completed.",
            field="training.total_steps",
        )
    if finished is not None and total_steps > finished and saved is None:
        raise UserError(
            f"training.total_steps={total_steps}: the finished run of {finished} steps in --workdir={workdir} has no checkpoint "
            f"left to continue from. Choose another --workdir, with policy.path={workdir / POLICY} to start from its policy.",
            field="training.total_steps",
        )
    return completed


def _check_unclaimed(workdir: Path) -> None:
    """Check that a directory without a run config holds no run. Raises: UserError."""
    if _has_format_1(workdir):
        check_format({}, workdir / _FORMAT_1_CONFIG)
    if outputs := _outputs(workdir):
        raise UserError(
            f"{outputs[0]} exists, but --workdir={workdir} has no {RUN_CONFIG} of the run that wrote it: choose another "
            "--workdir.",
            field="--workdir",
        )


def _may_change(name: str) -> bool:
    return name in _MAY_CHANGE or name.partition(".")[0] in _MAY_CHANGE


def _changes(names: list[str], theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now" for name in names[:5]) + more


def _write_config(path: Path, values: dict[str, Any]) -> None:
    atomic_write(
        path, json.dumps({**format_stamp(), "command": shlex.join(sys.orig_argv), "config": values}, indent=1) + "\n"
    )


def _outputs(workdir: Path) -> list[Path]:
    return sorted(found for output in _OUTPUTS for found in workdir.glob(output))


def _unusable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f"--workdir={workdir} cannot be used ({error.filename}: {error.strerror}). Choose another --workdir.",
        field="--workdir",
    )
