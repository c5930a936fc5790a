"""The directory of a study: its config, which all processes must share, and its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.config.study import StudyConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.atomic_write import atomic_write
from rpt_jax.infra.disk import check_writable
from rpt_jax.infra.run_format import check_format, format_stamp
from rpt_jax.study.collection import collect
from rpt_jax.study.file_lock import locked
from rpt_jax.study.outcome import RESULTS, StudyOutcomes, write_outcomes
from rpt_jax.study.plan import UnitPlan

CONFIG = "study_config.json"
_LOCK = "study.lock"


def claim(directory: Path, values: Mapping[str, Any]) -> None:
    """Write the config of a study to its directory, or compare it with the one that is there.

    Args:
      directory: created if it does not exist.
      values: what determines the results, see `plan.config_values`.

    Raises: UserError, naming the first field that differs.
    """
    check_writable(directory, "--workdir")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CONFIG
    with locked(directory / _LOCK):
        if not path.exists():
            if others := [file.name for file in directory.iterdir() if file.name != _LOCK]:
                raise UserError(
                    f"--workdir={directory} is not the directory of a study, but has {sorted(others)[0]}: choose another.",
                    field="--workdir",
                )
            atomic_write(path, json.dumps({**format_stamp(), "config": values}, indent=1) + "\n")
            return
    try:
        content = {**json.loads(path.read_bytes())}
        theirs = {**content["config"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged; choose another --workdir.", field="--workdir") from None
    check_format(content, path)
    differing = [name for name in {**values, **theirs} if values.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"--workdir={directory} belongs to a study with another config ({name}: {theirs.get(name)!r} there, "
            f"{values.get(name)!r} now). Choose another --workdir.",
            field=name,
        )


def write_results(
    study: StudyConfig, name: str, units: Sequence[UnitPlan], directory: Path, command: str
) -> StudyOutcomes:
    """Write what all units have measured so far to `results.json`, and return it.

    Args:
      study: the config.
      name: of the study.
      units: all of its units, also those of other parts.
      directory: of the study.
      command: that repeats it.

    Raises: UserError, if a result is damaged.
    """
    with locked(directory / _LOCK):
        outcomes = collect(study, name, units, [command])
        write_outcomes(outcomes, directory / RESULTS)
    return outcomes
