"""Causal self-attention by the platforms' kernels: cuDNN on GPUs, splash attention on TPUs.

Both take queries [N, K, G, R, Q, C], keys and values [N, K, G, Q, C], and return [N, K, G, R, Q, C] in the dtype of the
queries. Padding on the right is harmless: no earlier query sees it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from rpt_jax.model.attention.blockwise import RESULT

# Largest first: the kernel's time is spent in whole blocks, and it takes only lengths that these divide.
_SPLASH_BLOCKS = (512, 256, 128)


def attend_cudnn(
    q_NxKxGxRxQxC: jax.Array, k_NxKxGxQxC: jax.Array, v_NxKxGxQxC: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """cuDNN's fused attention; `implementation` "xla" is JAX's reading of the same call, for machines without cuDNN."""
    n, kv_heads, g, r, length, c = q_NxKxGxRxQxC.shape
    q_BxQxHxC = q_NxKxGxRxQxC.transpose(0, 2, 4, 1, 3, 5).reshape(n * g, length, kv_heads * r, c)
    k_BxQxKxC, v_BxQxKxC = (
        x.transpose(0, 2, 3, 1, 4).reshape(n * g, length, kv_heads, c) for x in (k_NxKxGxQxC, v_NxKxGxQxC)
    )
    out = jax.nn.dot_product_attention(q_BxQxHxC, k_BxQxKxC, v_BxQxKxC, is_causal=True, implementation=implementation)
    return out.reshape(n, g, length, kv_heads, r, c).transpose(0, 3, 1, 4, 2, 5)


def attend_splash(
    q_NxKxGxRxQxC: jax.Array, k_NxKxGxQxC: jax.Array, v_NxKxGxQxC: jax.Array, interpret: bool = False
) -> jax.Array:
    """Splash attention; `interpret` runs the kernel without a TPU.

    XLA cannot split a kernel over devices: each runs its own prompts and kv heads, as the logical axes say.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q_BxRxQxC, k_BxQxC, v_BxQxC = (x.reshape(-1, *x.shape[3:]) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(_splash_kernel(*q_BxRxQxC.shape[1:3], interpret))(q_BxRxQxC, k_BxQxC, v_BxQxC).reshape(q.shape)

    length = q_NxKxGxRxQxC.shape[4]
    padding = -length % _SPLASH_BLOCKS[-1]
    q, k, v = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]) for x in (q_NxKxGxRxQxC, k_NxKxGxQxC, v_NxKxGxQxC)
    )
    if not jax.sharding.get_abstract_mesh().empty:
        axes = nn.logical_to_mesh_axes(("prompt", "kv_heads"))
        # Off, because the kernel does not say over which axes its outputs vary.
        local = jax.shard_map(local, in_specs=axes, out_specs=axes, check_vma=False)
    return local(q, k, v)[..., :length, :]


def _splash_kernel(heads: int, length: int, interpret: bool) -> splash.SplashAttentionKernel:
    block = next(b for b in _SPLASH_BLOCKS if length % b == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.make_splash_mqa_single_device(
        mask=splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        residual_checkpoint_name=RESULT,
        interpret=interpret,
    )
