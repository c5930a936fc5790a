"""The parts of a mixture: `data.path` and the fields that may be given for each part."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

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
    if Path(path).exists():  # The name of a file may contain "," and "=".
        return [(0.0, path)]
    parts = []
    for part in path.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        parts.append((float(match[1]), match[2]) if match else (0.0, part.strip()))
    weighted = sum(weight > 0 for weight, _ in parts)
    if weighted not in (0, len(parts)):
        raise UserError(
            f"data.path='{path}': give every part of a mixture a weight above 0 (0.7=a,0.3=b), or none.",
            field="data.path",
        )
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
