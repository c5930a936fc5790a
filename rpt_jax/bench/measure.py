"""What every bench needs: seconds of repeated calls, the machine, and how fast it multiplies matrices at best."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.infra.console import Progress

# Large enough that a device is busy, small enough that a CPU is done in a tenth of a second.
_MATRIX = {"cpu": 2048}
_LARGE_MATRIX = 8192


class Seconds(NamedTuple):
    """Of repeated calls: the median, the fastest and the slowest."""

    median: float
    low: float
    high: float


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
    """Time each call `repeats` times after one that compiles, in turns: a busy minute then hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with Progress("turn", repeats + 1) as progress:
        for turn in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call())
                seconds[name].append(time.perf_counter() - start)
            progress.advance(", ".join(f"{name} {s[-1]:.3g} s" for name, s in seconds.items()) if turn else "compiled")
    return {name: Seconds(statistics.median(s), min(s), max(s)) for name, (_, *s) in seconds.items()}


def matmul_call(dtype: str) -> tuple[Callable[[], Any], float]:
    """A product of square matrices, and its FLOPs: what the fastest of its runs reaches is the ceiling of the machine."""
    size = _MATRIX.get(jax.default_backend(), _LARGE_MATRIX)
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x, y: x @ y)
    return lambda: multiply(x, x), 2.0 * size**3


def machine() -> dict[str, Any]:
    """What figures are to be read with: device, cores, JAX and how busy the machine is (load average of a minute)."""
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
