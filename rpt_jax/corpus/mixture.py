"""The parts of a mixture: `data.path` and the fields that may be given for each part."""

from __future__ import annotations

import dataclasses
import os
import re

from rpt_jax.config import DataConfig
from rpt_jax.config.schema import TEMPLATE_SEPARATOR
from rpt_jax.errors import UserError

_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?)=(.+)")
# Fields that hold one value for all parts or one for each part, and what separates the values.
_FIELDS_OF_PARTS = {"text_field": ",", "document_template": TEMPLATE_SEPARATOR, "group_by": ","}


def parse_mixture(path: str) -> list[tuple[float, str]]:
    """Parse `data.path`: a path or glob, or several separated by commas, all with or all without a weight (`weight=path`).

    Returns: (weight, path) of each part; the weight is 0 if none is given. Raises: UserError.
    """
    if not path.strip():
        raise UserError(
            "data.path is empty: data.source='path' needs a file of text or records, a folder of them, or a glob.",
            field="data.path",
        )
    if os.path.exists(path):  # The name of a file may contain "," and "=".
        return [(0.0, path)]
    parts = split_paths(path, "data.path")
    matches = [_WEIGHTED.fullmatch(part) for part in parts]
    if not any(matches):
        return [(0.0, part) for part in parts]
    weighted = [(float(match[1]), match[2]) for match in matches if match]
    if len(weighted) < len(parts) or not all(weight for weight, _ in weighted):
        raise UserError(
            f"data.path='{path}': give every part of a mixture a weight above 0 (0.7=a,0.3=b), or none.",
            field="data.path",
        )
    return weighted


def split_paths(paths: str, field: str) -> list[str]:
    """Return the paths in a config field: one, or several separated by commas.

    Args:
      paths: the value of the field; an existing file's name may contain commas.
      field: its name, for errors.

    Raises: UserError, for an empty part, which would name the working directory.
    """
    if os.path.exists(paths):  # False for a list that is longer than a name may be; `Path.exists` raises.
        return [paths]
    parts = [part.strip() for part in paths.split(",")]
    if "" in parts:
        raise UserError(f"{field}='{paths}' has an empty part: remove a comma.", field=field)
    return parts


def configs_of_parts(config: DataConfig) -> list[DataConfig]:
    """Return section `data` for each part of the mixture, with the part's own values of the fields that may differ.

    Raises: UserError, if a field has another number of values than one or one for each part.
    """
    parts = len(parse_mixture(config.path))
    values: dict[str, list[str]] = {}
    for name, separator in _FIELDS_OF_PARTS.items():
        value = getattr(config, name)
        split = (
            [item.strip() if separator == "," else item for item in value.split(separator)] if parts > 1 else [value]
        )
        if len(split) not in (1, parts):
            raise UserError(
                f"data.{name}={value!r} has {len(split)} values separated by '{separator}', but data.path has {parts} parts: "
                "give one value for all parts, or one for each.",
                field=f"data.{name}",
            )
        values[name] = split * (parts // len(split))
    return [
        dataclasses.replace(config, **{name: split[part] for name, split in values.items()}) for part in range(parts)
    ]


def source_name(config: DataConfig) -> str:
    """Return the corpus' name in messages, such as "data.path='notes.jsonl'"."""
    return f"data.path='{config.path}'" if config.source == "path" else f"data.source='{config.source}'"
