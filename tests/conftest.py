"""Settings for every test, made before JAX is imported."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# In the environment rather than in jax.config, so that the processes that tests start have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests spend most of their time in XLA's compiler. A program that several tests use, in this process, in another worker or in a
# process that a test starts, is compiled once. A directory of your own in this variable is kept, for the next tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rpt_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# The programs of tests run for milliseconds; optimizing them would take most of the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older code generator compiles the programs of tests in less than half the time. jax 0.11 and newer lack it.
if version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# grain reads flags, which only absl.app.run parses.
flags.FLAGS.mark_as_parsed()


# The files that take longest, in that order. They are started first, so that no process is left alone with one at the end.
LONGEST = (
    "tests/test_train.py",
    "tests/test_docs.py",
    "tests/test_rft.py",
    "tests/rollout/test_engine.py",
    "tests/objective/test_objective.py",
    "tests/distributed/test_sharding.py",
    "tests/distributed/test_multihost.py",
    "tests/test_pretrain.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))


MAPS = Path("/proc/self/maps")
MAX_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs() -> Iterator[None]:
    """Every program on the CPU holds several memory maps; at 65,530 of them, Linux's default, XLA aborts Python."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()
