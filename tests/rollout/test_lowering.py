"""Rollouts compile for GPUs and TPUs as far as a CPU can tell: prompts, responses and heads of any size can be lowered."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo

from rpt_jax.distributed.mesh import MESH_AXES
from rpt_jax.model.transformer import Transformer
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.prefix_sharing import separate
from rpt_jax.rollout.rollouts import Decoding
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import SHAPE

PLATFORMS = {"gpu": ("NVIDIA H100 80GB HBM3", "cuda", "triton"), "tpu": ("TPU v5p", "tpu", "tpu_custom_call")}
# Tokens of a prompt and of a response, and the size of a head.
SIZES = [(48, 32, 12), (64, 64, 16), (40, 3, 16), (1, 2, 64), (64, 1, 16), (70, 66, 96), (5, 8, 16), (600, 40, 128)]


@pytest.mark.parametrize(("prompt", "response", "head_size"), mostly_slow(SIZES, *SIZES[:2], SIZES[3]))
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float32"], "bfloat16"))
def test_rollouts_lower_for_an_accelerator(monkeypatch, platform, prompt, response, head_size, dtype):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    kind, lowered_for, call = PLATFORMS[platform]
    shape = dataclasses.replace(SHAPE, head_size=head_size)
    policy = Transformer(shape, attention=f"{platform}_kernels", dtype=jnp.dtype(dtype))
    token = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), token, token)["params"]))
    prompts = separate(np.ones((3, prompt), np.int32), np.full(3, prompt, np.int32), np.arange(3, dtype=np.int32))
    decoding = Decoding(samples=4, max_new_tokens=response, temperature=1.0, stop_ids=(1,))
    device = jax.sharding.AbstractDevice(kind, num_cores=1 if platform == "tpu" else None, platform=platform)
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.sharding.AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        shapes = jax.eval_shape(lambda: (params, prompts, jax.random.key(0)))
        lowered = sample_rollouts.trace(policy, *shapes, decoding).lower(lowering_platforms=(lowered_for,))
    assert lowered.as_text().count(call) >= (1 if response == 1 else 2)
