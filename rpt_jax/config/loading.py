"""From a config file and a command line to a validated experiment."""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rpt_jax.config.dataclass_io import build, override
from rpt_jax.config.schema import Experiment
from rpt_jax.config.validation import check_experiment
from rpt_jax.errors import UserError, nearest

_OVERRIDE = "--config."


def split_overrides(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a command line into config overrides (`section.field=value`, without `--config.`) and all other arguments."""
    overrides, rest = [], []
    for argument in argv:
        if argument.startswith(_OVERRIDE):
            overrides.append(argument.removeprefix(_OVERRIDE))
        else:
            rest.append(argument)
    return overrides, rest


def default_config() -> ml_collections.ConfigDict:
    """Return every field with its default, for a file in configs/ to change; a misspelt assignment raises there."""
    return ml_collections.ConfigDict(dataclasses.asdict(Experiment())).lock()


def load_config_file(path: str) -> Mapping[str, Any]:
    """Return what `get_config()` of the Python file `path` returns. Raises: UserError, naming file and line."""
    if not Path(path).is_file():
        raise UserError(f"--config={path} is no file.{nearest(path, map(str, Path('configs').glob('*.py')))}")
    try:
        module = runpy.run_path(path)
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:  # noqa: BLE001 - whatever a user's own file does wrong.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 1
        reason = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())
        raise UserError(f"{path}:{line} raises {type(error).__name__}: {reason}") from None
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path} must define get_config(), which returns default_config() with fields changed.")
    return config


def from_config_dict(config: Mapping[str, Any], overrides: Iterable[str] = ()) -> Experiment:
    """Validate a config, with `overrides` as a command line gives them (`section.field=value`), against the schema.

    Raises: UserError, naming the field, its value and what was expected, for unknown names (with the nearest known one),
    wrong types and impossible values.
    """
    fields = dataclasses.asdict(build(Experiment, dict(config)))
    for assignment in overrides:
        override(Experiment, fields, assignment)
    experiment = build(Experiment, fields)
    check_experiment(experiment)
    return experiment
