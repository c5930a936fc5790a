"""JSON objects in files of a policy. Importing this module does not import JAX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError


def parse_json_object(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
      path: of the file, for messages.
      data: its content; a byte order mark in front of it is ignored.

    Raises: UserError if the content is something else.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download or export it again.", field=str(path)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object, not a {type(content).__name__}.", field=str(path))
    return content
