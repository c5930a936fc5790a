"""Estimates of the memory that rollouts take, and how many can be decoded at once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.errors import UserError
from rpt_jax.model.gpu import fill_side
from rpt_jax.model.model_config import ModelConfig

# Fraction of a device's memory to plan with. The rest is for compiled programs, fragmentation and the host's data.
USABLE = 0.9

_CGROUP = Path("/sys/fs/cgroup")
_FLOAT32 = 4
# Arrays with an entry per possible token: ids, log-probabilities and noise.
_TOKEN_ARRAYS = 3
# Copies of a slot's logits: logits, and temporaries of sampling on platforms that fuse less than the CPU.
_LOGIT_COPIES = 3


class RolloutMemory(NamedTuple):
    """Memory of rollouts in bytes per device.

    Attributes:
      fixed: prompts and results.
      per_slot: each rollout that is decoded at once.
    """

    fixed: int
    per_slot: int

    def slots_within(self, available: int) -> int:
        """Return how many rollouts can be decoded at once in `available` bytes."""
        return max(0, (available - self.fixed) // self.per_slot)


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of one token's keys and values in all layers, for the compute dtype `dtype`."""
    return 2 * config.layers * config.kv_heads * config.head_size * jnp.dtype(dtype).itemsize


def rollout_memory(
    config: ModelConfig,
    dtype: str,
    *,
    prompts: int,
    prompt_tokens: int,
    samples: int,
    max_new_tokens: int,
    tensor: int,
) -> RolloutMemory:
    """Estimate the memory of rollouts.

    Args:
      config: of the policy.
      dtype: compute dtype of the policy.
      prompts: prompts per replica.
      prompt_tokens: maximum prompt length.
      samples: rollouts per prompt.
      max_new_tokens: length limit of responses.
      tensor: devices per replica.
    """
    # A cache on an accelerator pads heads of other sizes than powers of two.
    token = cache_bytes(config, dtype) // config.head_size * fill_side(config.head_size) // tensor
    # While the keys of the prompts are copied into blocks, they exist three times: as computed, transposed, and in blocks.
    prompt_cache = 3 * prompts * prompt_tokens * token
    results = prompts * samples * max_new_tokens * _TOKEN_ARRAYS * _FLOAT32
    logits = _LOGIT_COPIES * _FLOAT32 * config.vocab // tensor
    return RolloutMemory(fixed=prompt_cache + results, per_slot=max_new_tokens * token + logits)


def device_memory() -> int:
    """Return the bytes to plan with on each device: an accelerator's memory, or an equal part of the machine's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return int(USABLE * statistics.get("bytes_limit", machine_memory() // jax.local_device_count()))


def machine_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of the machine's memory, or of the container's if `cgroup` limits it (version 2 or 1)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # No such file, or "max".
            limits.append(int((cgroup / name).read_text()))
    return min(limits)


def plan_slots(requested: int, rollouts: int, memory: RolloutMemory, resident: int, available: int) -> int:
    """Return how many rollouts a replica decodes at once: the requested number or, for 0, as many as fit.

    Args:
      requested: slots per replica; 0 for as many as fit.
      rollouts: rollouts per replica.
      memory: of the rollouts.
      resident: bytes per device of everything else, such as parameters and optimizer state.
      available: bytes per device.

    Raises: UserError, if they do not fit.
    """
    fitting = memory.slots_within(available - resident)
    slots = min(requested, rollouts) if requested else min(rollouts, max(fitting, 1))
    if slots > fitting:
        gib = {name: f"{size / 2**30:.2f} GiB" for name, size in memory._asdict().items()}
        raise UserError(
            f"rollout.decode_slots: {slots} rollouts at once need {gib['fixed']} for the prompts and "
            f"{gib['per_slot']} each, in addition to {resident / 2**30:.2f} GiB of parameters and optimizer state; "
            f"{available / 2**30:.2f} GiB per device hold {fitting}. Use fewer slots, shorter prompts or responses, or "
            "more devices: mesh.rollout_tensor splits the policy and the slots, mesh.fsdp the optimizer state.",
            field="rollout.decode_slots",
        )
    return slots
