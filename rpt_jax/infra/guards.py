"""What a step must not do unseen: move arrays between host and device, or compile a program once more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import jax

# The one place where JAX tells for which shapes a program is compiled.
_LOGGER = logging.getLogger("jax._src.interpreters.pxla")
_SHOWN = 3  # Arguments of a program whose change is spelled out.


class _Compilations(logging.Filter):
    """Reads what JAX logs of each compilation, and lets nothing below a warning through."""

    def __init__(self):
        super().__init__()
        self._shapes: dict[str, list[str]] = {}
        self._again: list[str] = []
        self._settled = False

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Compiling %s with global shapes"):
            name, shapes = str(record.args[0]), [str(shape) for shape in record.args[1]]
            earlier = self._shapes.get(name)
            self._shapes[name] = shapes
            if earlier is not None and self._settled:
                self._again.append(f"{name} was compiled again, {_difference(earlier, shapes)}")
        return record.levelno >= logging.WARNING

    def take(self) -> list[str]:
        """Sentences on what was compiled again since the last call; none in the first one, which ends the first step."""
        again, self._again, self._settled = self._again, [], True
        return again


def _difference(earlier: list[str], now: list[str]) -> str:
    if len(earlier) != len(now):
        return f"for {len(now)} arrays instead of {len(earlier)}"
    changed = [f"argument {i}: {a} -> {b}" for i, (a, b) in enumerate(zip(earlier, now, strict=True)) if a != b]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (
        f"for other shapes ({'; '.join(changed[:_SHOWN])}{more})"
        if changed
        else "for the same shapes, placed otherwise or with other options"
    )


@contextlib.contextmanager
def guarded_loop(replay: bool = False) -> Iterator[Callable[[], list[str]]]:
    """Inside, this thread moves arrays only where the code says `jax.device_put` or `jax.device_get`; else JAX raises.

    Yields what a step ends with: a function that returns sentences on the programs which this step compiled again, for shapes
    or placements that they had not met. None in the first step. Each costs seconds to minutes.

    Args:
      replay: a step that is run again under checks of JAX, which look for the operation at fault with transfers of their own.
    """
    compilations, verbosity = _Compilations(), _LOGGER.level
    level = "allow" if replay else "disallow"
    _LOGGER.addFilter(compilations)
    _LOGGER.setLevel(logging.DEBUG)
    try:
        # Between devices arrays may move: JAX puts scalars onto all of a mesh, unasked.
        with jax.transfer_guard_host_to_device(level), jax.transfer_guard_device_to_host(level):
            yield compilations.take
    finally:
        _LOGGER.setLevel(verbosity)
        _LOGGER.removeFilter(compilations)
