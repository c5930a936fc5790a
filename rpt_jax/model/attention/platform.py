"""The platform that programs are compiled for."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """Return the platform of the mesh in context, or of this process if there is none: "cpu", "gpu" or "tpu".

    The mesh may consist of devices that exist only in a compiler's description (preflight); programs are then traced as they
    would be for these devices. This function reads JAX's ambient mesh, also inside traced functions, where the result only
    chooses block sizes: two calls under different meshes may differ in speed and in rounding, not in meaning. JAX traces a
    function anew under another mesh, so that no program with the block sizes of another platform is reused.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
