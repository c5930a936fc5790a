"""Guards of a training loop: implicit transfers raise, and programs that are compiled again are reported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend.core import primitives

# JAX has no public API that says which shapes a program is compiled for, but it logs them at level DEBUG. This logger and this
# text are private to JAX (checked with jax 0.10.2); tests/infra/test_guards.py fails if a release changes them.
COMPILATION_LOGGER = "jax._src.interpreters.pxla"
COMPILATION_MESSAGE = "Compiling %s with global shapes"

_SHOWN_ARGUMENTS = 3  # A message spells out the change of this many arguments.

# Names of JAX's own operations. One that runs outside of a program, as in the slices of a checkpoint, is compiled by itself,
# within milliseconds, for each of its shapes.
_OPERATIONS = {f"jit({getattr(primitives, name).name})" for name in dir(primitives) if name.endswith("_p")}
# So are the programs with which `jax.device_put` and `multihost_utils` move arrays between devices and processes.
_OPERATIONS |= {"jit(_device_put_reshard)", "jit(_identity_fn)", "jit(_psum)"}


class _Inputs(NamedTuple):
    """Shapes with dtypes, and shardings, of the arrays that a program is compiled for."""

    shapes: tuple[str, ...]
    shardings: tuple[str, ...]


class _CompilationFilter(logging.Filter):
    """Reads JAX's log record of each compilation, and hides records below WARNING."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs_by_program: dict[str, _Inputs] = {}
        self._recompiled: list[str] = []
        self._after_first_step = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Note the program and the shapes of a compilation; return whether to show the record."""
        if str(record.msg).startswith(COMPILATION_MESSAGE) and isinstance(record.args, tuple):
            program, *inputs = record.args
            shapes, shardings = (tuple(map(str, each)) for each in inputs)  # pyright: ignore[reportArgumentType]
            self._note(str(program), _Inputs(shapes, shardings))
        return record.levelno >= logging.WARNING

    def _note(self, program: str, inputs: _Inputs) -> None:
        earlier = self._inputs_by_program.get(program)
        self._inputs_by_program[program] = inputs
        # For the same inputs, a program is compiled again with another option, such as the one that dynamic sampling turns on.
        if earlier is None or earlier == inputs or program in _OPERATIONS:
            return
        if self._after_first_step:
            self._recompiled.append(f"{program} was compiled again, {_describe_change(earlier, inputs)}")

    def take(self) -> list[str]:
        """Return a sentence for each program that was compiled again since the last call.

        The first call ends the first step, which may compile a program for several shapes, and returns nothing.
        """
        recompiled = self._recompiled
        self._recompiled = []
        self._after_first_step = True
        return recompiled


def _describe_change(earlier: _Inputs, now: _Inputs) -> str:
    if len(earlier.shapes) != len(now.shapes):
        return f"for {len(now.shapes)} arrays instead of {len(earlier.shapes)}"
    pairs = enumerate(zip(earlier.shapes, now.shapes, strict=True))
    changed = [f"argument {i}: {a} -> {b}" for i, (a, b) in pairs if a != b]
    if not changed:
        return "for the same shapes, but with other shardings"
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
