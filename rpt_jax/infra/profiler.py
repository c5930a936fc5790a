"""A window of steps that the JAX profiler records, for TensorBoard and xprof."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

import jax

from rpt_jax.config import ProfileConfig

logger = logging.getLogger(__name__)

PROFILE = "profile"


class ProfileWindow:
    """Records steps `profile.start` to `profile.start + profile.steps - 1` into `workdir/profile`.

    Call `begin_step` before each step and `end_step` after it. As a context manager, it ends a recording that is still active.
    """

    def __init__(self, config: ProfileConfig, workdir: Path):
        self._first_step = config.start
        self._end_step = config.start + config.steps
        self._directory = workdir / PROFILE
        self._active = False
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def begin_step(self, step: int) -> None:
        """Record this step if it is in the window. Steps count from 1."""
        # A run that is resumed inside the window records the rest of it.
        if not 0 < self._first_step <= step < self._end_step:
            return
        if not self._active:
            jax.profiler.start_trace(str(self._directory))
            self._active = True
        self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._annotation.__enter__()

    def end_step(self, step: int) -> None:
        """Write the recording if this was the last step of the window."""
        self._end_annotation()
        if self._active and step + 1 >= self._end_step:
            self._stop()

    def _end_annotation(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._active = False
        logger.info("Profile written; view it with: tensorboard --logdir=%s", self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_annotation()
        if self._active:
            self._stop()
