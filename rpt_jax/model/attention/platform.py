"""Which platform programs are traced for: the one that will run them, which need not be here."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """Return "cpu", "gpu" or "tpu": the platform of the mesh in context or, without one, of this process.

    A mesh may be of devices that exist in a compiler's description alone; programs for it are those that they would run.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
