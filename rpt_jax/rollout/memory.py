"""What rollouts take in memory, by arithmetic, before any of it is taken."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig

_FLOAT32 = 4
# Of each token there may be: the id, its log-probability and the number it is drawn with.
_RESULTS = 3
# Logits of a slot exist several times over: as they are, as weights to draw from, and as a sum.
_LOGITS = 3
# As the live batch shrinks for the first time, the keys of three quarters of it are there twice, and then the values.
_SHRINKING = 1 + 3 / 8
# Share of a device's memory to plan with: compiled programs, fragments and the host's own data want the rest.
USABLE = 0.9


class RolloutMemory(NamedTuple):
    """Bytes a device: what the prompts and results take, and what each live rollout adds."""

    fixed: int
    per_slot: int

    def slots_within(self, available: int) -> int:
        """How many rollouts can be live in `available` bytes."""
        return max(0, (available - self.fixed) // self.per_slot)


def cache_bytes(shape: ModelConfig, dtype: str) -> int:
    """Bytes of one token's keys and values, in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * jnp.dtype(dtype).itemsize


def rollout_memory(
    shape: ModelConfig, dtype: str, prompts: int, prompt_tokens: int, samples: int, max_new_tokens: int, tensor: int
) -> RolloutMemory:
    """Plan for `prompts` of at most `prompt_tokens`, `samples` of each, on one of the `tensor` devices of a replica."""
    token = cache_bytes(shape, dtype) // tensor
    # While they are laid out in blocks, the prompts' keys are there twice.
    prompt_keys = 2 * prompts * prompt_tokens * token
    results = prompts * samples * max_new_tokens * _RESULTS * _FLOAT32
    own_keys = int(_SHRINKING * max_new_tokens * token)
    return RolloutMemory(prompt_keys + results, own_keys + _LOGITS * _FLOAT32 * shape.vocab // tensor)


def device_memory() -> int:
    """Bytes to plan with on each device: an accelerator's own, or its share of this machine's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return int(USABLE * statistics.get("bytes_limit", machine))


def plan_slots(asked: int, rollouts: int, memory: RolloutMemory, resident: int, available: int) -> int:
    """Return how many rollouts of a replica are live at once: those asked for or, for 0, as many as fit of all.

    Args:
      resident: bytes a device of all that is there besides: parameters, optimizer.
      available: bytes of a device.

    Raises: UserError, where they do not fit, with the numbers.
    """
    fitting = memory.slots_within(available - resident)
    wanted = min(asked, rollouts) if asked else min(rollouts, max(fitting, 1))
    if wanted > fitting:
        gib = {name: f"{size / 2**30:.2f} GiB" for name, size in memory._asdict().items()}
        raise UserError(
            f"rollout.decode_slots: {wanted} live rollouts take {gib['fixed']} for the prompts and {gib['per_slot']} each, "
            f"beside {resident / 2**30:.2f} GiB of parameters and optimizer: {available / 2**30:.2f} GiB of a device hold "
            f"{fitting}. Ask for fewer, or shorter prompts or responses, or split the policy further (mesh.fsdp, mesh.tensor)."
        )
    return wanted
