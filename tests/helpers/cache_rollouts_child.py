"""Rollouts with the kernels for the KV cache in interpret mode: `python -m tests.helpers.cache_rollouts_child`.

Fails unless they equal rollouts in plain XLA, on one device and on eight simulated ones, whose number is fixed when JAX starts.
Ended rollouts are found as often as on the platform of the kernels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.model.attention.dispatch import KERNELS
from rpt_jax.model.transformer import Transformer
from rpt_jax.rollout import sampling
from rpt_jax.rollout.engine import STEPS_PER_CHECK
from rpt_jax.rollout.generate import generate
from rpt_jax.rollout.kv_cache import CACHE_LAYOUTS
from rpt_jax.rollout.rollouts import Rollouts
from tests.helpers.cached_rows import INTERPRETED
from tests.helpers.policy_reference import POLICY, SHAPE, random_params
from tests.helpers.rollouts import STOPS, TEMPERATURE, assert_same

P, G, S, T = 8, 4, 40, 24
SLOTS = 12  # Fewer than rollouts, so that slots are refilled.


def sample(policy: Transformer, steps_per_check: int) -> Rollouts:
    """Return rollouts of prompts at four positions of each of two documents."""
    rng = np.random.default_rng(0)
    documents = rng.integers(0, SHAPE.vocab, (2, S))
    prompts = np.repeat(documents, 4, axis=0).astype(np.int32)
    lengths = np.tile([12, 20, 33, 40], 2).astype(np.int32)
    return jax.device_get(
        generate(
            policy,
            random_params(POLICY, 0),
            prompts,
            lengths,
            np.arange(P, dtype=np.int32),
            jax.random.key(5),
            samples=G,
            max_new_tokens=T,
            temperature=TEMPERATURE,
            stop_ids=STOPS,
            slots=SLOTS,
            steps_per_check=steps_per_check,
        )
    )


def main() -> None:
    """Compare."""
    expected = sample(POLICY, steps_per_check=1)
    sampling.sum_blocks = functools.partial(sampling.sum_blocks, interpret=True)
    sampling.read_blocks = functools.partial(sampling.read_blocks, interpret=True)
    for name, kernel in INTERPRETED.items():
        KERNELS[name] = KERNELS[name]._replace(cache=kernel)
        policy = dataclasses.replace(POLICY, attention=name)
        # Sampling, too, is that of the kernel's platform.
        platform = KERNELS[name].platform
        sampling.target_platform = lambda platform=platform: platform
        steps = STEPS_PER_CHECK[platform]
        CACHE_LAYOUTS["cpu"] = CACHE_LAYOUTS[platform]._replace(own_block=16, prompt_block=16, root_block=16)
        assert_same(sample(policy, steps), expected)
        # Prompts over four replicas, kv heads over the two devices of each.
        with use_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
            assert_same(sample(policy, steps), expected)


if __name__ == "__main__":
    main()
