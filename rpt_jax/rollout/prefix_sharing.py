"""Detection of prompts with a common prefix, such as positions of one document, to prefill it once."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = Any  # np.ndarray on the host, jax.Array inside a program.


class Prompts(NamedTuple):
    """P prompts, each a prefix of one of N roots followed by a tail, which contains at least its last token.

    Attributes:
      roots_NxS: int32 ids, padded on the right.
      lengths_N: int32 root lengths; 0 for rows without a root, which come last.
      root_P: int32 root of each prompt, numbered from 0 in each part (see `share_prefixes`). None: prompt p has root p.
      ends_P: int32 number of tokens of its root that a prompt starts with.
      tails_PxU: int32 ids after these, padded on the right.
      tail_lengths_P: int32, at least 1.
      ids_P: int32 prompt ids, which determine the sampling noise.
      members_NxW: int32 prompts of each root; the number of prompts per part marks an empty entry. None: each prompt
        gets a copy of its root's keys and values.
    """

    roots_NxS: Array
    lengths_N: Array
    root_P: Array | None
    ends_P: Array
    tails_PxU: Array
    tail_lengths_P: Array
    ids_P: Array
    members_NxW: Array | None = None

    @property
    def lengths_P(self) -> Array:
        """Number of tokens of each prompt."""
        return self.ends_P + self.tail_lengths_P


def separate(prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray) -> Prompts:
    """Return prompts without any sharing: each is its own root."""
    ends_P = (lengths_P - 1).astype(np.int32)
    return Prompts(
        roots_NxS=prompts_PxS,
        lengths_N=ends_P,
        root_P=None,
        ends_P=ends_P,
        tails_PxU=np.take_along_axis(prompts_PxS, ends_P[:, None], axis=1),
        tail_lengths_P=np.ones_like(ends_P),
        ids_P=ids_P,
    )


def share_prefixes(
    prompts_PxS: np.ndarray, lengths_P: np.ndarray, ids_P: np.ndarray, tail: int = 0, parts: int = 1
) -> Prompts:
    """Find prompts with a common prefix. A prompt shares a root only if its tail is at most half of the prompt.

    Args:
      prompts_PxS: int32 ids, padded on the right with any ids.
      lengths_P: int32 prompt lengths, at least 1.
      ids_P: int32 prompt ids.
      tail: maximum tail length. Every batch then has the same shapes, N = P and U = `tail`. If 0, tails have any length
        and the shapes depend on the prompts.
      parts: number of equal consecutive parts of the batch, one per replica. Prompts of different parts do not share
        roots.

    Returns: the prompts in the given order, with the same number of root rows in each part.
    """
    # Padding becomes -1, which no token equals.
    prompts_PxS = np.where(np.arange(prompts_PxS.shape[1]) < lengths_P[:, None], prompts_PxS, -1).astype(np.int32)
    max_tail_P = np.minimum(np.maximum(lengths_P // 2, 1), tail or len(prompts_PxS[0]))

    # Start with each prompt as its own root: all of it but the last token.
    root_prompt_P = np.arange(len(lengths_P))
    ends_P = lengths_P - 1
    for part in np.split(root_prompt_P.copy(), parts):
        for group in _similar_groups(prompts_PxS, lengths_P, max_tail_P, part):
            root = max(group, key=lambda p: lengths_P[p])
            common = np.minimum(_common_prefix(prompts_PxS[root], prompts_PxS[group]), ends_P[group])
            shares = lengths_P[group] - common <= max_tail_P[group]
            root_prompt_P[group[shares]] = root
            ends_P[group[shares]] = common[shares]
    if not tail and len(set(root_prompt_P.tolist())) == len(root_prompt_P):
        return separate(np.maximum(prompts_PxS, 0), lengths_P, ids_P)
    return _build_prompts(prompts_PxS, lengths_P, ids_P, root_prompt_P, ends_P.astype(np.int32), tail, parts)


def _similar_groups(
    prompts_PxS: np.ndarray, lengths_P: np.ndarray, max_tail_P: np.ndarray, part: np.ndarray
) -> list[np.ndarray]:
    """Split the prompts of `part` into groups, in each of which neighbors have almost the same prefix."""
    # In lexicographic order prompts with a common prefix are neighbors. The order of the bytes is one.
    order = np.array(sorted(part.tolist(), key=lambda p: prompts_PxS[p].tobytes()))
    a = order[:-1]
    b = order[1:]
    shorter = np.where(lengths_P[a] <= lengths_P[b], a, b)
    common = np.minimum(_common_prefix(prompts_PxS[a], prompts_PxS[b]), lengths_P[shorter])
    return np.split(order, np.flatnonzero(lengths_P[shorter] - common > max_tail_P[shorter]) + 1)


def _common_prefix(a_xS: np.ndarray, b_xS: np.ndarray) -> np.ndarray:
    """Return the length of the common prefix of rows; padding, -1, equals padding."""
    differs = a_xS != b_xS
    return np.where(differs.any(axis=-1), differs.argmax(axis=-1), differs.shape[-1])


def _build_prompts(
    prompts_PxS: np.ndarray,
    lengths_P: np.ndarray,
    ids_P: np.ndarray,
    root_prompt_P: np.ndarray,
    ends_P: np.ndarray,
    tail: int,
    parts: int,
) -> Prompts:
    """Build the arrays of `Prompts`, given the prompt that is each prompt's root and how many tokens they share."""
    # Roots: the same number of rows in each part, those without a root last.
    numbered = [np.unique(part, return_inverse=True) for part in np.split(root_prompt_P, parts)]
    rows = len(root_prompt_P) // parts if tail else max(len(roots) for roots, _ in numbered)
    roots_NxS = np.zeros((parts * rows, prompts_PxS.shape[1]), np.int32)
    lengths_N = np.zeros(len(roots_NxS), np.int32)
    for part, (roots, _) in enumerate(numbered):
        part_rows = slice(part * rows, part * rows + len(roots))
        roots_NxS[part_rows] = np.maximum(prompts_PxS[roots], 0)
        lengths_N[part_rows] = [ends_P[root_prompt_P == root].max() for root in roots]
    root_P = np.concatenate([inverse for _, inverse in numbered]).astype(np.int32)

    # Tails. A power of two as their length bounds the number of shapes to compile for.
    tail_lengths_P = (lengths_P - ends_P).astype(np.int32)
    size = tail or 1 << (int(tail_lengths_P.max()) - 1).bit_length()
    padded = np.pad(np.maximum(prompts_PxS, 0), ((0, 0), (0, size)))
    return Prompts(
        roots_NxS=roots_NxS,
        lengths_N=lengths_N,
        root_P=root_P,
        ends_P=ends_P,
        tails_PxU=np.take_along_axis(padded, ends_P[:, None] + np.arange(size), axis=1),
        tail_lengths_P=tail_lengths_P,
        ids_P=ids_P,
        members_NxW=None if tail else _members(root_P.reshape(parts, -1), rows),
    )


def _members(root_xP: np.ndarray, rows: int) -> np.ndarray | None:
    """Return the prompts of each root, the parts one after the other, or None if most of that array would be empty."""
    parts, prompts = root_xP.shape
    counts_xN = np.stack([np.bincount(root_P, minlength=rows) for root_P in root_xP])
    width = counts_xN.max()
    if rows * width > 2 * prompts:
        return None
    members_NxW = np.full((parts * rows, width), prompts, np.int32)
    for part, (root_P, counts_N) in enumerate(zip(root_xP, counts_xN, strict=True)):
        order = np.argsort(root_P, kind="stable")
        column = np.arange(prompts) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        members_NxW[part * rows + root_P[order], column] = order
    return members_NxW
