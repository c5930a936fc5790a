"""Frozen dataclasses filled from nested values and from a command line's text: what every config field goes through."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from rpt_jax.errors import UserError

_MANY = 10**12  # Whole numbers up to here are floats, too.


def leaves(experiment: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (dotted name, value) of a config, depth first."""
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def build(schema: type, values: Mapping[str, Any]) -> Any:
    """Return an instance of the dataclass `schema` with `values` in place of its defaults, sections nested.

    Raises: UserError, for names that it does not have, with the nearest, and for wrong types.
    """
    return _build(schema, values, "", dict(leaves(schema())))


def _build(schema: type, values: Mapping[str, Any], prefix: str, defaults: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(schema)
    for name in values:
        if name not in types:
            raise UserError(f"unknown config field '{prefix}{name}'.{_nearest_field(f'{prefix}{name}', defaults)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise UserError(f"{prefix}{name}={value!r} must hold fields of {types[name].__name__}, not a value.")
            built[name] = _build(types[name], dict(value), f"{prefix}{name}.", defaults)
        else:
            built[name] = _typed(f"{prefix}{name}", value, types[name])
    return schema(**built)


def override(schema: type, fields: dict[str, Any], assignment: str) -> None:
    """Set one of the nested `fields` of `schema` as `assignment`, `section.field=value`, says. Raises: UserError."""
    name, equals, text = assignment.partition("=")
    defaults = dict(leaves(schema()))
    if name not in defaults:
        within = [field for field in defaults if field.startswith(f"{name}.")]
        if within:
            example = f"--config.{within[0]}={defaults[within[0]]}"
            raise UserError(f"{name} is a section: set its fields one by one, for example {example}.")
        raise UserError(f"unknown config field '{name}'.{_nearest_field(name, defaults)}")
    if not equals:
        raise UserError(f"--config.{name} has no value: write --config.{name}={defaults[name]}, for example.")
    *sections, leaf = name.split(".")
    for section in sections:
        fields = fields[section]
    fields[leaf] = _parse(name, text, type(defaults[name]))


def _parse(name: str, text: str, expected: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if expected is bool else expected(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false (bool)", int: "a whole number (int)", float: "a number (float)"}[expected]
        raise UserError(f"{name}={text} must be {kind}.") from None


def _nearest_field(name: str, fields: Mapping[str, Any]) -> str:
    """A hint on an unknown dotted name: the nearest known ones, or else the names that there are."""
    sections = sorted({field.partition(".")[0] for field in fields if "." in field})

    def closeness(known: str) -> tuple[float, float]:
        pairs = (name, known), (name.rpartition(".")[2], known.rpartition(".")[2])
        whole, last = (difflib.SequenceMatcher(None, a.lower(), b).ratio() for a, b in pairs)
        if whole >= 0.8 and name.rpartition(".")[0] == known.rpartition(".")[0]:
            return (
                1.0 + whole,
                whole,
            )  # A similar field of the same section comes before an equal one of another section.
        return max(whole, last), whole  # The right field of a wrong section is close, too.

    near = {known: closeness(known) for known in [*fields, *(() if "." in name else sections)]}
    best = max(near.values())
    if best[0] >= 0.6:
        # All that are equally near: 'optimizer.beta' is one slip from two fields.
        return f" Did you mean {' or '.join(f'{known!r}' for known in near if near[known] == best)}?"
    within = [field for field in fields if field.startswith(f"{name.partition('.')[0]}.")]
    top = [field for field in fields if "." not in field]
    return f" There are: {', '.join(within or [*top, *(f'{section}.*' for section in sections)])}."


def _typed(name: str, value: Any, expected: type) -> Any:
    # bool is an int in Python; a number written without a point is a fine float.
    if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MANY:
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r} is {type(value).__name__}, expected {expected.__name__}.")
    return value
