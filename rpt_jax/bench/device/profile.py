"""What a profile shows: kernels that a decode step and an update start, and how much of the time the device is busy."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions

from rpt_jax.bench.device.ceilings import seconds_per_call
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.rollouts import decode_programs, decoding_of, fitting, random_policy, random_prompts, run
from rpt_jax.bench.device.sizes import Sizes, Workload
from rpt_jax.bench.device.updates import update_options
from rpt_jax.bench.update import make_batch, update_call
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.model_config import preset

_LONGEST = 6  # Kernels that are named.
_NAME_CHARACTERS = 60


class KernelEvent(NamedTuple):
    """A kernel, or a copy, that the device ran; times in nanoseconds."""

    name: str
    start: float
    duration: float


class KernelSummary(NamedTuple):
    """What kernels add up to.

    Attributes:
      count: number of kernels and copies.
      busy: fraction of the time from the first to the last one in which at least one ran.
      seconds: that time.
      longest: the names that took most of the kernels' time, with their share of it.
    """

    count: int
    busy: float
    seconds: float
    longest: str


def summarize(events: Sequence[KernelEvent]) -> KernelSummary:
    """Return what the events add up to; there must be at least one."""
    ordered = sorted(events, key=lambda event: event.start)
    busy = 0.0
    end = first = ordered[0].start
    for event in ordered:
        busy += max(0.0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    by_name: collections.Counter[str] = collections.Counter()
    for event in ordered:
        by_name[event.name] += round(event.duration)
    total = max(by_name.total(), 1)
    longest = [f"{name[:_NAME_CHARACTERS]} {time / total:.0%}" for name, time in by_name.most_common(_LONGEST)]
    span = max(end - first, 1.0)
    return KernelSummary(count=len(ordered), busy=busy / span, seconds=span / 1e9, longest="; ".join(longest))


def record_kernels(call: Callable[[], Any]) -> list[KernelEvent]:
    """Return the kernels that a call starts on a GPU, in the profile that JAX records of it."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, profiler_options=options)
        try:
            jax.block_until_ready(call())
        finally:
            jax.profiler.stop_trace()
        return [event for path in Path(directory).rglob("*.xplane.pb") for event in _kernels_in(path)]


def _kernels_in(path: Path) -> Iterator[KernelEvent]:
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            # Other lines group the same kernels by operation, module and step.
            if line.name.startswith("Stream"):
                yield from (KernelEvent(event.name, event.start_ns, event.duration_ns) for event in line.events)


def measure(report: Report, sizes: Sizes) -> None:
    """Profile decoding and the update of each model's first workload."""
    if target_platform() != "gpu":
        report.note("Kernels are counted on a GPU only: here, the programs run without a count.")
    for model in sizes.models:
        workload = next(workload for workload in sizes.workloads if workload.model == model)
        with report.measurement(f"decoding, {workload}"):
            _profile_decoding(report, workload)
    for model in sizes.models:
        workload = next(workload for workload in sizes.workloads if workload.model == model)
        with report.measurement(f"update, {workload}"):
            _profile_update(report, workload)


def _profile_decoding(report: Report, workload: Workload) -> None:
    policy, params = random_policy(preset(workload.model))
    workload = fitting(workload, policy.config, resident=sum(x.nbytes for x in jax.tree.leaves(params)))
    prompts = random_prompts(policy.config, workload)
    programs = decode_programs(policy, params, prompts, decoding_of(workload))
    run(programs)
    timed = run(programs)
    inputs, state = jax.block_until_ready(programs.start())
    events = record_kernels(lambda: programs.decode(inputs, state))
    _report_summary(report, "decode step", workload, timed.decode / timed.steps, events, calls=timed.steps)


def _profile_update(report: Report, workload: Workload) -> None:
    options = update_options(workload)
    config = preset(workload.model)
    call = update_call(options, config, make_batch(options, config))
    call()
    seconds = seconds_per_call(call)
    _report_summary(report, "update", workload, seconds, record_kernels(call), calls=1)


def _report_summary(
    report: Report, work: str, workload: Workload, seconds: float, events: Sequence[KernelEvent], calls: int
) -> None:
    labels = {"work": work, "model": workload.model, "live": workload.live, "context": workload.context}
    unprofiled = {"ms": 1000 * seconds}
    if not events:
        report.figure(**labels, **unprofiled)
        return
    summary = summarize(events)
    report.figure(
        **labels,
        **unprofiled,
        kernels=summary.count / calls,
        busy=summary.busy,
        profiled_ms=1000 * summary.seconds / calls,
        longest=summary.longest,
    )
