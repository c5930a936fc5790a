"""The platform that programs are compiled for."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """Return the platform of the mesh in context, or of this process if there is none: "cpu", "gpu" or "tpu".

    The mesh may consist of devices that are only described to the compiler (preflight); programs are then traced as for real
    ones. Traced functions call this, too, to choose block sizes: results under different meshes may differ by rounding. JAX
    traces a function again under another mesh, so a program with the block sizes of another platform is never reused.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def target_device_kind() -> str:
    """Return the `device_kind` in JAX of the devices that `target_platform` returns the platform of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
