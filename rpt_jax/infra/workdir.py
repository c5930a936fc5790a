"""Whose a workdir is: one config's and, at one time, one process's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rpt_jax.config import Experiment
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.distributed.processes import is_leader, wait_for_all
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
_LOCK = "lock"  # Holds nothing; stays.
_LOOKS = 10  # At a workdir that another host has claimed, a second apart.
# What a run leaves in its workdir, and another would go on from or write over.
_OUTPUTS = (f"{CHECKPOINTS}/*", "metrics.jsonl", "result.json", "tokenizer.model", "policy", "cold_start")
# Fields and sections that a run may go on with other values of: none is part of what is learned from what, but for the number of
# steps and the precision, which whoever changes them wants changed.
_FREE = (
    "checkpoint",
    "divergence",
    "evaluation",
    "mesh",
    "training.total_steps",
    "training.log_rollouts_every",
    "training.microbatch_tokens",
    "training.logit_chunk_tokens",
    "rollout.decode_slots",
    "rollout.prefill_tokens",
    "policy.dtype",
    "policy.remat",
    "policy.attention",
    "data.workers",
)


@contextlib.contextmanager
def claimed_workdir(workdir: Path, experiment: Experiment, force: bool = False) -> Iterator[None]:
    """Make `workdir` this experiment's while it runs: write its config there, or check that the one there is the same.

    Fields that a run may go on with other values of are taken as they are now; others too, with `force`. Bad input that ends a
    first run before it has begun gives the workdir up again: whoever mends a path in the command may keep its workdir.

    Of several processes of one run the leader does so, and the others look whether they see the same directory.

    Raises: UserError, naming the fields that differ, or the file, directory or process that is in the way.
    """
    if not is_leader():
        wait_for_all("claimed")
        _find(workdir, experiment)
        yield
        return
    with _lock(workdir, experiment):
        fresh = _claim(workdir, experiment, force)
        wait_for_all("claimed")
        try:
            yield
        except UserError:
            if fresh and not _outputs(workdir):
                (workdir / CONFIG).unlink(missing_ok=True)
            raise


def _lock(workdir: Path, experiment: Experiment) -> IO[str]:
    """Make the workdir and take its lock, which is let go with the file, however the process ends."""
    # Processes of task "score" prepare shards of one corpus in one workdir.
    kind = fcntl.LOCK_SH if experiment.task == "score" else fcntl.LOCK_EX
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / _LOCK).open("a")
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--workdir={workdir} is in use by another run. Wait for its end, or choose another --workdir."
        ) from None
    except OSError as error:
        raise _unusable(workdir, error) from None
    return file


def _find(workdir: Path, experiment: Experiment) -> None:
    """Raises: UserError, where the leader's config is not in this process's workdir, also not a little later."""
    for _ in range(_LOOKS):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((workdir / CONFIG).read_bytes()) == _values(experiment):
                return
        time.sleep(1.0)  # File systems of several hosts may show a file late.
    raise UserError(
        f"--workdir={workdir} is not the same directory on {socket.gethostname()} as on the host of process 0: it must be on "
        "a file system that all hosts share."
    )


def _values(experiment: Experiment) -> dict[str, Any]:
    values = dict(leaves(experiment))
    del values["data.shard"]  # Which part of the work a process does, not what the work is: all parts share a workdir.
    return values


def _claim(workdir: Path, experiment: Experiment, force: bool) -> bool:
    """Return whether the workdir was nobody's before."""
    path, mine = workdir / CONFIG, _values(experiment)
    try:
        if not path.exists():
            if outputs := _outputs(workdir):
                raise UserError(
                    f"{outputs[0]} is there, but no {path} that says what made it: choose another --workdir."
                )
            _write_config(path, mine)
            return True
        theirs = {**json.loads(path.read_bytes())}
        differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        refused = [name for name in differing if not force and not _is_free(name)]
        if refused:
            raise UserError(
                f"--workdir={workdir} was made with another config ({_changes(refused, theirs, mine)}). Choose another "
                "--workdir, or add --force to go on all the same."
            )
        if differing:
            print(f"The config changed: {_changes(differing, theirs, mine)}.")
            _write_config(path, mine)
    except OSError as error:
        raise _unusable(workdir, error) from None
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged, or not the config of a run; choose another --workdir.") from None
    return False


def _is_free(name: str) -> bool:
    return name in _FREE or name.partition(".")[0] in _FREE


def _changes(names: list[str], theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(f"{n}: {theirs.get(n)!r} there, {mine.get(n)!r} now" for n in names[:5]) + more


def _write_config(path: Path, values: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(values, indent=1) + "\n")


def _outputs(workdir: Path) -> list[Path]:
    return sorted(found for output in _OUTPUTS for found in workdir.glob(output))


def _unusable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f"--workdir={workdir} cannot be used ({error.filename}: {error.strerror}). Choose another --workdir."
    )
