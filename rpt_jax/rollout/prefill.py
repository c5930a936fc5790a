"""What is computed once for many rollouts: the prompts' keys, and the state that their first token is drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rpt_jax.model.attention.dispatch import Context, KeyValues
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.transformer import Layer, Params, Transformer, embed, rotary_angles
from rpt_jax.rollout.kv_cache import ROOT_BLOCK, Shared, block_size, in_blocks
from rpt_jax.rollout.prefix_sharing import Prompts


def prefill_prompts(
    policy: Transformer, params: Params, prompts: Prompts, samples: int, chunk: int
) -> tuple[tuple[Shared, ...], jax.Array]:
    """Run every root, and every prompt's tail behind its root, once.

    Args:
      samples: G rollouts of each prompt.
      chunk: the most tokens that are run at one time.

    Returns: what the P·G rollouts share: their prompts, or, where `prompts` tells each root's, roots and tails; and
    hidden_PxD, the state that predicts each prompt's first token.
    """
    roots = _run_roots(policy, params, prompts, chunk)
    if prompts.members_NxW is not None:
        tails, hidden_PxD = _run_tails(policy, params, prompts, roots, prompts.members_NxW)
        return (_of_roots(roots, prompts, samples), _of_each(tails, prompts.tail_lengths_P, samples)), hidden_PxD
    kv = roots if prompts.root_P is None else jax.tree.map(lambda x: x[:, prompts.root_P], roots)
    each_Px1 = jnp.arange(len(prompts.ids_P), dtype=jnp.int32)[:, None]
    tails, hidden_PxD = _run_tails(policy, params, prompts, kv, each_Px1)

    def behind(root: jax.Array, tail: jax.Array) -> jax.Array:
        index_PxS = jnp.arange(root.shape[4]) - prompts.ends_P[:, None]
        of_tail = jnp.take_along_axis(
            tail, jnp.clip(index_PxS, 0, tail.shape[4] - 1)[None, :, None, None, :, None], axis=4
        )
        return jnp.where((index_PxS < 0)[None, :, None, None, :, None], root, of_tail)

    return (_of_each(jax.tree.map(behind, kv, tails), prompts.lengths_P, samples),), hidden_PxD


def _run_tails(
    policy: Transformer, params: Params, prompts: Prompts, kv: KeyValues, members_NxW: jax.Array
) -> tuple[KeyValues, jax.Array]:
    """Run the tails of the prompts `members_NxW`, which begin with `kv` [L, N, K, 1, S, C], as branches of these.

    Returns: keys [L, P, K, 1, U, C], and hidden_PxD of each prompt's last token.
    """
    ends_NxWx1 = _of_members(prompts.ends_P, members_NxW)[..., None]
    positions_NxWxU = ends_NxWx1 + jnp.arange(prompts.tails_PxU.shape[1])
    context = Context(kv, end_NxGxQ=ends_NxWx1)
    tokens_NxWxU = _of_members(prompts.tails_PxU, members_NxW)
    hidden_NxWxUxD, tails = policy.apply({"params": params}, tokens_NxWxU, positions_NxWxU, (context,))
    place_P = _places(prompts, members_NxW)

    def of_prompts(x: jax.Array) -> jax.Array:
        layers, _, kv_heads, _, size, c = x.shape
        return x.swapaxes(2, 3).reshape(layers, -1, kv_heads, 1, size, c)[:, place_P]

    hidden_PxUxD = hidden_NxWxUxD.reshape(-1, *hidden_NxWxUxD.shape[2:])[place_P]
    last_Px1x1 = (prompts.tail_lengths_P - 1)[:, None, None]
    return jax.tree.map(of_prompts, tails), jnp.take_along_axis(hidden_PxUxD, last_Px1x1, axis=1)[:, 0]


def _of_members(x_P: jax.Array, members_NxW: jax.Array) -> jax.Array:
    """Give each member its own of `x_P` [P, …], and 0 where there is none."""
    return x_P.at[members_NxW].get(mode="fill", fill_value=0)


def _places(prompts: Prompts, members_NxW: jax.Array) -> jax.Array:
    """The index n·W + w of each prompt, int32 [P].

    Not by a scatter: where each prompt is its own only member, indices and values would be one array, on which XLA's compiler
    for TPUs stops.
    """
    each_Px1 = jnp.arange(len(prompts.ids_P), dtype=jnp.int32)[:, None]
    return jnp.argmax(members_NxW.reshape(-1) == each_Px1, axis=-1).astype(jnp.int32)


def _of_each(kv: KeyValues, lengths_P: jax.Array, samples: int) -> Shared:
    """What each prompt has for its own rollouts."""
    end_PxG = jnp.repeat(lengths_P[:, None], samples, axis=1)
    blocks = in_blocks(kv, block_size(target_platform(), kv.k.shape[4]))
    return Shared(blocks, end_PxG, jnp.arange(end_PxG.size, dtype=jnp.int32))


def _of_roots(kv: KeyValues, prompts: Prompts, samples: int) -> Shared:
    """What each root has for the rollouts of all of its prompts, of each as much as its prompt begins with."""
    end_NxW = _of_members(prompts.ends_P, prompts.members_NxW)
    place_PxG = _places(prompts, prompts.members_NxW)[:, None] * samples + jnp.arange(samples)
    blocks = in_blocks(kv, min(ROOT_BLOCK, kv.k.shape[4]))
    return Shared(blocks, jnp.repeat(end_NxW, samples, axis=1), place_PxG.reshape(-1))


@jax.named_scope("prefill_rows")
def _run_roots(policy: Transformer, params: Params, prompts: Prompts, chunk: int) -> KeyValues:
    """Keys [L, N, K, 1, S, C] of every root's tokens: as many tokens of as many roots at a time as `chunk` allows."""
    (n, length), shape = prompts.roots_NxS.shape, policy.config
    parts = -(-length // chunk)
    size = -(-length // parts)  # Even parts: what is left over would cost as much as a whole one.
    rows = min(n, max(1, chunk // size))
    tokens = jnp.pad(prompts.roots_NxS, ((0, -n % rows), (0, parts * size - length)))
    lengths_N = jnp.pad(prompts.lengths_N, (0, -n % rows))
    dims = (shape.layers, len(tokens), shape.kv_heads, 1, parts * size, shape.head_size)

    @jax.named_scope("prefill_chunks")
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
    shape = policy.config
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
