"""What the device reaches at most: rates of copies and of bfloat16 matrix products, and the time of a loop's turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.sizes import Sizes
from rpt_jax.infra.chips import Chip, chip_of

_REPEATS = 5
_REPEAT_SECONDS = 0.05  # A repeat makes as many calls as fit in it, so that starting a program hardly counts.
_MOST_CALLS = 20  # The results of calls that wait for the device may all exist at once.
_LONG_SECONDS = 2.0  # A call that takes longer is timed once.
_TURNS = 1000


class Ceilings(NamedTuple):
    """Rates that programs are compared with.

    Attributes:
      bytes_per_second: read and written by a copy.
      flops_per_second: of a bfloat16 matrix product.
    """

    bytes_per_second: float
    flops_per_second: float


def seconds_per_call(call: Callable[[], Any]) -> float:
    """Return the median time of a call; the first one, which compiles, is not counted."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    if once > _LONG_SECONDS:
        return once
    calls = max(1, min(_MOST_CALLS, int(_REPEAT_SECONDS / once)))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)  # A device runs its programs one after the other.
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def measure_ceilings(sizes: Sizes) -> Ceilings:
    """Measure them in this process: every part compares its figures with those of the same minute."""
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    arrays = [jnp.zeros(sizes.copy_bytes // 2, jnp.bfloat16)]

    def copy_again() -> jax.Array:
        arrays.append(copy(arrays.pop()))
        return arrays[0]

    copy_seconds = seconds_per_call(copy_again)
    # Random numbers: a device that multiplies zeros takes less power and runs faster.
    x = jax.random.normal(jax.random.key(0), (sizes.matrix, sizes.matrix), jnp.bfloat16)
    multiply = jax.jit(lambda x, y: x @ y)
    matmul_seconds = seconds_per_call(lambda: multiply(x, x))
    return Ceilings(
        bytes_per_second=2 * sizes.copy_bytes / copy_seconds, flops_per_second=2.0 * sizes.matrix**3 / matmul_seconds
    )


def this_chip() -> Chip | None:
    """Return the published figures of the device, None if they are not known."""
    return chip_of(jax.devices()[0].device_kind)


def measure(report: Report, sizes: Sizes) -> None:
    """Measure the ceilings, and what a turn of a loop takes beyond its work."""
    chip = this_chip()
    ceilings = measure_ceilings(sizes)
    copied = ceilings.bytes_per_second
    multiplied = ceilings.flops_per_second
    report.figure(
        ceiling="copy, read and written",
        value=copied / 1e12,
        unit="TB/s",
        of_published=chip and copied / chip.memory_speed,
    )
    report.figure(
        ceiling="bfloat16 matrix product",
        value=multiplied / 1e12,
        unit="TFLOP/s",
        of_published=chip and multiplied / chip.flops,
    )

    # Where data decide how often a loop turns, XLA on a GPU asks the host before each turn.
    x = jnp.ones(128)
    turns = jnp.int32(_TURNS)
    loops = {
        "turn of a loop of known length": jax.jit(
            lambda x, n: jax.lax.fori_loop(0, _TURNS, lambda i, x: x * 1.0001, x)
        ),
        "turn of a loop whose length is data": jax.jit(
            lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x * 1.0001, x)
        ),
    }
    for name, loop in loops.items():
        with report.measurement(name):
            seconds = seconds_per_call(lambda loop=loop: loop(x, turns)) / _TURNS
            report.figure(ceiling=name, value=seconds * 1e6, unit="µs")
