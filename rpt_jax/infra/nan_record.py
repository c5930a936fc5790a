"""A record of the step in which a number became NaN or infinite, for `--replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write

RECORD = "not_finite.json"


def write_record(
    workdir: Path, step: int, error: FloatingPointError, seed: int, **ids_P: jax.Array | np.ndarray
) -> None:
    """Write the step that failed, the error, the seed and integer arrays that identify the step's batch."""
    record: dict[str, Any] = {"step": step, "error": str(error), "seed": seed}
    record |= {name: ids.tolist() for name, ids in to_host(ids_P).items()}
    if is_leader():
        atomic_write(workdir / RECORD, json.dumps(record, indent=1) + "\n")


def recorded_step(workdir: Path) -> int:
    """Return the step that failed. Raises: UserError, if there is no record or it is damaged."""
    path = workdir / RECORD
    try:
        return int(json.loads(path.read_bytes())["step"])
    except FileNotFoundError:
        raise UserError(f"--replay: {path} does not exist, so there is no step to replay.", field="--replay") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"--replay: {path} is damaged; run without --replay.", field="--replay") from None
