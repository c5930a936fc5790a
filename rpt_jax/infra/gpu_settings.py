"""Settings of JAX and XLA for NVIDIA GPUs, where the environment does not have them. This module does not import JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from rpt_jax.config.user_paths import cache_directory

# Variables that say how much of a GPU's memory JAX takes. It refuses the first two together.
_MEMORY_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_XLA_FLAGS = "XLA_FLAGS"
_AUTOTUNE_CACHE = "--xla_gpu_per_fusion_autotune_cache_dir"
_DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops"


def has_gpu(root: Path = Path("/")) -> bool:
    """Return whether this machine has an NVIDIA GPU with a driver. `root` is the root of the file system."""
    return any(root.glob("dev/nvidia[0-9]*"))


def set_gpu_defaults(environment: MutableMapping[str, str]) -> None:
    """Let JAX take nine tenths of a GPU's memory instead of three quarters, and keep the kernels that XLA chose by measuring.

    What the environment says stays as it is.

    Args:
      environment: of a process in which JAX has not started its backends yet.
    """
    if not any(name in environment for name in _MEMORY_VARIABLES):
        environment[_MEMORY_VARIABLES[0]] = "0.9"
    directory = cache_directory("autotuned")
    if directory is None:
        return
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _add_xla_flag(environment, _AUTOTUNE_CACHE, str(directory))


def exclude_nondeterministic_operations(environment: MutableMapping[str, str]) -> None:
    """Let XLA compile only operations for a GPU that give the same bits in every run, unless the environment says otherwise."""
    _add_xla_flag(environment, _DETERMINISTIC, "true")


def describe_gpu_settings(environment: Mapping[str, str]) -> str:
    """Return the settings in the environment as `NAME=value …`, those of the user included."""
    return " ".join(f"{name}={environment[name]}" for name in (*_MEMORY_VARIABLES, _XLA_FLAGS) if name in environment)


def _add_xla_flag(environment: MutableMapping[str, str], name: str, value: str) -> None:
    flags = environment.get(_XLA_FLAGS, "").split()
    if name not in [flag.partition("=")[0] for flag in flags]:
        environment[_XLA_FLAGS] = " ".join([*flags, f"{name}={value}"])
