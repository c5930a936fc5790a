"""Shared parts of the benches: timing of repeated calls, a description of the machine, and its matrix-multiply rate."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rpt_jax.infra.console import Progress

# Rows of the matrix that measures the peak: large enough to saturate the device, and on a CPU done in a tenth of a second.
_CPU_MATRIX = 2048
_MATRIX = 8192


class Seconds(NamedTuple):
    """Seconds of repeated calls: median, fastest and slowest."""

    median: float
    fastest: float
    slowest: float


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
    """Time each call `repeats` times after one run that compiles it.

    The calls take turns, so that other load on the machine affects all of them equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with Progress("repeat", repeats + 1) as progress:
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call())
                seconds[name].append(time.perf_counter() - start)
            latest = ", ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items())
            progress.advance(latest if repeat else "compiled")
    return {
        name: Seconds(median=statistics.median(s), fastest=min(s), slowest=max(s)) for name, (_, *s) in seconds.items()
    }


def matmul_call(dtype: str) -> tuple[Callable[[], Any], float]:
    """Return a product of large square matrices, and its FLOPs: its fastest run is the peak rate of the machine."""
    size = _CPU_MATRIX if jax.default_backend() == "cpu" else _MATRIX
    # A device takes less power for constant numbers, and multiplies them faster.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x, y: x @ y)
    return lambda: multiply(x, x), 2.0 * size**3


def round_to_4_digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    """Return the device, cores, JAX version and load average of a minute, which figures depend on."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {_cpu_model() if device.platform == 'cpu' else device.device_kind}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
