"""Attention of new tokens over several sets of keys, with a choice of implementations per platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec

from rpt_jax.errors import UserError
from rpt_jax.model.attention.blocked_cache import (
    CacheReads,
    CacheSizes,
    attend_token,
)
from rpt_jax.model.attention.blockwise import BLOCK_SIZES, KeyBlock, attend_blockwise, masked_scores, weighted_sums
from rpt_jax.model.attention.cache_mosaic import attend_token_mosaic
from rpt_jax.model.attention.cache_triton import attend_token_triton
from rpt_jax.model.attention.kernels import attend_cudnn, attend_splash
from rpt_jax.model.attention.packed_mosaic import attend_mosaic
from rpt_jax.model.attention.packed_triton import attend_triton
from rpt_jax.model.attention.platform import target_platform


class Kernel(NamedTuple):
    """The kernel of an operation, and the dtypes that it computes in; plain XLA computes the others, block by block."""

    attend: Callable[..., jax.Array]
    dtypes: tuple[str, ...]


class CacheKernel(NamedTuple):
    """The implementation of attention of a decode step over the KV caches.

    Attributes:
      attend: computes attention, with the arguments of `attend_token`.
      dtypes: dtypes that it computes in; plain XLA computes the others.
      own_group_bytes, shared_group_bytes: limits of `CacheSizes.rollout_bytes`, for all rollouts of a group of rows, in the cache
        of the rollouts' own tokens and in shared caches; a group has at least one row. None if all rows visit blocks together.
      splits_rows: whether rows with more rollouts than a group may have are read in parts.
    """

    attend: Callable[..., jax.Array]
    dtypes: tuple[str, ...]
    own_group_bytes: int | None
    shared_group_bytes: int | None
    splits_rows: bool = False

    def max_own_rows(self, sizes: CacheSizes) -> int | None:
        """Return how many rows of the own tokens may form a group; None if all rows visit blocks together."""
        return None if self.own_group_bytes is None else max(1, self.own_group_bytes // sizes.rollout_bytes)

    def max_shared_rows(self, sizes: CacheSizes, width: int) -> int | None:
        """Return how many rows with `width` rollouts may form a group; None if all rows visit blocks together."""
        limit = self.shared_group_bytes
        return None if limit is None else max(1, limit // (width * sizes.rollout_bytes))

    def row_parts(self, sizes: CacheSizes, width: int) -> int:
        """Return in how many parts a row is read that `width` rollouts share."""
        if not self.splits_rows or self.shared_group_bytes is None:
            return 1
        return -(-width // max(1, self.shared_group_bytes // sizes.rollout_bytes))


class PlatformKernels(NamedTuple):
    """The attention kernels of a platform.

    Attributes:
      platform: "gpu" or "tpu".
      causal: of causal self-attention, as in prefill and pre-training: function of the queries, keys and values of `attend`.
      packed: of packed rows: function of the arguments of `packed_kernels.attend_by_kernels`.
      cache: of a decode step over a KV cache.
    """

    platform: str
    causal: Kernel
    packed: Kernel
    cache: CacheKernel


# By the name that `policy.attention` has for them. The table of docs/concepts/attention.md says the same.
KERNELS = {
    "gpu_kernels": PlatformKernels(
        platform="gpu",
        causal=Kernel(attend_cudnn, dtypes=("bfloat16",)),
        packed=Kernel(attend_triton, dtypes=("bfloat16", "float32")),
        # Every row is a group.
        cache=CacheKernel(attend_token_triton, dtypes=("bfloat16", "float32"), own_group_bytes=0, shared_group_bytes=0),
    ),
    "tpu_kernels": PlatformKernels(
        platform="tpu",
        causal=Kernel(attend_splash, dtypes=("bfloat16", "float32")),
        packed=Kernel(attend_mosaic, dtypes=("bfloat16", "float32")),
        # The results of a group stay in a core's memory. The groups of the own tokens are small, because the cores of a chip
        # share them. Those of shared caches are large, because the queries and results of a group are copied at once.
        cache=CacheKernel(
            attend_token_mosaic,
            dtypes=("bfloat16", "float32"),
            own_group_bytes=2**17,
            shared_group_bytes=2**20,
            splits_rows=True,
        ),
    ),
}
_BLOCKWISE_CACHE = CacheKernel(
    attend_token, dtypes=("bfloat16", "float32"), own_group_bytes=None, shared_group_bytes=None
)
# Up to this many pairs of a query and a key per head, all scores are computed at once, which is faster than blocks or kernels.
DENSE_PAIRS = 64 * 128


class KeyValues(NamedTuple):
    """Keys and values, after rotary position embedding, of S tokens per branch.

    Attributes:
      k, v: [N, K, G, S, C] for N prompts, K kv heads and G branches; G is 1 if the branches share them. They have a leading
        L axis where they stand for all layers.
    """

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """Keys and values, and the range of them that each query attends to.

    A range per query takes Q numbers, a mask Q·S; ranges suffice for prompts, caches and packed sequences.

    Attributes:
      kv: keys and values of S tokens.
      begin_NxGxQ: int32, first key of each query; N, G and Q may be 1. None: the first key.
      end_NxGxQ: int32, one past the last key of each query; N, G and Q may be 1. None: the keys are those of the query tokens
        themselves, and attention is causal.
    """

    kv: KeyValues
    begin_NxGxQ: jax.Array | None = None
    end_NxGxQ: jax.Array | None = None


# Function from the queries [N, K, G, R, Q, C] and the new keys and values of a layer to the attention output, shaped as the
# queries. Decoding passes one to a layer in place of contexts, to attend over a KV cache with another layout.
AttentionFn = Callable[[jax.Array, KeyValues], jax.Array]


def choose_attention(name: str, platform: str, is_known_chip: bool = True) -> str:
    """Return the implementation that `policy.attention` stands for.

    Args:
      name: value of `policy.attention`; "auto" stands for the platform's kernels on a known chip, and else for "blockwise".
      platform: "cpu", "gpu" or "tpu".
      is_known_chip: whether infra/chips.py lists the device. On others, nobody has compiled or run the kernels.

    Raises: UserError if the kernels are those of another platform.
    """
    available = next((name for name, kernels in KERNELS.items() if kernels.platform == platform), "blockwise")
    if name == "auto":
        return available if is_known_chip else "blockwise"
    if name in KERNELS and name != available:
        raise UserError(
            f"policy.attention='{name}' needs platform '{KERNELS[name].platform}', but the platform is '{platform}'. Use "
            f"'auto', which is '{available}' here.",
            field="policy.attention",
        )
    return name


def cache_kernel(attention: str, dtype: str) -> CacheKernel:
    """Return what computes attention over the KV caches.

    Args:
      attention: "reference", "blockwise" or one of `KERNELS`.
      dtype: of queries, keys and values.
    """
    kernel = KERNELS[attention].cache if attention in KERNELS else _BLOCKWISE_CACHE
    if dtype not in kernel.dtypes:
        return _BLOCKWISE_CACHE
    if kernel is _BLOCKWISE_CACHE or jax.sharding.get_abstract_mesh().empty:
        return kernel
    # Each device computes its own kv heads: XLA cannot partition a kernel.
    axes = logical_to_mesh_axes(("prompt", "kv_heads"))
    assert axes is not None and axes[0] is None  # A replica decodes its own prompts.
    whole = PartitionSpec()
    cache = CacheReads(blocks=PartitionSpec(None, None, *axes), grid=whole, ranges=whole)  # type: ignore[arg-type]

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        shared: tuple[CacheReads, ...],
        own: CacheReads,
        layer: jax.Array | int,
    ) -> jax.Array:
        in_specs = (axes, axes, axes, tuple(cache for _ in shared), cache, whole)
        on_devices = jax.shard_map(kernel.attend, in_specs=in_specs, out_specs=axes, check_vma=False)
        return on_devices(q, k, v, shared, own, jnp.asarray(layer))

    return kernel._replace(attend=attend)


def attend(q_NxKxGxRxQxC: jax.Array, contexts: Sequence[Context], attention: str = "reference") -> jax.Array:
    """Compute softmax attention over the union of `contexts`, without concatenating their keys.

    A context whose branch axis is 1 is read once for all G branches: the keys of a prompt are not repeated for its responses.
    The kernels compute only causal self-attention, as in prefill and pre-training. With more contexts, blockwise attention
    replaces them, because their gradients cannot be merged over contexts.

    Args:
      q_NxKxGxRxQxC: queries; R query heads share each of the K kv heads.
      contexts: keys and values; every query must attend to at least one key in one of them.
      attention: "reference", "blockwise" or one of `KERNELS`.

    Returns: [N, K, G, R, Q, C] in the dtype of the queries; scores and softmax are computed in float32.
    """
    # Use the platform's kernel where it applies.
    queries = q_NxKxGxRxQxC.shape[4]
    keys = sum(context.kv.k.shape[-2] for context in contexts)
    dense = attention == "reference" or queries * keys <= DENSE_PAIRS
    causal = len(contexts) == 1 and contexts[0].begin_NxGxQ is None and contexts[0].end_NxGxQ is None
    if attention in KERNELS and causal and not dense:
        kernel = KERNELS[attention].causal
        if q_NxKxGxRxQxC.dtype.name in kernel.dtypes:
            return kernel.attend(q_NxKxGxRxQxC, contexts[0].kv.k, contexts[0].kv.v)

    # Otherwise compute attention in plain XLA, with all scores at once or block by block.
    q = q_NxKxGxRxQxC * q_NxKxGxRxQxC.shape[-1] ** -0.5
    key_blocks = tuple(as_key_block(context, queries) for context in contexts)
    if dense:
        return _attend_dense(q, key_blocks)
    return attend_blockwise(q, key_blocks, BLOCK_SIZES[target_platform()])


def as_key_block(context: Context, queries: int) -> KeyBlock:
    """Return the context with an explicit range for each of its queries.

    Args:
      context: keys and values with ranges that may be implicit (None) or shared by all queries.
      queries: number of queries Q.
    """
    begin = context.begin_NxGxQ
    end = context.end_NxGxQ
    if begin is None:
        begin = jnp.zeros((1, 1, 1), jnp.int32)
    if end is None:
        end = jnp.arange(1, queries + 1, dtype=jnp.int32)[None, None]
    begin, end = (jnp.broadcast_to(x, (*x.shape[:2], queries)) for x in (begin, end))
    return KeyBlock(k=context.kv.k, v=context.kv.v, begin=begin, end=end)


def _attend_dense(q_NxKxGxRxQxC: jax.Array, key_blocks: tuple[KeyBlock, ...]) -> jax.Array:
    """Compute attention with all scores at once: the reference implementation, and the fastest for few queries."""
    scores = [masked_scores(q_NxKxGxRxQxC, block, jnp.arange(block.k.shape[3])) for block in key_blocks]
    peak = scores[0].max(-1, keepdims=True)
    for block_scores in scores[1:]:
        peak = jnp.maximum(peak, block_scores.max(-1, keepdims=True))
    # The softmax does not depend on the peak, so that its gradient need not be computed.
    peak = jax.lax.stop_gradient(peak)
    total = jnp.zeros((), jnp.float32)
    out = jnp.zeros((), jnp.float32)
    for block_scores, block in zip(scores, key_blocks, strict=True):
        weights = jnp.exp(block_scores - peak)
        total = total + weights.sum(-1, keepdims=True)
        out = out + weighted_sums(weights, block.v)
    return (out / total).astype(q_NxKxGxRxQxC.dtype)
