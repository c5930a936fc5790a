"""What a part sends to the process that started it: lines of JSON, {"machine": …}, {"figure": …} or {"note": …}."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import traceback
from collections.abc import Iterator
from typing import Any

from rpt_jax.bench.measure import round_to_4_digits
from rpt_jax.errors import UserError

_ERROR_CHARACTERS = 500  # Of a message of XLA, which may list every buffer.


class Report:
    """Sends messages to an open file descriptor."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def machine(self, conditions: dict[str, Any]) -> None:
        """Send what figures depend on."""
        self._send({"machine": conditions})

    def figure(self, **values: Any) -> None:
        """Send one measurement: names of what was measured, and numbers, None for those that are not finite."""
        self._send({"figure": {name: _rounded(value) for name, value in values.items()}})

    def note(self, text: str) -> None:
        """Send a sentence that belongs to the figures."""
        self._send({"note": text})

    @contextlib.contextmanager
    def measurement(self, name: str) -> Iterator[None]:
        """Turn an exception inside the block into a note, so that the measurements after it run."""
        try:
            yield
        except UserError as error:
            self.note(f"{name}: {error}")
        except Exception as error:  # noqa: BLE001 - such as too little memory, or a kernel that the compiler refuses.
            traceback.print_exc()
            self.note(f"{name}: {type(error).__name__}: {str(error)[:_ERROR_CHARACTERS]}")
        gc.collect()  # Arrays that only a cycle holds would be in the way of the next measurement.

    def _send(self, message: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(message).encode() + b"\n")


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round_to_4_digits(value) if math.isfinite(value) else None
