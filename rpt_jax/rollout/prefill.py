"""What is computed once for many rollouts: the prompts' keys, and the state that their first token is drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rpt_jax.policy.attention import Context, KeyValues
from rpt_jax.policy.prefixes import Prompts
from rpt_jax.policy.transformer import Layer, Params, Transformer, embed, rotary_angles


def prefill_prompts(policy: Transformer, params: Params, prompts: Prompts, chunk: int) -> tuple[KeyValues, jax.Array]:
    """Run every root, and every prompt's tail behind its root, once.

    Args:
      chunk: the most tokens that are run at one time.

    Returns: the prompts' keys [L, P, K, 1, S, C], and hidden_PxD, the state that predicts each prompt's first token.
    """
    kv = _run_roots(policy, params, prompts, chunk)
    if prompts.root_P is not None:
        kv = jax.tree.map(lambda x: x[:, prompts.root_P], kv)
    ends_Px1, size = prompts.ends_P[:, None], prompts.tails_PxU.shape[1]
    context = Context(kv, end_NxGxQ=ends_Px1[..., None])
    positions = (ends_Px1 + jnp.arange(size))[:, None]
    hidden, tails = policy.apply({"params": params}, prompts.tails_PxU[:, None], positions, (context,))
    last = (prompts.tail_lengths_P - 1)[:, None, None]

    def behind(root: jax.Array, tail: jax.Array) -> jax.Array:
        index_PxS = jnp.arange(root.shape[4]) - ends_Px1
        of_tail = jnp.take_along_axis(tail, jnp.clip(index_PxS, 0, size - 1)[None, :, None, None, :, None], axis=4)
        return jnp.where((index_PxS < 0)[None, :, None, None, :, None], root, of_tail)

    return jax.tree.map(behind, kv, tails), jnp.take_along_axis(hidden[:, 0], last, axis=1)[:, 0]


def _run_roots(policy: Transformer, params: Params, prompts: Prompts, chunk: int) -> KeyValues:
    """Keys [L, N, K, 1, S, C] of every root's tokens: as many tokens of as many roots at a time as `chunk` allows."""
    (n, length), shape = prompts.roots_NxS.shape, policy.shape
    parts = -(-length // chunk)
    size = -(-length // parts)  # Even parts: what is left over would cost as much as a whole one.
    rows = min(n, max(1, chunk // size))
    tokens = jnp.pad(prompts.roots_NxS, ((0, -n % rows), (0, parts * size - length)))
    lengths_N = jnp.pad(prompts.lengths_N, (0, -n % rows))
    dims = (shape.layers, len(tokens), shape.kv_heads, 1, parts * size, shape.head_size)

    def run_rows(i: jax.Array, kv: KeyValues) -> KeyValues:
        ours = jax.lax.dynamic_slice_in_dim(lengths_N, i * rows, rows)
        return jax.lax.fori_loop(0, -(-ours.max() // size), lambda j, kv: run(i * rows, j * size, kv), kv)

    def run(row: jax.Array, first: jax.Array, kv: KeyValues) -> KeyValues:
        part = jax.lax.dynamic_slice(tokens, (row, first), (rows, size))[:, None]
        earlier = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, rows, axis=1), kv)
        contexts = (Context(earlier, end_NxGxQ=jnp.full((1, 1, 1), first)),) if parts > 1 else ()
        new = _keys_of(policy, params, part, first, contexts)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, (0, row, 0, 0, first, 0)), kv, new)

    # Roots lie in front: behind the last one there is nothing to run.
    filled = -(-jnp.max(jnp.where(prompts.lengths_N > 0, jnp.arange(1, n + 1), 0)) // rows)
    kv = KeyValues(jnp.zeros(dims, policy.dtype), jnp.zeros(dims, policy.dtype))
    kv = jax.lax.fori_loop(0, filled, run_rows, kv)
    return jax.tree.map(lambda x: x[:, :n, :, :, :length], kv)


def _keys_of(
    policy: Transformer, params: Params, tokens_NxGxQ: jax.Array, first: jax.Array, contexts: tuple[Context, ...]
) -> KeyValues:
    """Keys of tokens from position `first` on, in all layers. The last layer computes nothing else: no state is asked for."""
    shape = policy.shape
    positions = jnp.broadcast_to(first + jnp.arange(tokens_NxGxQ.shape[-1]), tokens_NxGxQ.shape)
    rotary = rotary_angles(positions, shape.head_size, shape.rope_base, shape.rope_scaling)
    layer = Layer(shape, policy.dtype, policy.attention)
    ranges = (*((context.begin_NxGxQ, context.end_NxGxQ) for context in contexts), (None, None))

    def run(x_NxGxQxD: jax.Array, index: jax.Array | int) -> tuple[jax.Array, KeyValues]:
        # One layer at a time out of the stack: a stack without its last layer would be a copy of it.
        weights, *kvs = jax.tree.map(lambda x: x[index], (params["layers"], *(context.kv for context in contexts)))
        return layer.apply({"params": weights}, x_NxGxQxD, tuple(kvs), ranges, rotary)

    last = shape.layers - 1
    x_NxGxQxD, news = jax.lax.scan(run, embed(params, tokens_NxGxQ, policy.dtype), jnp.arange(last))
    _, new = run(x_NxGxQxD, last)
    return jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), news, new)
