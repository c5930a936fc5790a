"""Chips and how many of them: what `--topology` says, and what their makers say of them. Imports no JAX."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import NamedTuple

from rpt_jax.errors import UserError, nearest


class Chip(NamedTuple):
    """What a program needs to know of one device.

    Attributes:
      platform: "tpu" or "gpu".
      memory: bytes that a program may use: of TPUs what libtpu's compiler allows, of GPUs nine tenths of what there is.
      flops: FLOP/s in bfloat16, without sparsity.
      memory_speed: bytes a second of its memory.
      link_speed: bytes a second that it sends while a ring of neighbors passes data on: over the two links of one axis of a
        torus, or to the other GPUs of its host.
      host: devices of a host; far_speed: bytes a second that a device sends to other hosts, None where that is no border.
      dimensions: of the network; 0 where devices are only counted.
    """

    platform: str
    memory: float
    flops: float
    memory_speed: float
    link_speed: float
    host: int
    far_speed: float | None
    dimensions: int


_GIB = 2**30
# TPUs: cloud.google.com/tpu/docs, a page each. FLOP/s, GB/s of HBM, and GB/s of all links in both directions (v4 600 of 6 links,
# v5e 400 of 4, v5p 1200 of 6, v6e 800 of 4): a link sends half of its share, and an axis of the torus has two. Memory: what
# libtpu names as a chip's capacity where a program is too large. GPUs: the makers' data sheets of the SXM modules: NVLink one
# way, and a network card of 400 Gb/s a GPU (200 for A100).
CHIPS = {
    "v4": Chip("tpu", 30.75 * _GIB, 275e12, 1228e9, 100e9, 4, None, 3),
    "v5e": Chip("tpu", 15.75 * _GIB, 197e12, 819e9, 100e9, 4, None, 2),
    "v5p": Chip("tpu", 95.74 * _GIB, 459e12, 2765e9, 200e9, 4, None, 3),
    "v6e": Chip("tpu", 31.25 * _GIB, 918e12, 1640e9, 200e9, 4, None, 2),
    "a100": Chip("gpu", 0.9 * 80e9, 312e12, 2039e9, 300e9, 8, 25e9, 0),
    "h100": Chip("gpu", 0.9 * 80e9, 989e12, 3350e9, 450e9, 8, 50e9, 0),
    "h200": Chip("gpu", 0.9 * 141e9, 989e12, 4800e9, 450e9, 8, 50e9, 0),
    "b200": Chip("gpu", 0.9 * 180e9, 2250e12, 7700e9, 900e9, 8, 50e9, 0),
}
# What libtpu asks of a machine without a TPU, before JAX is imported. The accelerator's type is not the topology's: it says
# only that no metadata server is to be asked.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Topology(NamedTuple):
    """So many chips of one kind, with the shape of their network, as in "v5p:4x4x4", or counted, as in "h100:8"."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    @property
    def is_compiled_for(self) -> bool:
        """Whether there is a compiler for it here; otherwise as many simulated CPU devices take its place."""
        return self.chip.platform == "tpu"


def parse_topology(text: str) -> Topology:
    """Read "v5p:4x4x4" or "h100:8". Raises: UserError, with what was expected."""
    kind, _, rest = text.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={text}: '{kind}' is not one of: {', '.join(CHIPS)}.{nearest(kind, CHIPS)} "
            "Write it as v5p:4x4x4 or h100:8."
        )
    dimensions = CHIPS[kind].dimensions or 1
    example = {1: "8", 2: "4x4", 3: "2x2x4"}[dimensions]
    sizes = rest.split("x")
    if len(sizes) != dimensions or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        wanted = "a number" if dimensions == 1 else f"{dimensions} numbers"
        raise UserError(
            f"--topology={text}: after '{kind}:' come{'s' * (dimensions == 1)} {wanted}, as in {kind}:{example}."
        )
    return Topology(kind, tuple(map(int, sizes)))


def prepare_process(topology: Topology) -> None:
    """Set what JAX and libtpu read as they are imported, unless the user did. Raises: UserError, without libtpu."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not topology.is_compiled_for:
        count = f"--xla_force_host_platform_device_count={topology.count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} is compiled for by libtpu, which is not installed. On Linux: "
            'pip install "jax[tpu]>=0.10.2,<0.13" (0.7 GB more; no TPU is needed).'
        )
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
