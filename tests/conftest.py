"""Settings for every test, made before JAX is imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# In the environment rather than in jax.config, so that the processes that tests start have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The programs that tests compile are not for the developer's own compilation cache.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# grain reads flags, which only absl.app.run parses.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs() -> Iterator[None]:
    """Every program on the CPU holds several memory maps; at 65,530 of them, Linux's default, XLA aborts Python."""
    yield
    jax.clear_caches()
    gc.collect()
