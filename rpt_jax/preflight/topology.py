"""The chips that `--topology` names, and the environment in which programs are compiled for them. Imports no JAX."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

from rpt_jax.errors import UserError, nearest
from rpt_jax.infra.chips import CHIPS, Chip

# Settings that let libtpu compile on a machine without a TPU; read when it is imported. The accelerator type does not have to
# match the topology: it only keeps libtpu from querying a metadata server.
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
    """Chips of one kind: the sizes of their torus, as in "v5p:4x4x4", or their number, as in "h100:8"."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Published figures of the chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.sizes)

    @property
    def name(self) -> str:
        """The topology as it is written for `--topology`."""
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    @property
    def has_compiler(self) -> bool:
        """Whether programs can be compiled for it without the chips; if not, simulated CPU devices take their place."""
        return self.chip.platform == "tpu"


class _Series(NamedTuple):
    """Cloud TPU's accelerator types of one kind of chip, such as v5p-128.

    Attributes:
      kind: the chip.
      cores: TensorCores of a chip that the number in the name counts.
      largest: chips of the largest slice that is named so.
    """

    kind: str
    cores: int
    largest: int


# From cloud.google.com/tpu/docs, one page for each version.
_SERIES = {
    "v4": _Series("v4", 2, 2048),
    "v5litepod": _Series("v5e", 1, 256),
    "v5e": _Series("v5e", 1, 256),
    "v5p": _Series("v5p", 2, 4096),
    "v6e": _Series("v6e", 1, 256),
}
# The sizes of a torus with this number of dimensions.
_EXAMPLES = {1: "8", 2: "4x4", 3: "2x2x4"}


def parse_topology(text: str) -> Topology:
    """Parse "v5p:4x4x4", "h100:8" or an accelerator type of Cloud TPU, such as "v6e-64" or "v5litepod-16".

    Raises:
      UserError: the chip is unknown or the sizes do not fit it.
    """
    if series := re.fullmatch(r"([a-z0-9]+)-(.*)", text):
        return _parse_accelerator_type(*series.groups())
    kind, _, rest = text.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={text}: '{kind}' is not one of: {', '.join(CHIPS)}.{nearest(kind, CHIPS)} "
            "Write it as v5p:4x4x4, v6e-64 or h100:8.",
            field="--topology",
        )
    dimensions = CHIPS[kind].dimensions or 1
    sizes = rest.split("x")
    if len(sizes) != dimensions or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        expected = "a number" if dimensions == 1 else f"{dimensions} numbers"
        raise UserError(
            f"--topology={text}: expected {expected} after '{kind}:', as in {kind}:{_EXAMPLES[dimensions]}.",
            field="--topology",
        )
    return Topology(kind=kind, sizes=tuple(map(int, sizes)))


def _parse_accelerator_type(name: str, number: str) -> Topology:
    """Return the default topology of a slice of Cloud TPU, such as v6e-64 or v5p-128. Raises: UserError."""
    text = f"{name}-{number}"
    if name not in _SERIES:
        raise UserError(
            f"--topology={text}: '{name}' is not one of: {', '.join(_SERIES)}.{nearest(name, _SERIES)} "
            "Write it as v6e-64, v5p:4x4x4 or h100:8.",
            field="--topology",
        )
    series = _SERIES[name]
    dimensions = CHIPS[series.kind].dimensions
    # Powers of two. There are no slices of two chips, and single chips only of the kinds whose torus has two dimensions.
    exponents = range(0 if dimensions == 2 else 2, series.largest.bit_length())
    numbers = {str(series.cores * 2**exponent): exponent for exponent in exponents if exponent != 1}
    if number not in numbers:
        raise UserError(
            f"--topology={text}: expected {name}- and one of {', '.join(numbers)}. Write any other slice with its sizes, as in "
            f"{series.kind}:{_EXAMPLES[dimensions]}.",
            field="--topology",
        )
    # The sizes are as equal as possible, the largest one last. The four chips of a host are a square.
    sizes = tuple(2 ** ((numbers[number] + axis) // dimensions) for axis in range(dimensions))
    return Topology(kind=series.kind, sizes=(2, 2, 1) if sizes == (1, 2, 2) else sizes)


def prepare_process(topology: Topology) -> None:
    """Set the environment variables that JAX and libtpu read when they are imported; those of the user are kept.

    Raises:
      UserError: libtpu is needed and not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not topology.has_compiler:
        count = f"--xla_force_host_platform_device_count={topology.chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs libtpu, which is not installed. On Linux: "
            'pip install "jax[tpu]>=0.10.2,<0.13" (0.7 GB more; no TPU is needed).',
            field="--topology",
        )
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
