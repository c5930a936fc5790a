"""What a result was made with."""

from __future__ import annotations

from typing import Any

import jax

from rpt_jax.infra.run_format import format_stamp
from rpt_jax.infra.source_commit import source_commit


def provenance() -> dict[str, Any]:
    """Return the format, the package, its commit and the devices, as every file of results begins."""
    return {
        **format_stamp(),
        "commit": source_commit(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }
