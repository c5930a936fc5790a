"""Digests of plain values. Importing this module does not import JAX."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(*values: Any) -> str:
    """Return the SHA-256 of values that JSON can represent, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
