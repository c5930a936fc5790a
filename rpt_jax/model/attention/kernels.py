"""Causal self-attention with platform kernels: cuDNN on GPUs, splash attention on TPUs.

Both take queries [N, K, G, R, Q, C], keys and values [N, K, G, Q, C], and return [N, K, G, R, Q, C] in the dtype of the
queries. Padding on the right is harmless, because no earlier query attends to it.
"""

from __future__ import annotations

from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from rpt_jax.model.attention.blockwise import ATTENTION_RESULT

# Block sizes of the splash kernel, in order of preference. The length is padded to a multiple of the smallest, and the largest
# size that divides it is the fastest. Larger blocks of float32 do not fit in the memory of a v5p's core.
SPLASH_BLOCKS = {"bfloat16": (1024, 512, 256, 128), "float32": (512, 256, 128)}
# One kernel for all gradients computes five products for each pair of blocks, two kernels compute seven. It writes a gradient
# of the queries for each block of keys, which are then summed: up to this many take too little memory to matter.
SPLASH_FUSED_BLOCKS = 8


def attend_cudnn(
    q_NxKxGxRxQxC: jax.Array,
    k_NxKxGxQxC: jax.Array,
    v_NxKxGxQxC: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Compute causal attention with cuDNN's fused kernel.

    Args:
      q_NxKxGxRxQxC, k_NxKxGxQxC, v_NxKxGxQxC: unscaled queries, keys and values.
      implementation: "cudnn", or "xla" for the same call without cuDNN.

    Returns: [N, K, G, R, Q, C] in the dtype of the queries.
    """
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
    """Compute causal attention with the splash kernel.

    XLA cannot partition a kernel, so it runs under `shard_map`: each device computes its own prompts and kv heads.

    Args:
      q_NxKxGxRxQxC, k_NxKxGxQxC, v_NxKxGxQxC: unscaled queries, keys and values.
      interpret: run the kernel in interpret mode, without a TPU.

    Returns: [N, K, G, R, Q, C] in the dtype of the queries.
    """

    def attend_local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q_BxRxQxC, k_BxQxC, v_BxQxC = (x.reshape(-1, *x.shape[3:]) for x in (q * q.shape[-1] ** -0.5, k, v))
        kernel = _splash_kernel(q.dtype.name, heads=q.shape[3], length=q.shape[4], interpret=interpret)
        # Without residuals, the kernel returns only the output.
        out = cast(jax.Array, jax.vmap(kernel)(q_BxRxQxC, k_BxQxC, v_BxQxC))
        return out.reshape(q.shape)

    # Pad the length to whole blocks.
    length = q_NxKxGxRxQxC.shape[4]
    padding = -length % SPLASH_BLOCKS[q_NxKxGxRxQxC.dtype.name][-1]
    q, k, v = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]) for x in (q_NxKxGxRxQxC, k_NxKxGxQxC, v_NxKxGxQxC)
    )
    if not jax.sharding.get_abstract_mesh().empty:
        axes = logical_to_mesh_axes(("prompt", "kv_heads"))
        # check_vma is off, because the kernel does not declare over which mesh axes its outputs vary.
        attend_local = jax.shard_map(attend_local, in_specs=axes, out_specs=axes, check_vma=False)
    return attend_local(q, k, v)[..., :length, :]


def _splash_kernel(dtype: str, heads: int, length: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Build the kernel for `heads` query heads that share a kv head; `length` must be a multiple of the smallest block."""
    block = next(b for b in SPLASH_BLOCKS[dtype] if length % b == 0)
    fused = length // block <= SPLASH_FUSED_BLOCKS
    block_sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    return splash.make_splash_mqa_single_device(
        mask=splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads),
        block_sizes=block_sizes,
        residual_checkpoint_name=ATTENTION_RESULT,
        interpret=interpret,
    )
