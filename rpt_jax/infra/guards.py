"""Guards of a training loop: implicit transfers raise, and programs that are compiled again are reported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import jax

# JAX has no public API that says which shapes a program is compiled for, but it logs them at level DEBUG. This logger and this
# text are private to JAX (checked with jax 0.10.2); tests/infra/test_guards.py fails if a release changes them.
COMPILATION_LOGGER = "jax._src.interpreters.pxla"
COMPILATION_MESSAGE = "Compiling %s with global shapes"

_SHOWN_ARGUMENTS = 3  # A message spells out the change of this many arguments.


class _CompilationFilter(logging.Filter):
    """Reads JAX's log record of each compilation, and hides records below WARNING."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes_by_program: dict[str, list[str]] = {}
        self._recompiled: list[str] = []
        self._after_first_step = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Note the program and the shapes of a compilation; return whether to show the record."""
        if str(record.msg).startswith(COMPILATION_MESSAGE) and isinstance(record.args, tuple):
            program = str(record.args[0])
            shapes = [str(shape) for shape in tuple(record.args[1])]  # pyright: ignore[reportArgumentType]
            earlier = self._shapes_by_program.get(program)
            self._shapes_by_program[program] = shapes
            if earlier is not None and self._after_first_step:
                self._recompiled.append(f"{program} was compiled again, {_describe_change(earlier, shapes)}")
        return record.levelno >= logging.WARNING

    def take(self) -> list[str]:
        """Return a sentence for each program that was compiled again since the last call.

        The first call ends the first step, which may compile a program for several shapes, and returns nothing.
        """
        recompiled = self._recompiled
        self._recompiled = []
        self._after_first_step = True
        return recompiled


def _describe_change(earlier: list[str], now: list[str]) -> str:
    if len(earlier) != len(now):
        return f"for {len(now)} arrays instead of {len(earlier)}"
    changed = [f"argument {i}: {a} -> {b}" for i, (a, b) in enumerate(zip(earlier, now, strict=True)) if a != b]
    if not changed:
        return "for the same shapes, but with other shardings or options"
    more = f" and {len(changed) - _SHOWN_ARGUMENTS} more" if len(changed) > _SHOWN_ARGUMENTS else ""
    return f"for other shapes ({'; '.join(changed[:_SHOWN_ARGUMENTS])}{more})"


@contextlib.contextmanager
def guarded_loop(replay: bool = False) -> Iterator[Callable[[], list[str]]]:
    """Guard the loop inside the block against implicit transfers and repeated compilation.

    On this thread, arrays move between host and devices only by `jax.device_put` and `jax.device_get`; other transfers raise.

    Args:
      replay: allow transfers. JAX's NaN checks, which are active in a replay, need them.

    Yields:
      A function to call at the end of each step. It returns a sentence for each program that the step compiled again, for a new
      shape or sharding; each of them costs seconds to minutes.
    """
    compilations = _CompilationFilter()
    logger = logging.getLogger(COMPILATION_LOGGER)
    earlier_level = logger.level
    guard = "allow" if replay else "disallow"
    logger.addFilter(compilations)
    logger.setLevel(logging.DEBUG)
    try:
        # Transfers between devices stay allowed: JAX replicates scalars over a mesh by itself.
        with jax.transfer_guard_host_to_device(guard), jax.transfer_guard_device_to_host(guard):
            yield compilations.take
    finally:
        logger.setLevel(earlier_level)
        logger.removeFilter(compilations)
