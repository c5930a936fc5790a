"""Accelerators of the machine that JAX does not use."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from rpt_jax.infra.devices import describe_devices, unused_accelerator


def machine(root: Path, files: tuple[str, ...], vendor: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    device = root / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    return root


@pytest.mark.parametrize(
    ("files", "vendor", "extra"),
    [
        (("dev/nvidia0", "dev/nvidiactl"), "0x10de", "jax[cuda13]"),
        (("dev/accel0",), "0x1ae0", "jax[tpu]"),
        (("dev/vfio/0",), "0x1ae0", "jax[tpu]"),
        (("dev/accel0",), "0x8086", ""),
        (("dev/nvidiactl",), "0x10de", ""),
        ((), "0x8086", ""),
    ],
)
def test_an_accelerator_that_is_not_used_is_named_with_the_package(
    tmp_path: Path, files: tuple[str, ...], vendor: str, extra: str
) -> None:
    found = unused_accelerator(machine(tmp_path, files, vendor), {})
    assert extra in found if extra else found == ""


def test_a_run_on_the_cpu_on_purpose_says_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, ("dev/nvidia0",), "0x10de")
    assert unused_accelerator(root, {"JAX_PLATFORMS": "cpu"}) == ""
    assert unused_accelerator(root, {"JAX_PLATFORMS": ""})


def test_the_devices_are_described() -> None:
    assert describe_devices() == f"{jax.device_count()} x cpu, jax {jax.__version__}"
