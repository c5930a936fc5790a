"""Checkpoints: everything that a run needs to resume, written atomically and verified by checksums."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rpt_jax.distributed.processes import in_any_process, is_leader, wait_for_all
from rpt_jax.errors import UserError
from rpt_jax.infra.digest import digest
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.infra.run_format import check_format, format_stamp
from rpt_jax.infra.signals import StopSignals
from rpt_jax.infra.storage import checkpoint_directory, is_remote, move_directory, push

logger = logging.getLogger(__name__)

DAMAGED = "damaged"


class Checkpointer:
    """Saves and restores (state, run) under `workdir/checkpoints`.

    `state` is a tree of arrays; `run` is a dict of JSON values: data-iterator state, counters, fingerprints.

    In Google Cloud Storage, every process writes its part there directly. In other object storage, the only process of the run
    writes to the local copy of the workdir, and uploads from there.

    Args:
      workdir: directory of the run.
      keep: number of checkpoints to keep.
      state: a tree of arrays with the structure, shapes and shardings of the states to save and restore.
      frozen: arrays that the run needs beside the state and that never change, such as weights below adapters. A checkpoint has
        only their checksum. None for none.
    """

    def __init__(self, workdir: Path, keep: int, state: Any, frozen: Any = None):
        self._workdir = workdir
        self._directory = checkpoint_directory(workdir)
        self._damaged = checkpoint_directory(workdir, DAMAGED)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "run"))
        self._abstract = _abstract(state)
        fingerprint_arrays(state)  # Compile this now: after a stop signal there is little time.
        self._frozen = {} if frozen is None else {"frozen": fingerprint_arrays(frozen)}
        self._staged: tuple[int, Any, dict[str, Any]] | None = None
        self._signals = StopSignals()
        self._write_first: Callable[[], None] = lambda: None

    def write_first(self, write: Callable[[], None]) -> None:
        """Call `write` at the start of every save: what a run that resumes from the checkpoint expects to find on disk."""
        self._write_first = write

    def register_with(self, signals: StopSignals) -> None:
        """Save what is staged when a stop signal arrives, until `close`.

        With several processes the loop has to save, since only all of them together can: see `RunContext.stop_if_requested`.
        """
        self._signals = signals
        signals.set_save(self.save_and_wait, at_step_end=jax.process_count() > 1)

    def stage(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Stage the state that the next `save` (or a stop signal) writes.

        Code that changes or donates `state` must run inside `StopSignals.defer`.
        """
        self._staged = (step, state, run)

    def replace_staged_state(self, state: Any) -> None:
        """Stage other arrays with the same values, because those that were staged have been donated."""
        step, _, run = self._get_staged()
        self.stage(step, state, run)

    def _get_staged(self) -> tuple[int, Any, dict[str, Any]]:
        if self._staged is None:
            raise RuntimeError("nothing is staged")
        return self._staged

    def save(self) -> None:
        """Write what is staged in the background. Raises: OSError, if this write or the one before it failed."""
        with self._signals.defer():
            step, state, run = self._get_staged()
            self._write_first()
            if is_remote(self._directory) and is_leader():
                push(self._workdir)  # What the run has written before this checkpoint.
            self.check_writes()
            checksums = {"state": fingerprint_arrays(state), "run": digest(run)} | self._frozen
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                run=ocp.args.JsonSave({**format_stamp(), "run": run, "checksums": checksums}),
            )
            _raise_os_error(functools.partial(self._manager.save, step, args=items))

    def save_and_wait(self) -> str:
        """Write what is staged; return a few words on what was saved. Raises: OSError, if writing fails."""
        if self._staged is None:
            return "no step was complete"
        self.save()
        self.wait()
        if is_leader():
            push(self._workdir)
        return f"everything up to step {self._staged[0]} is in {self._directory}"

    def check_writes(self) -> None:
        """Raise an OSError if a write in the background failed. Call it in every step."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in the background. Raises: OSError, if it fails."""
        _raise_os_error(self._manager.wait_until_finished)

    def restore(self) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, run) of the newest checkpoint that is intact, or None if there is no checkpoint.

        Newer checkpoints that are damaged are moved to `workdir/damaged`, with a warning.

        Raises:
          UserError: no checkpoint is intact (nothing is moved then), one was written in another format, or the frozen arrays are
            others than those of the newest.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, run, reason = self._read(step)
            if reason:
                damaged[step] = reason
                continue
            for bad_step, bad_reason in damaged.items():
                self._set_aside(bad_step, bad_reason, instead=step)
            return step, state, run
        if damaged:
            newest = max(damaged)
            raise _damaged_error(self._directory / str(newest), damaged[newest])
        return None

    def _read(self, step: int) -> tuple[Any, dict[str, Any], str]:
        """Return the state, the run and, if the checkpoint is damaged for any process, the reason."""
        state: Any = None
        saved: dict[str, Any] = {}
        reason = ""
        try:
            saved = self._read_item(step, "run", ocp.args.JsonRestore())
            check_format(saved, self._directory / str(step))
            run = saved["run"]
            checksums = dict(saved["checksums"])
            self._check_frozen(checksums, self._directory / str(step))
            state = self._read_item(step, "state", ocp.args.StandardRestore(self._abstract))
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - orbax raises `Exception` itself if an array is truncated.
            reason = _first_line(error)
        # Each process reads its own shards. If one of them cannot, the others must not wait for it in `fingerprint_arrays`.
        if in_any_process(bool(reason)):
            return None, {}, reason or "another process cannot read its part"
        found = {"state": fingerprint_arrays(state), "run": digest(run)} | self._frozen
        altered = [item for item, checksum in checksums.items() if found.get(item) != checksum]
        return state, run, f"the checksum of its {' and '.join(altered)} does not match" if altered else ""

    def _check_frozen(self, checksums: dict[str, str], checkpoint: PurePath) -> None:
        """Raise UserError if the frozen weights are others than those that the adapters in a checkpoint belong to."""
        expected = checksums.get("frozen", "")
        found = self._frozen.get("frozen", "")
        if found != expected:
            raise UserError(
                f"the adapters in {checkpoint} belong to other frozen weights (checksum {expected[:12] or 'none'}… there, "
                f"{found[:12] or 'none'}… now), which depend on policy.path and policy.dtype: give the policy that the run "
                "started from, in the same precision, or choose another --workdir.",
                field="policy.path",
            )

    def _read_item(self, step: int, name: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]

    def _set_aside(self, step: int, reason: str, instead: int) -> None:
        """Move a damaged checkpoint out of the way, because step `instead` is used."""
        number = sum(path.name.startswith(f"{step}-") for path in self._damaged.glob("*"))
        target = self._damaged / f"{step}-{number}"
        if is_leader():
            self._damaged.mkdir(exist_ok=True)
            move_directory(self._directory / str(step), target)
        wait_for_all("set aside")
        self._manager.reload()
        logger.warning(
            "the checkpoint of step %d is damaged (%s); it was moved to %s, and the run resumes from step %d.",
            step,
            reason,
            target,
            instead,
        )

    def close(self) -> None:
        """Wait for the last write. Raises: OSError, if it fails."""
        self._signals.set_save(None)
        self.wait()
        self._manager.close()


def open_parameters(workdir: Path, step: int | None) -> tuple[int, Callable[[tuple[str, ...]], np.ndarray]]:
    """Open the parameters of a checkpoint without its optimizer state. At most one array is in memory at a time.

    Args:
      workdir: directory of the run.
      step: step of the checkpoint; None for the newest.

    Returns:
      The step, and a function from a parameter's path in the tree to its values on the host.

    Raises:
      UserError: there is no such checkpoint. The function raises it if the checkpoint is damaged.
    """
    directory = checkpoint_directory(workdir)
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and _is_complete(path))
    if not steps:
        raise UserError(f"{directory} has no checkpoints.", field=str(directory))
    if step is not None and step not in steps:
        raise UserError(
            f"{directory} has no checkpoint {step}; it has {', '.join(map(str, steps))}.", field=str(directory)
        )
    chosen = steps[-1] if step is None else step
    reader = ocp.PyTreeCheckpointHandler()

    @functools.lru_cache(maxsize=1)
    def read(path: tuple[str, ...]) -> np.ndarray:
        item: Any = 0
        for name in reversed(("params", *path)):
            item = {name: item}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        try:
            args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            [array] = jax.tree.leaves(reader.restore(directory / str(chosen) / "state", args=args))
        except Exception as error:  # noqa: BLE001 - orbax raises `Exception` itself if an array is truncated.
            raise _damaged_error(directory / str(chosen), _first_line(error)) from None
        if not isinstance(array, np.ndarray):  # A partial restore leaves what it does not find as it is.
            raise _damaged_error(directory / str(chosen), f"it has no parameter {'.'.join(path)}")
        return array

    return chosen, read


def _is_complete(checkpoint: Any) -> bool:
    """Return whether orbax has completed a checkpoint: in object storage by its mark, elsewhere by giving it its name."""
    return (checkpoint / ("commit_success.txt" if is_remote(checkpoint) else "state")).exists()


def _raise_os_error(write: Callable[[], Any]) -> None:
    """Call `write`. Raises: OSError, in place of any exception of orbax (a full disk, for example, is a ValueError)."""
    try:
        write()
    except Exception as error:  # noqa: BLE001
        raise OSError(f"a checkpoint could not be written ({_first_line(error)}); the one before it remains") from error


def _damaged_error(checkpoint: PurePath, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {checkpoint} is damaged, or it belongs to another model ({reason}). Choose another checkpoint or "
        "another --workdir; nothing was changed.",
        field="--workdir",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of `tree`, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
