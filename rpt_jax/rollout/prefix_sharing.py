"""Prompts that begin alike, as positions of one document do: what they share is found here, to be run once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np


class Prompts(NamedTuple):
    """P prompts, each the beginning of one of N roots and a tail of its own, which holds its last token at least.

    Attributes:
      roots_NxS: int32 ids, padded on the right; lengths_N: int32, 0 for the rows behind the last root.
      root_P: int32, the root of each prompt, in order of the prompts' parts (see `share_prefixes`) each from 0; None: its own.
      ends_P: int32, how many tokens of its root a prompt begins with.
      tails_PxU: int32 ids after those, padded on the right; tail_lengths_P: int32, at least 1.
      ids_P: int32, tells prompts apart for the noise.
      members_NxW: int32, the prompts of each root, and the number of prompts of a part where there are fewer than W. None: each
        prompt is given a copy of what its root computed.
    """

    roots_NxS: jax.Array
    lengths_N: jax.Array
    root_P: jax.Array | None
    ends_P: jax.Array
    tails_PxU: jax.Array
    tail_lengths_P: jax.Array
    ids_P: jax.Array
    members_NxW: jax.Array | None = None

    @property
    def lengths_P(self) -> jax.Array:
        """Tokens of each prompt."""
        return self.ends_P + self.tail_lengths_P


def separate(prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray) -> Prompts:
    """Every prompt is its own root."""
    ends_P = (lengths_P - 1).astype(np.int32)
    last_Px1 = np.take_along_axis(prompts_PxS, ends_P[:, None], axis=1)
    return Prompts(prompts_PxS, ends_P, None, ends_P, last_Px1, np.ones_like(ends_P), ids_P)


def share_prefixes(
    prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray, tail: int = 0, parts: int = 1
) -> Prompts:
    """Find prompts that begin alike; what is left of each behind that is less than half of it.

    Args:
      prompts_PxS: int32 ids, padded on the right with anything; lengths_P: int32, at least 1; ids_P: int32.
      tail: the most tokens that may be left; every batch then has the same shapes, N = P and U = `tail`. 0: any number, and
        the shapes are as small as what is found.
      parts: so many equal parts of the prompts, one after the other, have nothing to do with each other: those of replicas.

    Returns: the prompts in their order; the roots of each part are as many rows.
    """
    prompts_PxS = np.where(np.arange(prompts_PxS.shape[1]) < lengths_P[:, None], prompts_PxS, -1).astype(np.int32)
    limits_P = np.minimum(np.maximum(lengths_P // 2, 1), tail or len(prompts_PxS[0]))
    # Itself, if nothing better is found: all of it but its last token.
    of_P, ends_P = np.arange(len(lengths_P)), lengths_P - 1
    for part in np.split(of_P.copy(), parts):
        for group in _runs(prompts_PxS, lengths_P, limits_P, part):
            root = max(group, key=lambda p: lengths_P[p])
            common = np.minimum(_common(prompts_PxS[root], prompts_PxS[group]), ends_P[group])
            near = lengths_P[group] - common <= limits_P[group]
            of_P[group[near]], ends_P[group[near]] = root, common[near]
    if not tail and len(set(of_P.tolist())) == len(of_P):
        return separate(np.maximum(prompts_PxS, 0), lengths_P, ids_P)
    return _as_prompts(prompts_PxS, lengths_P, ids_P, of_P, ends_P.astype(np.int32), tail, parts)


def _runs(prompts_PxS: np.ndarray, lengths_P: np.ndarray, limits_P: np.ndarray, part: np.ndarray) -> list[np.ndarray]:
    """Prompts of `part` of which each begins almost as the next one does."""
    # In any alphabetical order those that begin alike stand together: that of the bytes will do.
    order = np.array(sorted(part.tolist(), key=lambda p: prompts_PxS[p].tobytes()))
    a, b = order[:-1], order[1:]
    shorter = np.where(lengths_P[a] <= lengths_P[b], a, b)
    common = np.minimum(_common(prompts_PxS[a], prompts_PxS[b]), lengths_P[shorter])
    return np.split(order, np.flatnonzero(lengths_P[shorter] - common > limits_P[shorter]) + 1)


def _common(a_xS: np.ndarray, b_xS: np.ndarray) -> np.ndarray:
    """Number of tokens that both rows begin with; padding, -1, equals padding."""
    differs = a_xS != b_xS
    return np.where(differs.any(axis=-1), differs.argmax(axis=-1), differs.shape[-1])


def _as_prompts(
    prompts_PxS: np.ndarray,
    lengths_P: np.ndarray,
    ids_P: np.ndarray,
    of_P: np.ndarray,
    ends_P: np.ndarray,
    tail: int,
    parts: int,
) -> Prompts:
    """Lay out what was found: prompt `of_P` is the root of each, of which it begins with `ends_P` tokens."""
    found = [np.unique(part, return_inverse=True) for part in np.split(of_P, parts)]
    rows = len(of_P) // parts if tail else max(len(roots) for roots, _ in found)
    tail_lengths_P = (lengths_P - ends_P).astype(np.int32)
    # Powers of two, so that few lengths of tails have to be compiled for.
    size = tail or 1 << (int(tail_lengths_P.max()) - 1).bit_length()
    roots_NxS = np.zeros((parts * rows, prompts_PxS.shape[1]), np.int32)
    lengths_N = np.zeros(len(roots_NxS), np.int32)
    for part, (roots, _) in enumerate(found):
        here = slice(part * rows, part * rows + len(roots))
        roots_NxS[here] = np.maximum(prompts_PxS[roots], 0)
        lengths_N[here] = [ends_P[of_P == root].max() for root in roots]
    padded = np.pad(np.maximum(prompts_PxS, 0), ((0, 0), (0, size)))
    tails_PxU = np.take_along_axis(padded, ends_P[:, None] + np.arange(size), axis=1)
    root_P = np.concatenate([inverse for _, inverse in found]).astype(np.int32)
    members_NxW = None if tail else _members(root_P.reshape(parts, -1), rows)
    return Prompts(roots_NxS, lengths_N, root_P, ends_P, tails_PxU, tail_lengths_P, ids_P, members_NxW)


def _members(root_xP: np.ndarray, rows: int) -> np.ndarray | None:
    """The prompts of each root, for the parts x one after the other; None, where most of that would be empty."""
    parts, prompts = root_xP.shape
    counts_xN = np.stack([np.bincount(root_P, minlength=rows) for root_P in root_xP])
    width = counts_xN.max()
    if rows * width > 2 * prompts:
        return None
    members_NxW = np.full((parts * rows, width), prompts, np.int32)
    for part, (root_P, counts_N) in enumerate(zip(root_xP, counts_xN, strict=True)):
        order = np.argsort(root_P, kind="stable")
        turn = np.arange(prompts) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        members_NxW[part * rows + root_P[order], turn] = order
    return members_NxW
