"""Messages while a program compiles: a large one takes minutes, in which a run would seem to hang."""

from __future__ import annotations

import logging
import threading
from typing import Any, Self

import jax

logger = logging.getLogger(__name__)

# JAX reports the start of a compilation as a scalar and its end as a duration, both under this name (jax 0.10.2).
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
FIRST_MESSAGE_SECONDS = 15.0


class CompilationProgress:
    """Logs the programs that compile for more than some seconds, while they do and when they are done.

    Args:
      seconds: until the first message about a program. Each further one comes after twice the time of the one before.
    """

    def __init__(self, seconds: float = FIRST_MESSAGE_SECONDS):
        self._seconds = seconds
        self._timers: dict[int, threading.Timer] = {}  # By the thread that compiles.

    def __enter__(self) -> Self:
        jax.monitoring.register_scalar_listener(self._on_start)
        jax.monitoring.register_event_duration_secs_listener(self._on_end)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_scalar_listener(self._on_start)
        jax.monitoring.unregister_event_duration_listener(self._on_end)
        for timer in self._timers.values():
            timer.cancel()

    def _on_start(self, event: str, value: float, **metadata: Any) -> None:
        if event == COMPILATION_EVENT:
            self._set_timer(threading.get_ident(), str(metadata.get("fun_name", "a program")), self._seconds, 0.0)

    def _on_end(self, event: str, duration_secs: float, **metadata: Any) -> None:
        if event != COMPILATION_EVENT:
            return
        if timer := self._timers.pop(threading.get_ident(), None):
            timer.cancel()
        if duration_secs >= self._seconds:
            logger.info("Compiled %s in %.0f s.", metadata.get("fun_name", "a program"), duration_secs)

    def _set_timer(self, thread: int, program: str, wait: float, waited: float) -> None:
        """Log a message about `program` after `wait` seconds, `waited` seconds after its start, unless it is done by then."""

        def report() -> None:
            logger.info("Compiling %s for %.0f s …", program, waited + wait)
            if self._timers.get(thread) is timer:
                self._set_timer(thread, program, 2 * wait, waited + wait)

        timer = threading.Timer(wait, report)
        timer.daemon = True
        self._timers[thread] = timer
        timer.start()
