"""Build and override frozen config dataclasses, with hints for misspelled names."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from rpt_jax.config.renamed import RENAMED, USUAL_NAMES
from rpt_jax.errors import UserError

_LARGEST_EXACT = 10**12  # Integers up to this are accepted for a float field; a float represents them exactly.


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of a nested dataclass, depth first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def build(schema: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return an instance of the dataclass `schema`, with `values` in place of its defaults.

    Args:
      schema: a dataclass whose fields all have defaults; fields may be dataclasses themselves.
      values: nested values by field name.
      prefix: put in front of field names in messages, such as "data.source_options.".

    Raises: UserError, for an unknown name, with the nearest known one, and for a value of another type.
    """
    defaults = {f"{prefix}{name}": value for name, value in leaves(schema())}
    return _build(schema, values, prefix, defaults)


def _build(schema: type, values: Mapping[str, Any], prefix: str, defaults: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(schema)
    arguments = {}
    for name, value in values.items():
        full_name = f"{prefix}{name}"
        if name not in types:
            raise unknown_field(full_name, defaults)
        expected = types[name]
        if not dataclasses.is_dataclass(expected):
            arguments[name] = checked_type(full_name, value, expected)
        elif isinstance(value, Mapping | ml_collections.ConfigDict):
            arguments[name] = _build(typing.cast(type, expected), dict(value), f"{full_name}.", defaults)
        else:
            raise UserError(f"{full_name}={value!r} is a section: give its fields, not a value.", field=full_name)
    return schema(**arguments)


def override(schema: type, fields: dict[str, Any], assignment: str, prefix: str = "") -> None:
    """Apply one command-line assignment, `section.field=value`, to nested `fields` in place.

    Args:
      schema: the dataclass that `fields` are values of.
      fields: nested values by field name, changed in place.
      assignment: the name without `prefix`, "=" and the value as text.
      prefix: see `build`.

    Raises: UserError, for an unknown name, a section in place of a field, or text that is not a value of the field's type.
    """
    name, equals, text = assignment.partition("=")
    full_name = f"{prefix}{name}"
    defaults = {f"{prefix}{leaf}": value for leaf, value in leaves(schema())}
    if full_name not in defaults:
        members = [leaf for leaf in defaults if leaf.startswith(f"{full_name}.")]
        if members:
            example = f"--config.{members[0]}={defaults[members[0]]}"
            raise UserError(f"{full_name} is a section: set its fields one by one, e.g. {example}.", field=full_name)
        raise unknown_field(full_name, defaults)
    if defaults[full_name] is None:
        raise UserError(
            f"{full_name} holds options: set them one by one, --config.{full_name}.NAME=VALUE.", field=full_name
        )
    if not equals or (not text and not isinstance(defaults[full_name], str)):
        example = f"--config.{full_name}={defaults[full_name]}"
        raise UserError(f"--config.{full_name} has no value: write, e.g., {example}.", field=full_name)
    *sections, leaf = name.split(".")
    for section in sections:
        fields = fields[section]
    fields[leaf] = _parse(full_name, text, type(defaults[full_name]))


def _parse(name: str, text: str, expected: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if expected is bool else expected(text)
    except (KeyError, ValueError):
        kinds = {bool: "true or false (bool)", int: "an integer (int)", float: "a number (float)"}
        raise UserError(f"{name}={text} must be {kinds[expected]}.", field=name) from None


def unknown_field(name: str, known: Mapping[str, Any]) -> UserError:
    """Return the error for a field that does not exist, with its new name or the nearest of the `known` dotted names."""
    if name in RENAMED:
        return UserError(f"{name} was renamed to {RENAMED[name]}.", field=name)
    return UserError(f"unknown config field '{name}'.{_nearest_fields(name, known)}", field=name)


def _nearest_fields(name: str, known: Mapping[str, Any]) -> str:
    """Return a hint: the known names nearest to `name` or, if none is near, the names of its section."""
    sections = sorted({field.partition(".")[0] for field in known if "." in field})

    def similarity(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name.lower(), candidate).ratio()
        # Compare the last components, because a section in common makes any two names similar, and to find a field that was
        # given with the wrong section.
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2].lower(), candidate.rpartition(".")[2]).ratio()
        if last >= 0.6 and name.rpartition(".")[0] == candidate.rpartition(".")[0]:
            # A similar field of the same section ranks above an equal one of another section.
            return 1.0 + last, whole
        return max(last, whole if whole >= 0.8 else 0.0), whole

    candidates = [*known, *([] if "." in name else sections)]
    scores = {candidate: similarity(candidate) for candidate in candidates}
    best = max(scores.values(), default=(0.0, 0.0))
    usual = USUAL_NAMES.get(name.rpartition(".")[2].lower())
    if usual and best[0] <= 1.0:
        return f" Did you mean '{usual}'?"
    if best[0] >= 0.6:
        # Name all that are equally near: 'optimizer.beta' is one typo away from two fields.
        nearest = [repr(candidate) for candidate in candidates if scores[candidate] == best]
        return f" Did you mean {' or '.join(nearest)}?"
    section = name.rpartition(".")[0]
    members = [field for field in known if section and field.startswith(f"{section}.")]
    top_level = [*(field for field in known if "." not in field), *(f"{section}.*" for section in sections)]
    return f" The fields are: {', '.join(members or top_level)}."


def checked_type(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as the type that is expected of the field `name`. Raises: UserError, if it has another one."""
    if expected is Any:
        return value
    # bool is a subclass of int, and a float may be written without a point.
    if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_EXACT:
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r} is {type(value).__name__}, expected {expected.__name__}.", field=name)
    return value
