"""JAX settings that a run needs; those of the environment are overridden."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax

from rpt_jax.errors import UserError

logger = logging.getLogger(__name__)

# The programs of rpt_jax name their dtypes and rely on JAX's usual promotion.
_SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,
}
_LEVEL = "jax_optimization_level"


@contextlib.contextmanager
def needed_jax_settings() -> Iterator[None]:
    """Set inside the block what rpt_jax's programs are written for, and say which of the user's settings are not used.

    On several GPUs, XLA hides the latency of collectives at its level O1 only; a level that the user chose stays.
    """
    earlier = {name: getattr(jax.config, name) for name in (*_SETTINGS, _LEVEL)}
    for name, value in _SETTINGS.items():
        if earlier[name] != value:
            logger.warning("%s=%s is not used: rpt_jax runs with %s only.", name.upper(), earlier[name], value)
            jax.config.update(name, value)
    if earlier[_LEVEL] == "UNKNOWN" and jax.default_backend() == "gpu" and jax.device_count() > 1:
        jax.config.update(_LEVEL, "O1")
    try:
        yield
    finally:
        for name, value in earlier.items():
            jax.config.update(name, value)


def check_platforms() -> None:
    """Raise UserError if JAX does not find the devices that JAX_PLATFORMS asks for. This starts JAX's backends."""
    try:
        jax.devices()
    # JAX raises AssertionError for a platform whose plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"] or ""
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "no plugin for it is installed"
        raise UserError(
            f"JAX_PLATFORMS='{asked}' cannot be used: {reason.rstrip('.')}. Unset JAX_PLATFORMS to use what there is, or install "
            "JAX for these devices: pip install -e '.[cuda]' or '.[tpu]', in the clone.",
            field="JAX_PLATFORMS",
        ) from None
