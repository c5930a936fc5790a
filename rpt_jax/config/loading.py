"""From a config file and a command line to a validated experiment."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from rpt_jax.config.config_file_values import ConfigFileValues
from rpt_jax.config.dataclass_io import build, leaves, override, unknown_field
from rpt_jax.config.schema import Experiment
from rpt_jax.config.study import StudyConfig, check_study
from rpt_jax.config.task_fields import check_overrides_are_read
from rpt_jax.config.user_paths import expand_home, with_expanded_paths
from rpt_jax.config.validation import check_experiment
from rpt_jax.errors import UserError
from rpt_jax.registry import CORPUS_SOURCES, QUESTION_SOURCES, TARGETS, TRACE_WRITERS, Choice, Registry

logger = logging.getLogger(__name__)

# Fields that hold the options of a choice, and the registry of that choice.
_OPTIONS = {
    "data.source_options": CORPUS_SOURCES,
    "data.target_options": TARGETS,
    "questions.source_options": QUESTION_SOURCES,
    "pretrain.trace_options": TRACE_WRITERS,
}

_OVERRIDE = "--config."


def split_overrides(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a command line into config overrides (`section.field=value`, without `--config.`) and all other arguments."""
    overrides = []
    rest = []
    for argument in argv:
        if argument.startswith(_OVERRIDE):
            overrides.append(argument.removeprefix(_OVERRIDE))
        else:
            rest.append(argument)
    return overrides, rest


def default_config() -> Any:
    """Return a locked `ConfigDict` of all fields with their defaults, for a config file to change.

    Assigning to a field that does not exist raises AttributeError. The static type is Any because a type checker does not know
    the fields of a `ConfigDict`.
    """
    values = dataclasses.asdict(Experiment())
    for name in _OPTIONS:
        section, _, field = name.partition(".")
        values[section][field] = {}
    config: Any = ConfigFileValues(values).lock()
    for name in _OPTIONS:
        section, _, field = name.partition(".")
        # The names of the options depend on the choice, so they are checked after the file has been read.
        config[section][field].unlock()
    return config


def packaged_configs() -> Path:
    """Return the directory of the configs that come with rpt_jax: inside an installed package, or next to it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def resolve_config_path(path: str) -> str:
    """Return `path`, or the packaged file of this name if `path` begins with `configs/` and does not exist."""
    relative = Path(path)
    if relative.exists() or relative.parts[:1] != ("configs",):
        return path
    packaged = packaged_configs().joinpath(*relative.parts[1:])
    return str(packaged) if packaged.exists() else path


def load_config_file(path: str) -> Any:
    """Return the `ConfigDict` that `get_config()` of a Python file returns; another config file may change and return it.

    Raises: UserError, as `read_config_file` does.
    """
    config = read_config_file(path)
    if isinstance(config, StudyConfig):
        raise UserError(
            f"--config={path} is the config of a study: run it with python -m rpt_jax.study --config={path}",
            field="--config",
        )
    if not _is_of_a_run(config):
        raise UserError(
            f"{path} must define get_config(), which returns default_config() with fields changed.", field="--config"
        )
    return config if isinstance(config, ml_collections.ConfigDict) else ml_collections.ConfigDict(config)


def load_study(path: str) -> StudyConfig:
    """Return the study that `get_config()` of a Python file returns. Raises: UserError, naming the field at fault."""
    study = read_config_file(path)
    if _is_of_a_run(study):
        raise UserError(
            f"--config={path} is the config of a run, not of a study: run it with python -m rpt_jax.main --config={path}",
            field="--config",
        )
    if not isinstance(study, StudyConfig):
        raise UserError(f"{path} must define get_config(), which returns a StudyConfig.", field="--config")
    check_study(study)
    return study


def _is_of_a_run(config: Any) -> bool:
    """Return whether what a config file returns are the fields of a run."""
    return isinstance(config, Mapping | ml_collections.ConfigDict)


def read_config_file(path: str) -> Any:
    """Return what `get_config()` of a Python file returns; None if the file has no such function.

    Args:
      path: a file; `configs/NAME.py` is a packaged config if the current directory has no such file.

    Raises: UserError, if there is no such file, and with file and line for any error in it.
    """
    path = resolve_config_path(expand_home(path))
    if not Path(path).is_file():
        raise _no_config_file(path)
    if Path(path).suffix != ".py":
        raise UserError(
            f"--config={path} is not a Python file: a config is a .py file with a function get_config().",
            field="--config",
        )
    try:
        module = _import_file(Path(path))
        return module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything.
        raise _error_in_file(path, error) from None


def from_config_dict(config: Mapping[str, Any], overrides: Iterable[str] = (), suite: str = "") -> Experiment:
    """Validate a config against the schema.

    Args:
      config: nested values by field name; fields that are missing have their defaults.
      overrides: assignments of a command line, `section.field=value`, which are applied last. One that changes a choice, such as
        `data.source=path`, drops the options that the file gives to its own choice.
      suite: of the command `evaluate`, which does not train; "" for a run of the config's task.

    Raises: UserError, naming the field, its value and what was expected, for unknown names (with the nearest known one),
      wrong types, impossible values, and overrides that have no effect on the run.
    """
    overrides = list(overrides)
    try:
        return _from_values(config, overrides, suite)
    except UserError as error:
        line = config.line_of(error.field) if isinstance(config, ConfigFileValues) else ""
        # The file is not to blame for what the command line changed.
        is_overridden = any(assignment.partition("=")[0] in str(error) for assignment in overrides)
        if not line or is_overridden:
            raise
        raise UserError(f"{line}: {error}", field=error.field) from None


def _from_values(config: Mapping[str, Any], overrides: list[str], suite: str) -> Experiment:
    """Do what `from_config_dict` says; messages do not name the line of a config file."""
    fields = dataclasses.asdict(build(Experiment, dict(config)))
    option_prefixes = tuple(f"{name}." for name in _OPTIONS)
    choices_of_file = {name: _chosen(fields, registry) for name, registry in _OPTIONS.items()}
    for assignment in overrides:
        if not assignment.startswith(option_prefixes):
            override(Experiment, fields, assignment)
    # The options are checked last, because the overrides above may have changed the choice that they belong to.
    for name, registry in _OPTIONS.items():
        section, _, field = name.partition(".")
        chosen = registry[_chosen(fields, registry)]
        if chosen.name != choices_of_file[name] and fields[section][field]:
            logger.info("%s=%r: the options of %r do not apply.", registry.field, chosen.name, choices_of_file[name])
            fields[section][field] = None
        assignments = [a.removeprefix(f"{name}.") for a in overrides if a.startswith(f"{name}.")]
        fields[section][field] = _build_options(name, registry, chosen, fields[section][field], assignments)
    experiment = with_expanded_paths(build(Experiment, fields))
    check_experiment(experiment, trains=not suite)
    check_overrides_are_read(experiment, overrides, suite)
    return experiment


def _chosen(fields: Mapping[str, Any], registry: Registry) -> str:
    """Return the name that the registry's field has in nested `fields`."""
    section, _, field = registry.field.partition(".")
    return fields[section][field]


def _build_options(name: str, registry: Registry, chosen: Choice, given: Any, assignments: list[str]) -> Any:
    """Return the options of a choice as an instance of its dataclass.

    Args:
      name: of the field that holds the options, such as "data.source_options".
      registry: of the choice.
      chosen: the choice.
      given: the options in the config: values by name, or None.
      assignments: command-line assignments, `option=value`.

    Returns: None if the choice has no options.

    Raises: UserError, for an unknown option or a value of another type.
    """
    schema = chosen.requirements.options
    if isinstance(given, Mapping | ml_collections.ConfigDict):
        values = dict(given)
    elif given is None:
        values = {}
    else:
        raise UserError(f"{name}={given!r} is a section: give its fields, not a value.", field=name)
    if schema is None:
        unknown = [*values, *(assignment.partition("=")[0] for assignment in assignments)]
        if unknown:
            raise UserError(f"{name}.{unknown[0]}: {registry.field}='{chosen.name}' has no options.", field=name)
        return None
    fields = dataclasses.asdict(build(schema, values, f"{name}."))
    for assignment in assignments:
        override(schema, fields, assignment, f"{name}.")
    return build(schema, fields, f"{name}.")


def _import_file(path: Path) -> ModuleType:
    """Import a config file as a module, so that worker processes find what it registers.

    Its folder joins `sys.path`: a config file may import another one, or modules that lie next to it.
    """
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader, "there is a loader for .py"
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get(path.stem)
    if known is None or getattr(known, "__file__", None) == str(path.resolve()):
        sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _no_config_file(path: str) -> UserError:
    """Return the error for a `path` that is not a file, with the nearest config that exists or, if none is near, all of them."""
    known = {str(file) for file in Path("configs").glob("*.py")}
    known |= {f"configs/{file.name}" for file in packaged_configs().glob("*.py")}
    names = {Path(file).stem: file for file in known}
    # Compare the names alone: the same folder makes any two paths similar.
    [near] = difflib.get_close_matches(Path(path).stem, names, n=1, cutoff=0.6) or [""]
    hint = f"Did you mean '{names[near]}'?" if near else f"There are: {', '.join(sorted(known))}."
    problem = (
        f"--config={path} is a directory."
        if path and Path(path).is_dir()
        else f"config file not found: {path or '(none)'}."
    )
    return UserError(f"{problem} {hint}", field="--config")


def _error_in_file(path: str, error: Exception) -> UserError:
    """Return the `UserError` for an exception in a config file, with the line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError):
        line = error.lineno or 1
    else:
        line = frames[-1].lineno if frames else 1
    if isinstance(error, UserError):
        return UserError(f"{path}:{line}: {error}", field=error.field)
    # ml_collections raises AttributeError(KeyError(...)) where a section is read that does not exist.
    if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):
        [name] = re.findall(r"\w+", str(error.args[0]))[:1]
        return UserError(f"{path}:{line}: {unknown_field(name, dict(leaves(Experiment())))}", field=name)
    reason = " ".join(str(error.args[0] if error.args else error).split())
    return UserError(f"{path}:{line} raises {type(error).__name__}: {reason}", field="--config")
