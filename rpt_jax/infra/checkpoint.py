"""Everything a run needs to go on, committed together or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rpt_jax.distributed.processes import in_any_process, is_leader, wait_for_all
from rpt_jax.distributed.rendezvous import leave
from rpt_jax.errors import UserError
from rpt_jax.infra.fingerprint import digest, fingerprint_arrays
from rpt_jax.infra.signals import defer_signals, end_stopped, save_on_stop, was_asked
from rpt_jax.infra.workdir import CHECKPOINTS

DAMAGED = "damaged"


class Checkpointer:
    """Saves and restores (state, run) under `workdir/checkpoints`.

    `state` is a tree of arrays; `run` is what JSON can hold (data-iterator state, counters, fingerprints). While it is open,
    a signal saves what is held before the process ends; of several processes all do, in the next `check`.

    Args:
      state: a tree of arrays like those that are to be saved; restored ones have its shardings.
    """

    def __init__(self, workdir: Path, keep: int, state: Any):
        self._directory, self._aside = (workdir / CHECKPOINTS).resolve(), (workdir / DAMAGED).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "run"))
        self._abstract = _abstract(state)
        fingerprint_arrays(state)  # Compiled now, and not when a signal has left little time.
        self._held: tuple[int, Any, dict[str, Any]] | None = None
        save_on_stop(self._save_and_wait, together=jax.process_count() > 1)

    def hold(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Name what is saved next, by `save` or by a signal. What changes or donates `state` is inside `defer_signals`."""
        self._held = (step, state, run)

    def save(self) -> None:
        """Write what is held in the background. Raises: OSError, where the write before it failed."""
        with defer_signals():
            step, state, run = self._held
            self._check_write()
            marks = {"state": fingerprint_arrays(state), "run": digest(run)}
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave({"run": run, "marks": marks})
            )
            _explained(functools.partial(self._manager.save, step, args=arguments))

    def save_unchanged(self, state: Any) -> None:
        """Write what is held, and wait for it; `state` is that of `hold`, whose own arrays were donated."""
        step, _, run = self._held
        self.hold(step, state, run)
        self._save_and_wait()

    def check(self) -> None:
        """To be called in every step; ends several processes where one had a signal.

        Raises: OSError, where a write in the background has failed.
        """
        self._check_write()
        if jax.process_count() > 1 and in_any_process(was_asked()):
            saved = self._save_and_wait()
            leave()
            end_stopped(saved)

    def _check_write(self) -> None:
        if not self._manager.is_saving_in_progress():
            _explained(self._manager.wait_until_finished)

    def _save_and_wait(self) -> str:
        if self._held is None:
            return "no step was complete"
        self.save()
        _explained(self._manager.wait_until_finished)
        return f"everything up to step {self._held[0]} is in {self._directory}"

    def restore(self) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, run) of the newest good checkpoint; None where there is no checkpoint.

        Damaged ones that are newer are moved to `workdir/damaged`, and said. Raises: UserError, naming the newest, where none
        is good; nothing is moved then.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, run, reason = self._read(step)
            if reason:
                damaged[step] = reason
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, reason, instead=step)
            return step, state, run
        if damaged:
            newest = max(damaged)
            raise _damaged(self._directory / str(newest), damaged[newest])
        return None

    def _read(self, step: int) -> tuple[Any, dict[str, Any], str]:
        """Return the state, the run and, where it is damaged for this process or another, why."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(self._abstract), run=ocp.args.JsonRestore())
        reason = ""
        try:
            restored = self._manager.restore(step, args=items)
            run, marks = restored.run["run"], dict(restored.run["marks"])
        except Exception as error:  # noqa: BLE001 - that very class, where the numbers of an array are cut short.
            reason = _reason(error)
        # Each process reads its own part: one that cannot must not leave the others waiting for the digest of all.
        if in_any_process(bool(reason)):
            return None, {}, reason or "another process cannot read its part"
        found = {"state": fingerprint_arrays(restored.state), "run": digest(run)}
        altered = [part for part, mark in marks.items() if found.get(part) != mark]
        return restored.state, run, f"its {' and '.join(altered)} differ from what was saved" if altered else ""

    def _set_aside(self, step: int, reason: str, instead: int) -> None:
        number = sum(path.name.startswith(f"{step}-") for path in self._aside.glob("*"))
        place = self._aside / f"{step}-{number}"
        if is_leader():
            self._aside.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(place)
        wait_for_all("set aside")
        self._manager.reload()
        print(f"warning: the checkpoint of step {step} is damaged ({reason}): step {instead} is used, {place} kept.")

    def close(self) -> None:
        """Wait for the last write. Raises: OSError, where it fails."""
        save_on_stop(None)
        _explained(self._manager.wait_until_finished)
        self._manager.close()


def open_parameters(workdir: Path, step: int | None) -> tuple[int, Callable[[tuple[str, ...]], np.ndarray]]:
    """Open the parameters of one checkpoint, without its optimizer and with nothing in memory but the last one read.

    Args:
      step: of the checkpoint; None for the newest.

    Returns: its step, and a function from a parameter's path in the tree to its values on the host.
    Raises: UserError, where there is no such checkpoint; so does the function, where it is damaged.
    """
    directory = (workdir / CHECKPOINTS).resolve()
    steps = sorted(
        int(path.name) for path in directory.glob("*") if path.name.isdecimal() and (path / "state").is_dir()
    )
    if not steps or step not in (None, *steps):
        there = f"has {', '.join(map(str, steps))}" if steps else "has none"
        raise UserError(f"{directory} {there}, but no checkpoint {'' if step is None else step}".rstrip() + ".")
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
        except Exception as error:  # noqa: BLE001 - as above.
            raise _damaged(directory / str(chosen), _reason(error)) from None
        return array

    return chosen, read


def _explained(write: Callable[[], Any]) -> None:
    """Run a step of a write. Raises: OSError in place of whatever orbax raises, which has the same cause."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - of several classes, ValueError among them for a full disk.
        raise OSError(f"a checkpoint could not be written ({_reason(error)}); the one before it stands") from error


def _damaged(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {checkpoint} is damaged or not this run's ({reason}). Choose another one, or another "
        "--workdir; nothing was changed."
    )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of `tree`, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
