"""Assign documents to splits, so that what belongs together is on one side.

Splits are a function of `data.seed` and of the documents' contents: they do not change when files or lines are reordered, or
files renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import DUPLICATE, HELD_OUT_FRACTION, SPLITS, UNASSIGNED
from rpt_jax.corpus.mixture import parse_mixture, source_name
from rpt_jax.corpus.records import AUTO
from rpt_jax.corpus.text_splitting import CHUNK_CHARACTERS
from rpt_jax.errors import UserError


class DocumentTable(NamedTuple):
    """What the split depends on, for every document.

    Attributes:
      keys_D: uint64, the hash that `documents.Document.key` has under `data.seed`; those of a group are equal.
      texts_D: uint64, the hash of the text.
      splits_D: integers, the split that the source has assigned, else `UNASSIGNED`.
      parts_D: integers, the part of the mixture.
      places_D: integers, see `documents.Document.place`.
    """

    keys_D: np.ndarray
    texts_D: np.ndarray
    splits_D: np.ndarray
    parts_D: np.ndarray
    places_D: np.ndarray


def assign_splits(table: DocumentTable, config: DataConfig, first_rejected: Mapping[int, str]) -> np.ndarray:
    """Return the split of every document, int8 [D]: an index of `SPLITS`, or `DUPLICATE` for a repeated text.

    Of the documents without a split, whole groups are held out, those with the lowest keys first, until there are
    `data.held_out_documents`; never more than a fifth of any part of a mixture. A text that is longer than that is divided: its
    end is held out.

    Args:
      table: the documents.
      config: section `data`.
      first_rejected: description of the first rejected record of each part of the mixture, for error messages.

    Raises: UserError, if there are fewer than two documents, none in a part of the mixture, or if every group is too large.
    """
    # Of the documents with the same text, keep the one with the lowest key, whichever comes first.
    by_text_D = np.lexsort((table.keys_D, table.texts_D))
    is_first_D = np.diff(table.texts_D[by_text_D], prepend=np.uint64(0)) != 0
    is_first_D[:1] = True
    distinct_U = np.sort(by_text_D[is_first_D])
    result_D = np.full(len(table.texts_D), DUPLICATE, np.int8)
    result_D[distinct_U] = table.splits_D[distinct_U]
    unassigned_U = distinct_U[table.splits_D[distinct_U] == UNASSIGNED]
    if len(unassigned_U) < 2 and len(unassigned_U) == len(distinct_U):
        raise UserError(
            f"{source_name(config)} has {len(unassigned_U)} distinct document(s), and at least 2 are needed: one to train on and "
            f"one to hold out. {_rejected_sentence(first_rejected)}A .txt is split into documents of about {CHUNK_CHARACTERS} "
            "characters, a .jsonl has one document per line.",
            field=f"data.{'path' if config.source == 'path' else 'source'}",
        )

    # Hold out some of those that the source did not assign.
    if len(unassigned_U):
        result_D[unassigned_U] = SPLITS.index("train")
        held_out = _choose_held_out(DocumentTable(*(column[unassigned_U] for column in table)), config)
        result_D[unassigned_U[held_out]] = SPLITS.index("held_out")
    _check_parts(result_D, table.parts_D, config, first_rejected)
    return result_D


def _choose_held_out(table: DocumentTable, config: DataConfig) -> np.ndarray:
    """Return the numbers of the held-out documents. Raises: UserError, if every group is too large."""
    parts_P = np.bincount(table.parts_D)
    limit_P = (parts_P * HELD_OUT_FRACTION).astype(np.int64)
    if not limit_P.any():
        limit_P[parts_P.argmax()] = 1
    wanted = min(config.held_out_documents, int(limit_P.sum()))
    held_P = np.zeros_like(limit_P)
    chosen = []

    # Take whole groups as long as they fit.
    for group_G in _groups(table):
        if held_P.sum() >= wanted or (held_P == limit_P).all():
            break
        sizes_P = np.bincount(table.parts_D[group_G], minlength=len(parts_P))
        if (held_P + sizes_P <= limit_P).all():
            held_P += sizes_P
            chosen.append(group_G)

    # Where no group fits, take the end of a long text.
    for part in np.flatnonzero((held_P == 0) & (limit_P > 0)):
        count = min(int(limit_P[part]), int(np.ceil(wanted * parts_P[part] / parts_P.sum())))
        end_G = _end_of_long_text(table, int(part), int(limit_P[part]), count)
        if len(end_G):
            chosen.append(end_G)
    if not chosen:
        groups = len(np.unique(table.keys_D))
        raise UserError(
            f"{source_name(config)}: the {len(table.keys_D):,} documents form {groups:,} groups, each of which is more than "
            "a fifth of them, or of its part of a mixture, so that none can be held out. "
            f"data.group_by='{config.group_by}' must be a field with more values or '{AUTO}'.",
            field="data.group_by",
        )
    return np.concatenate(chosen)


def _groups(table: DocumentTable) -> Iterator[np.ndarray]:
    """Yield the documents of each group, in the order of their places; the groups in the order of their keys."""
    order_D = np.lexsort((table.places_D, table.keys_D))
    starts = np.flatnonzero(np.diff(table.keys_D[order_D]) != 0) + 1
    start = 0
    for end in starts:
        yield order_D[start:end]
        start = end
    yield order_D[start:]


def _end_of_long_text(table: DocumentTable, part: int, limit: int, count: int) -> np.ndarray:
    """Return the last `count` pieces of the first text of a part, if all groups of the part have more than `limit` documents."""
    of_part_M = np.flatnonzero(table.parts_D == part)
    keys, sizes = np.unique(table.keys_D[of_part_M], return_counts=True)
    if sizes.min() <= limit:
        return of_part_M[:0]
    is_text = table.places_D[of_part_M] >= 0
    first_key = min(keys[np.isin(keys, table.keys_D[of_part_M[is_text]])], default=None)
    group_G = of_part_M[is_text & (table.keys_D[of_part_M] == first_key)]
    return group_G[np.argsort(table.places_D[group_G], kind="stable")][-count:]


def _check_parts(
    split_D: np.ndarray, parts_D: np.ndarray, config: DataConfig, first_rejected: Mapping[int, str]
) -> None:
    """Check that there is something to train on in every part of the mixture. Raises: UserError."""
    if config.source != "path":
        return
    mixture = parse_mixture(config.path)
    trained_P = np.bincount(parts_D[split_D == SPLITS.index("train")], minlength=len(mixture))
    for part, (_, path) in enumerate(mixture):
        if trained_P[part]:
            continue
        of_part_D = split_D[parts_D == part]
        repeated = int((of_part_D == DUPLICATE).sum())
        rejected = {part: first_rejected[part]} if part in first_rejected else {}
        raise UserError(
            f"data.path: part '{path}' of the mixture has no document to train on: {len(of_part_D):,} were read, of which "
            f"{repeated:,} repeat others. {_rejected_sentence(rejected)}Fix it, or leave it out.",
            field="data.path",
        )


def _rejected_sentence(first_rejected: Mapping[int, str]) -> str:
    detail = first_rejected.get(min(first_rejected, default=0), "")
    end = "" if detail.endswith((".", "?")) else "."
    return f"The first rejected record: {detail}{end} " if detail else ""
