"""Prefill of prompts, once for all their samples."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.dispatch import Context, KeyValues
from rpt_jax.model.transformer import Layer, Params, Transformer, embed, rotary_angles
from rpt_jax.rollout.kv_cache import SharedCache, cache_layout, to_blocks
from rpt_jax.rollout.prefix_sharing import Array, Prompts


@jax.named_scope("prefill")
def prefill_prompts(
    policy: Transformer, params: Params, prompts: Prompts, samples: int, prefill_tokens: int
) -> tuple[tuple[SharedCache, ...], jax.Array]:
    """Run every root, and every prompt's tail after its root, once.

    Args:
      policy: the decoder.
      params: its parameters.
      prompts: roots and tails.
      samples: G, rollouts per prompt.
      prefill_tokens: maximum number of tokens that are run at once.

    Returns:
      The caches that the P·G rollouts share: one of whole prompts or, if `prompts.members_NxW` is given, one of roots
      and one of tails. And hidden_PxD, the state that predicts each prompt's first response token.
    """
    roots = _run_roots(policy, params, prompts, prefill_tokens)

    # Attention over roots and tails in separate caches, so that the keys of a root are read once for all of its
    # prompts.
    if prompts.members_NxW is not None:
        tails, hidden_PxD = _run_tails(policy, params, prompts, roots, prompts.members_NxW)
        caches = _root_cache(roots, prompts, samples), _prompt_cache(tails, prompts.tail_lengths_P, samples)
        return caches, hidden_PxD

    # One cache of whole prompts: each tail is appended to the prompt's part of its root.
    kv = roots if prompts.root_P is None else jax.tree.map(lambda x: x[:, prompts.root_P], roots)
    each_Px1 = jnp.arange(len(prompts.ids_P), dtype=jnp.int32)[:, None]
    tails, hidden_PxD = _run_tails(policy, params, prompts, kv, each_Px1)

    def append_tail(root: jax.Array, tail: jax.Array) -> jax.Array:
        index_PxS = jnp.arange(root.shape[4]) - prompts.ends_P[:, None]
        clipped_PxS = jnp.clip(index_PxS, 0, tail.shape[4] - 1)
        tail = jnp.take_along_axis(tail, clipped_PxS[None, :, None, None, :, None], axis=4)
        return jnp.where((index_PxS < 0)[None, :, None, None, :, None], root, tail)

    cache = _prompt_cache(jax.tree.map(append_tail, kv, tails), prompts.lengths_P, samples)
    return (cache,), hidden_PxD


@jax.named_scope("prefill_rows")
def _run_roots(policy: Transformer, params: Params, prompts: Prompts, prefill_tokens: int) -> KeyValues:
    """Return keys and values [L, N, K, 1, S, C] of every root, computed for at most `prefill_tokens` tokens at once."""
    n, length = prompts.roots_NxS.shape
    config = policy.config
    # Chunks of equal size: a short last chunk would cost as much as a full one.
    chunks = -(-length // prefill_tokens)
    size = -(-length // chunks)
    rows = min(n, max(1, prefill_tokens // size))
    tokens = jnp.pad(prompts.roots_NxS, ((0, -n % rows), (0, chunks * size - length)))
    lengths_N = jnp.pad(prompts.lengths_N, (0, -n % rows))
    dims = (config.layers, len(tokens), config.kv_heads, 1, chunks * size, config.head_size)

    @jax.named_scope("prefill_chunks")
    def run_rows(i: jax.Array, kv: KeyValues) -> KeyValues:
        row_lengths = jax.lax.dynamic_slice_in_dim(lengths_N, i * rows, rows)
        return jax.lax.fori_loop(0, -(-row_lengths.max() // size), lambda j, kv: run_chunk(i * rows, j * size, kv), kv)

    def run_chunk(row: jax.Array, first: jax.Array, kv: KeyValues) -> KeyValues:
        chunk = jax.lax.dynamic_slice(tokens, (row, first), (rows, size))[:, None]
        earlier = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, rows, axis=1), kv)
        contexts = (Context(earlier, end_NxGxQ=jnp.full((1, 1, 1), first)),) if chunks > 1 else ()
        new = _keys_and_values(policy, params, chunk, first, contexts)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, (0, row, 0, 0, first, 0)), kv, new)

    # Rows without a root come last and are skipped.
    last_root = jnp.max(jnp.where(prompts.lengths_N > 0, jnp.arange(1, n + 1), 0))
    kv = KeyValues(jnp.zeros(dims, policy.dtype), jnp.zeros(dims, policy.dtype))
    kv = jax.lax.fori_loop(0, -(-last_root // rows), run_rows, kv)
    return jax.tree.map(lambda x: x[:, :n, :, :, :length], kv)


def _keys_and_values(
    policy: Transformer, params: Params, tokens_NxGxQ: jax.Array, first: jax.Array, contexts: tuple[Context, ...]
) -> KeyValues:
    """Return keys and values of tokens at positions `first` and after in all layers.

    The last layer computes nothing else, since its output is not needed.
    """
    config = policy.config
    positions = jnp.broadcast_to(first + jnp.arange(tokens_NxGxQ.shape[-1]), tokens_NxGxQ.shape)
    rotary = rotary_angles(positions, config.head_size, config.rope_base, config.rope_scaling)
    layer = Layer(config=config, dtype=policy.dtype, attention=policy.attention, lora=policy.lora)
    ranges = (*((context.begin_NxGxQ, context.end_NxGxQ) for context in contexts), (None, None))

    def run(x_NxGxQxD: jax.Array, index: jax.Array | int) -> tuple[jax.Array, KeyValues]:
        # Indexed layer by layer: a stack without its last layer would be a copy.
        weights, *kvs = jax.tree.map(lambda x: x[index], (params["layers"], *(context.kv for context in contexts)))
        output = layer.apply({"params": weights}, x_NxGxQxD, tuple(kvs), ranges, rotary)
        return cast(tuple[jax.Array, KeyValues], output)

    last = config.layers - 1
    x_NxGxQxD, earlier_layers = jax.lax.scan(run, embed(params, tokens_NxGxQ, policy.dtype), jnp.arange(last))
    _, last_layer = run(x_NxGxQxD, last)
    return jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), earlier_layers, last_layer)


def _run_tails(
    policy: Transformer, params: Params, prompts: Prompts, kv: KeyValues, members_NxW: Array
) -> tuple[KeyValues, jax.Array]:
    """Run the tails of the prompts `members_NxW` as branches of the contexts `kv` [L, N, K, 1, S, C].

    Returns: keys and values [L, P, K, 1, U, C], and hidden_PxD of each prompt's last token.
    """
    ends_NxWx1 = _take_members(prompts.ends_P, members_NxW)[..., None]
    positions_NxWxU = ends_NxWx1 + jnp.arange(prompts.tails_PxU.shape[1])
    context = Context(kv, end_NxGxQ=ends_NxWx1)
    tokens_NxWxU = _take_members(prompts.tails_PxU, members_NxW)
    hidden_NxWxUxD, tails = policy.apply({"params": params}, tokens_NxWxU, positions_NxWxU, (context,))

    # From the grid of members back to the order of the prompts.
    index_P = _member_index(prompts, members_NxW)

    def of_prompts(x: jax.Array) -> jax.Array:
        layers, _, kv_heads, _, size, c = x.shape
        return x.swapaxes(2, 3).reshape(layers, -1, kv_heads, 1, size, c)[:, index_P]

    hidden_PxUxD = hidden_NxWxUxD.reshape(-1, *hidden_NxWxUxD.shape[2:])[index_P]
    last_Px1x1 = (prompts.tail_lengths_P - 1)[:, None, None]
    return jax.tree.map(of_prompts, tails), jnp.take_along_axis(hidden_PxUxD, last_Px1x1, axis=1)[:, 0]


def _take_members(x_P: Array, members_NxW: Array) -> jax.Array:
    """Return `x_P` [P, …] of each member, [N, W, …], and 0 for an empty entry."""
    return x_P.at[members_NxW].get(mode="fill", fill_value=0)


def _member_index(prompts: Prompts, members_NxW: Array) -> jax.Array:
    """Return the index n·W + w of each prompt in the grid of members, int32 [P].

    This is not a scatter, because the TPU compiler fails on one whose indices and values are the same array, as they
    are if each prompt is the only member of its row.
    """
    each_Px1 = jnp.arange(len(prompts.ids_P), dtype=jnp.int32)[:, None]
    return jnp.argmax(members_NxW.reshape(-1) == each_Px1, axis=-1).astype(jnp.int32)


def _prompt_cache(kv: KeyValues, lengths_P: Array, samples: int) -> SharedCache:
    """Return the cache with a row per prompt, which its samples share."""
    end_PxG = jnp.repeat(lengths_P[:, None], samples, axis=1)
    layout = cache_layout()
    blocks = to_blocks(kv, layout.block_size(layout.prompt_block, kv.k.shape[4]), layout.order)
    return SharedCache(blocks=blocks, end_NxW=end_PxG, index_R=jnp.arange(end_PxG.size, dtype=jnp.int32))


def _root_cache(kv: KeyValues, prompts: Prompts, samples: int) -> SharedCache:
    """Return the cache with a row per root, which the samples of all of its prompts share."""
    end_NxW = _take_members(prompts.ends_P, prompts.members_NxW)
    index_PxG = _member_index(prompts, prompts.members_NxW)[:, None] * samples + jnp.arange(samples)
    layout = cache_layout()
    blocks = to_blocks(kv, layout.block_size(layout.root_block, kv.k.shape[4]), layout.order)
    return SharedCache(blocks=blocks, end_NxW=jnp.repeat(end_NxW, samples, axis=1), index_R=index_PxG.reshape(-1))
