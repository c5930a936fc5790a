"""What is computed once for many rollouts: the prompts' keys, and the state that their first token is drawn from."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.policy.attention import Context, KeyValues
from rpt_jax.policy.transformer import Params, Transformer
from rpt_jax.rollout.kv_cache import Shared, in_blocks

# Prompts that begin alike for less than this share of the shorter one are prefilled apart.
_ALIKE = 0.75
_TAIL_MULTIPLE = 16  # So that few lengths of tails have to be compiled for.


class Prompts(NamedTuple):
    """P = N·J prompts as N roots with J prompts on each: what a root and a prompt have in common is prefilled once.

    Attributes:
      roots_NxS: int32 ids, padded on the right; lengths_N: int32.
      ends_NxJ: int32, how many tokens of its root a prompt begins with.
      tails_NxJxU: int32 ids after those, padded on the right; tail_lengths_NxJ: int32.
      ids_NxJ: int32, tells prompts apart for the noise; -1 where there is no prompt.
    """

    roots_NxS: jax.Array
    lengths_N: jax.Array
    ends_NxJ: jax.Array
    tails_NxJxU: jax.Array
    tail_lengths_NxJ: jax.Array
    ids_NxJ: jax.Array

    @property
    def lengths_NxJ(self) -> jax.Array:
        """Tokens of each prompt."""
        return self.ends_NxJ + self.tail_lengths_NxJ


def separate(prompts_PxS: jax.Array, lengths_P: jax.Array, ids_P: jax.Array) -> Prompts:
    """Every prompt is its own root."""
    size = len(lengths_P)
    tails = np.zeros((size, 1, 0), np.int32), np.zeros((size, 1), np.int32)
    return Prompts(prompts_PxS, lengths_P, lengths_P[:, None], *tails, ids_P[:, None])


def share_prefixes(prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray) -> tuple[Prompts, np.ndarray]:
    """Find prompts that begin alike, such as positions of one document.

    Returns: the prompts, and the index n·J + j under which each of the P is found. Their shapes depend on what is found.
    """
    prompts_PxS = np.where(np.arange(prompts_PxS.shape[1]) < lengths_P[:, None], prompts_PxS, -1)
    # In alphabetical order the prefixes of a text stand before it, and no other text between them.
    order = np.lexsort(prompts_PxS.T[::-1])
    groups: list[list[int]] = [[order[0]]]
    for previous, p in zip(order, order[1:], strict=False):
        alike = _common(prompts_PxS[previous], prompts_PxS[p]) >= _ALIKE * min(lengths_P[previous], lengths_P[p])
        groups[-1].append(p) if alike else groups.append([p])
    return _as_prompts(prompts_PxS, lengths_P, ids_P, groups)


def _as_prompts(
    prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray, groups: list[list[int]]
) -> tuple[Prompts, np.ndarray]:
    n, j = len(groups), max(map(len, groups))
    roots = np.array([max(group, key=lambda p: lengths_P[p]) for group in groups])
    index_P = np.empty(len(lengths_P), np.int32)
    ends, ids = np.ones((n, j), np.int32), np.full((n, j), -1, np.int32)
    tails: dict[tuple[int, int], np.ndarray] = {}
    for row, (root, group) in enumerate(zip(roots, groups, strict=True)):
        for column, p in enumerate(group):
            end = min(_common(prompts_PxS[root], prompts_PxS[p]), lengths_P[p])
            index_P[p], ends[row, column], ids[row, column] = row * j + column, end, ids_P[p]
            tails[row, column] = prompts_PxS[p, end : lengths_P[p]]
    longest = max(map(len, tails.values()))
    tails_NxJxU = np.zeros((n, j, -(-longest // _TAIL_MULTIPLE) * _TAIL_MULTIPLE), np.int32)
    tail_lengths = np.zeros((n, j), np.int32)
    for place, tail in tails.items():
        tails_NxJxU[*place, : len(tail)], tail_lengths[place] = tail, len(tail)
    roots_NxS = np.maximum(prompts_PxS[roots], 0).astype(np.int32)
    return Prompts(roots_NxS, lengths_P[roots].astype(np.int32), ends, tails_NxJxU, tail_lengths, ids), index_P


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that both begin with; padding, -1, equals padding."""
    differs = a != b
    return int(differs.argmax()) if differs.any() else len(a)


def prefill_prompts(
    policy: Transformer, params: Params, prompts: Prompts, samples: int, chunk: int, block: int
) -> tuple[tuple[Shared, ...], KeyValues, jax.Array]:
    """Run every root, and every prompt's tail behind its root, once.

    Args:
      chunk: tokens of a root that are run at one time.
      block: keys of a block of the caches.

    Returns: what the rollouts share (each row for J·G or G rollouts), the roots' keys [L, N, K, 1, S, C], and hidden_NxJxD,
      the state that predicts each prompt's first token.
    """
    n, j = prompts.ends_NxJ.shape
    kv, hidden_NxJxD = _prefill_roots(policy, params, prompts, chunk)
    shared = [Shared(in_blocks(kv, block), jnp.repeat(prompts.ends_NxJ, samples, axis=1))]
    if size := prompts.tails_NxJxU.shape[-1]:
        positions = prompts.ends_NxJ[..., None] + jnp.arange(size)
        context = Context(kv, end_NxGxQ=prompts.ends_NxJ[..., None])
        hidden, tails = policy.apply({"params": params}, prompts.tails_NxJxU, positions, (context,))
        last = jnp.take_along_axis(hidden, jnp.maximum(prompts.tail_lengths_NxJ - 1, 0)[..., None, None], axis=2)
        hidden_NxJxD = jnp.where(prompts.tail_lengths_NxJ[..., None] > 0, last[:, :, 0], hidden_NxJxD)
        ends = jnp.broadcast_to(prompts.tail_lengths_NxJ.reshape(-1, 1), (n * j, samples))
        shared.append(Shared(in_blocks(tails, min(block, size)), ends))
    return tuple(shared), kv, hidden_NxJxD


def _prefill_roots(policy: Transformer, params: Params, prompts: Prompts, chunk: int) -> tuple[KeyValues, jax.Array]:
    """Keys of every root token, and the state of the last one of each prompt's part of its root."""
    (n, length), j, shape = prompts.roots_NxS.shape, prompts.ends_NxJ.shape[1], policy.shape
    chunk = -(-length // -(-length // chunk))  # Even parts: what is left over would cost as much as a whole one.
    tokens = jnp.pad(prompts.roots_NxS, ((0, 0), (0, -length % chunk)))
    dims = (shape.layers, n, shape.kv_heads, 1, tokens.shape[1], shape.head_size)
    room = KeyValues(jnp.zeros(dims, policy.dtype), jnp.zeros(dims, policy.dtype))
    last_NxJ = prompts.ends_NxJ - 1

    def run(first: jax.Array | int, kv: KeyValues, hidden_NxJxD: jax.Array) -> tuple[KeyValues, jax.Array]:
        part = jax.lax.dynamic_slice_in_dim(tokens, first, chunk, axis=1)[:, None]
        positions = jnp.broadcast_to(first + jnp.arange(chunk), part.shape)
        earlier = (Context(kv, end_NxGxQ=jnp.full((1, 1, 1), first)),) if chunk < length else ()
        hidden, new = policy.apply({"params": params}, part, positions, earlier)
        kv = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=4), kv, new)
        inside = jnp.clip(last_NxJ - first, 0, chunk - 1)[..., None]
        here = (first <= last_NxJ) & (last_NxJ < first + chunk)
        states = jnp.take_along_axis(hidden[:, 0], inside, axis=1)
        return kv, jnp.where(here[..., None], states, hidden_NxJxD)

    start = room, jnp.zeros((n, j, shape.width), policy.dtype)
    if chunk == length:
        return run(0, *start)
    chunks = -(-prompts.lengths_N.max() // chunk)
    return jax.lax.fori_loop(0, chunks, lambda i, carry: run(i * chunk, *carry), start)
