"""Published figures of accelerators, for utilization and for cost estimates. Imports no JAX.

Sources: TPUs, one page each of cloud.google.com/tpu/docs; memory is the capacity that libtpu names when a program is too large.
GPUs, the makers' data sheets of the SXM modules; their memory is nine tenths of the module's.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Figures of one device.

    Attributes:
      platform: "tpu" or "gpu".
      memory: bytes that a program may use.
      flops: FLOP/s in bfloat16, without sparsity.
      memory_speed: bytes per second of device memory.
      link_speed: bytes per second sent in a ring of neighbors: on TPUs over the two links of one axis of the torus, each of
        which sends half of its published bidirectional rate; on GPUs over NVLink to the GPUs of the same host.
      devices_per_host: devices of one host.
      network_speed: bytes per second that a device sends to other hosts, from a network card of 400 Gb/s per GPU (A100: 200);
        None for TPUs, whose torus spans hosts.
      dimensions: dimensions of the torus; 0 for GPUs, which are only counted.
      device_kinds: `device_kind` of the devices in JAX.
    """

    platform: str
    memory: float
    flops: float
    memory_speed: float
    link_speed: float
    devices_per_host: int
    network_speed: float | None
    dimensions: int
    device_kinds: tuple[str, ...] = ()


_GIB = 2**30


def _tpu(
    memory: float, flops: float, memory_speed: float, link_speed: float, dimensions: int, *device_kinds: str
) -> Chip:
    return Chip(
        platform="tpu",
        memory=memory,
        flops=flops,
        memory_speed=memory_speed,
        link_speed=link_speed,
        devices_per_host=4,
        network_speed=None,
        dimensions=dimensions,
        device_kinds=device_kinds,
    )


def _gpu(
    memory: float, flops: float, memory_speed: float, link_speed: float, network_speed: float, *device_kinds: str
) -> Chip:
    return Chip(
        platform="gpu",
        memory=0.9 * memory,
        flops=flops,
        memory_speed=memory_speed,
        link_speed=link_speed,
        devices_per_host=8,
        network_speed=network_speed,
        dimensions=0,
        device_kinds=device_kinds,
    )


# Memory, FLOP/s, memory speed, link speed, dimensions of the torus (TPU) or network speed (GPU), device kinds.
CHIPS = {
    "v4": _tpu(30.75 * _GIB, 275e12, 1228e9, 100e9, 3, "TPU v4"),
    "v5e": _tpu(15.75 * _GIB, 197e12, 819e9, 100e9, 2, "TPU v5 lite"),
    "v5p": _tpu(95.74 * _GIB, 459e12, 2765e9, 200e9, 3, "TPU v5p", "TPU v5"),
    "v6e": _tpu(31.25 * _GIB, 918e12, 1640e9, 200e9, 2, "TPU v6 lite"),
    "a100": _gpu(80e9, 312e12, 2039e9, 300e9, 25e9, "NVIDIA A100-SXM4-80GB"),
    "h100": _gpu(80e9, 989e12, 3350e9, 450e9, 50e9, "NVIDIA H100 80GB HBM3"),
    "h200": _gpu(141e9, 989e12, 4800e9, 450e9, 50e9, "NVIDIA H200"),
    "b200": _gpu(180e9, 2250e12, 7700e9, 900e9, 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the published figures of a device by its `device_kind` in JAX, None if it is not listed."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def published_flops(device_kind: str) -> float | None:
    """Return the FLOP/s of a device in bfloat16 by its `device_kind` in JAX, None if it is not listed."""
    chip = chip_of(device_kind)
    return chip and chip.flops
