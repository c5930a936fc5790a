"""Settings for every test, made before JAX is imported."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# In the environment rather than in jax.config, so that the processes that tests start have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags  # noqa: E402

# grain reads flags, which only absl.app.run parses.
flags.FLAGS.mark_as_parsed()
