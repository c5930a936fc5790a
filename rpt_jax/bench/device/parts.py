"""The parts of the bench, those first that are worth most."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import jax

from rpt_jax.bench.device import attention, ceilings, parity, peer, profile, rollouts, step, updates
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.sizes import Sizes
from rpt_jax.bench.measure import machine


class MeasuredPart(NamedTuple):
    """A part.

    Attributes:
      measure: measures it.
      weight: its share of the time that is left when it starts, relative to the parts after it.
      summary: what it measures.
    """

    measure: Callable[[Report, Sizes], None]
    weight: float
    summary: str


def report_machine(report: Report, sizes: Sizes) -> None:
    """Report the device and the versions that all figures depend on."""
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    report.machine(
        machine()
        | {
            "platform": device.platform,
            "memory_gib": round(statistics.get("bytes_limit", 0) / 2**30, 1),
            "jaxlib": version("jaxlib"),
            "runtime": device.client.platform_version,
            "python": platform.python_version(),
        }
    )


# The first part, which is always run: the others need to know the platform.
MACHINE = "machine"
PARTS = {
    MACHINE: MeasuredPart(report_machine, 0, "the device and the versions"),
    "ceilings": MeasuredPart(ceilings.measure, 4, "rates of copies and of bfloat16 matrix products"),
    "parity": MeasuredPart(parity.measure, 9, "kernels against the plain reference, forward and backward"),
    "attention": MeasuredPart(attention.measure, 9, "attention by plain XLA against kernels, forward and backward"),
    "rollout": MeasuredPart(rollouts.measure, 15, "decoding: tokens/s, and the share of the bound of bytes and FLOPs"),
    "update": MeasuredPart(updates.measure, 12, "the update with shared and repeated prompts: tokens/s and MFU"),
    "step": MeasuredPart(step.measure, 20, "whole steps of a run by phase"),
    "transformers": MeasuredPart(peer.measure, 12, "the same rollouts and updates by transformers on PyTorch"),
    "profile": MeasuredPart(
        profile.measure, 8, "kernels of a decode step and of an update, and the device's busy share"
    ),
}
