"""Everything a run needs to go on, committed together or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rpt_jax.config import Experiment
from rpt_jax.errors import UserError
from rpt_jax.fields import leaves
from rpt_jax.infra.whole import write_whole

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# What a run leaves in its workdir, and another would go on from or write over.
_OUTPUTS = (f"{CHECKPOINTS}/*", "metrics.jsonl", "result.json", "tokenizer.model", "policy", "cold_start")


@contextlib.contextmanager
def claimed_workdir(workdir: Path, experiment: Experiment) -> Iterator[None]:
    """Make `workdir` this experiment's while it runs: write its config there, or check that the one there is the same.

    Bad input that ends a first run before it has begun gives the workdir up again: whoever mends a path in the command may
    keep its workdir. Raises: UserError, naming the fields that differ, or the file or directory that is in the way.
    """
    fresh = _claim(workdir, experiment)
    try:
        yield
    except UserError:
        if fresh and not _outputs(workdir):
            (workdir / CONFIG).unlink(missing_ok=True)
        raise


def _claim(workdir: Path, experiment: Experiment) -> bool:
    """Return whether the workdir was nobody's before."""
    path, mine = workdir / CONFIG, dict(leaves(experiment))
    del mine["data.shard"]  # Which part of the work a process does, not what the work is: all parts share a workdir.
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if outputs := _outputs(workdir):
                raise UserError(
                    f"{outputs[0]} is there, but no {path} that says what made it: choose another --workdir."
                )
            write_whole(path, json.dumps(mine, indent=1) + "\n")
            return True
        theirs = {**json.loads(path.read_text())}
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.filename}: {error.strerror}). Choose another --workdir."
        ) from None
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged, or not the config of a run; choose another --workdir.") from None
    differing = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    if differing:
        changes = "; ".join(f"{n}: {theirs.get(n)!r} there, {mine.get(n)!r} now" for n in sorted(differing)[:5])
        raise UserError(f"--workdir={workdir} was made with another config ({changes}). Choose another --workdir.")
    return False


def _outputs(workdir: Path) -> list[Path]:
    return sorted(found for output in _OUTPUTS for found in workdir.glob(output))


class Checkpointer:
    """Saves and restores (state, run) under `workdir/checkpoints`.

    `state` is a tree of arrays; `run` is what JSON can hold (data-iterator state, counters, fingerprints).
    """

    def __init__(self, workdir: Path, keep: int):
        self._directory = (workdir / CHECKPOINTS).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "run"))

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Write in the background; an error of the previous write surfaces here."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=items)

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return (step, state, run) of the newest checkpoint in the shardings of `abstract_state`; None where there is none.

        Raises: UserError, naming the checkpoint, where it cannot be read whole.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), run=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # noqa: BLE001 - that very class, where the numbers of an array are cut short.
            raise _damaged(self._directory / str(step), error) from None
        return step, restored.state, restored.run

    def close(self) -> None:
        """Wait for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def open_parameters(workdir: Path, step: int | None) -> tuple[int, Callable[[tuple[str, ...]], np.ndarray]]:
    """Open the parameters of one checkpoint, without its optimiser and with nothing in memory but the last one read.

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
            raise _damaged(directory / str(chosen), error) from None
        return array

    return chosen, read


def _damaged(checkpoint: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"the checkpoint {checkpoint} is damaged or not this run's ({reason[:200]}). Move that directory away to go on from "
        "the one before it; nothing was changed."
    )


def abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of `tree`, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
