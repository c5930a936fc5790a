"""From a config file and a command line to a validated experiment."""

from __future__ import annotations

import dataclasses
import runpy
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rpt_jax.config.dataclass_io import build, override
from rpt_jax.config.schema import Experiment
from rpt_jax.config.validation import check_experiment
from rpt_jax.errors import UserError, nearest


def default_config() -> Any:
    """Return a locked `ConfigDict` of all fields with their defaults, for a config file to change.

    Assignment to a field that does not exist raises AttributeError. The static type is Any because a type checker does not know
    the fields of a `ConfigDict`.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(Experiment())).lock()


def packaged_configs() -> Path:
    """Return the directory of the configs that come with rpt_jax: inside an installed package, or next to it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def resolve_config_path(path: str) -> str:
    """Return `path`, or the packaged file that it names where it does not exist and begins with `configs/`."""
    relative = Path(path)
    if relative.exists() or relative.parts[:1] != ("configs",):
        return path
    packaged = packaged_configs().joinpath(*relative.parts[1:])
    return str(packaged) if packaged.exists() else path


def load_config_file(path: str) -> Mapping[str, Any]:
    """Return the result of `get_config()` in a Python file.

    The file can import modules from its own directory, as a script can.

    Args:
      path: a file; `configs/NAME.py` is a packaged config where the current directory has no such file.
    Raises: UserError, with the file and the line.
    """
    found = resolve_config_path(path)
    if not Path(found).is_file():
        known = [str(file) for file in Path("configs").glob("*.py")]
        known += [f"configs/{file.name}" for file in packaged_configs().glob("*.py")]
        raise UserError(f"--config={path} is no file.{nearest(path, known)}", field="--config")
    path = found
    directory = str(Path(path).parent.resolve())
    if directory not in sys.path:
        sys.path.append(directory)
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
