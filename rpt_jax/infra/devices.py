"""The devices that a run computes on, and accelerators of this machine that it does not use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax

# Extra of the package `jax` -> kind of accelerator, and the files that its driver makes for each device.
_ACCELERATORS = {
    "cuda13": ("an NVIDIA GPU", ("dev/nvidia[0-9]*",)),
    "tpu": ("a TPU", ("dev/accel[0-9]*", "dev/vfio/[0-9]*")),
}
_GOOGLE = "0x1ae0"  # PCI vendor of TPUs. Drivers of other devices also make files in /dev/vfio and called /dev/accel*.


def describe_devices() -> str:
    """Return the number, kind, platform and memory of the devices of the run, and its processes if there are several."""
    device = jax.devices()[0]
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = f" with {limit / 2**30:.1f} GiB for JAX" if limit else ""
    return f"{jax.device_count()} x {device.platform}{kind}{memory}{processes}, jax {jax.__version__}"


def unused_accelerator(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> str:
    """Return a sentence if this machine has an accelerator, but JAX computes on the CPU without having been told to.

    Args:
      root: the root of the file system.
      environment: environment variables.

    Returns: "" if there is nothing to say.
    """
    if jax.default_backend() != "cpu" or "cpu" in environment.get("JAX_PLATFORMS", "").split(","):
        return ""
    for extra, (accelerator, patterns) in _ACCELERATORS.items():
        files = [file for pattern in patterns for file in root.glob(pattern)]
        if files and (extra != "tpu" or _has_google_device(root)):
            return (
                f"this machine has {accelerator} ({files[0]}), but JAX computes on the CPU: its plugin is not installed, or does "
                f"not work with the driver. Install it with: pip install 'jax[{extra}]=={jax.__version__}'. To compute on the "
                "CPU on purpose, set JAX_PLATFORMS=cpu."
            )
    return ""


def _has_google_device(root: Path) -> bool:
    return any(file.read_text().strip() == _GOOGLE for file in root.glob("sys/bus/pci/devices/*/vendor"))
