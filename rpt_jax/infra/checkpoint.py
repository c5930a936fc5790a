"""Everything a run needs to go on, committed together or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rpt_jax.config import Experiment, leaves
from rpt_jax.errors import UserError

CONFIG = "config.json"


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Make `workdir` this experiment's: write its config there, or check that the one there is the same.

    Raises: UserError, naming the fields that differ, or the directory where it cannot be written.
    """
    path, mine = workdir / CONFIG, dict(leaves(experiment))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(mine, indent=1) + "\n")
            return
        theirs = {**json.loads(path.read_text())}
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}.") from None
    except (TypeError, ValueError):
        raise UserError(f"{path} is not a config; choose another --workdir.") from None
    differing = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    if differing:
        changes = "; ".join(f"{n}: {theirs.get(n)!r} there, {mine.get(n)!r} now" for n in sorted(differing)[:5])
        raise UserError(f"--workdir={workdir} was made with another config ({changes}). Choose another --workdir.")


class Checkpointer:
    """Saves and restores (state, run) under `workdir/checkpoints`.

    `state` is a tree of arrays; `run` is what JSON can hold (data-iterator state, counters, fingerprints).
    """

    def __init__(self, workdir: Path, keep: int):
        self._directory = (workdir / "checkpoints").resolve()
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
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the checkpoint {self._directory / str(step)} is damaged or not this run's ({reason[:200]}). Move that "
                "directory away to go on from the one before it; nothing was changed."
            ) from None
        return step, restored.state, restored.run

    def close(self) -> None:
        """Wait for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree: Any) -> Any:
    """Return shapes, dtypes and shardings of `tree`, to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
