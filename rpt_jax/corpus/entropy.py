"""How hard each position of a document is for a policy, and whether its direct guess is right."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.store import Records, ShardWriter, read_index, read_summary
from rpt_jax.corpus.tokenization import check_same, window_ends
from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.infra.fingerprint import digest
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import over_token_chunks, scaled_logits
from rpt_jax.tokenizers.tokenizer import Tokenizer

_SHORTEST = 64  # Tokens of the shortest bucket: shorter ones would save little and take a program each.
_GROUPS = 128  # In which the top_k_values logits are looked for; 64 and 256 take longer, but for small vocabularies.
_ROUNDS = 32  # So many at most are taken one after the other.
_BLOCK = 128  # Batches whose documents are sorted by length together.
BIN = 0.05  # Width of the histogram's bins, in nats.
BINS = 80  # Up to 4 nats; the last holds what is beyond.
NO_ENTROPY = -1.0  # In place of the entropy of a special token, which is no position to predict.


class Scores(NamedTuple):
    """Of one document with S tokens; entry i belongs to token i given those before it.

    Attributes:
      entropy_S: float32, nats, over the likeliest next tokens, renormalized among them.
      right_S: bool, no next token is likelier than the true one (the paper's standard next-token prediction).
      plain_entropy_S: float32, nats, the same tokens' share of the entropy, not renormalized.
    """

    entropy_S: np.ndarray
    right_S: np.ndarray
    plain_entropy_S: np.ndarray


def top_k_entropy(top_MxK: jax.Array, total_M: jax.Array | None = None) -> jax.Array:
    """Entropy in nats of the k likeliest next tokens, from their logits, [M] (paper, section 3.3).

    The paper takes k = 16 and does not say whether it renormalizes among them, which makes it an entropy. With `total_M`, the
    logsumexp of all logits, it is what these tokens contribute to the entropy over the whole vocabulary.
    """
    if total_M is None:
        total_M = jax.nn.logsumexp(top_MxK, axis=-1)
    logprobs_MxK = top_MxK - total_M[:, None]
    return -jnp.sum(jnp.exp(logprobs_MxK) * logprobs_MxK, axis=-1)


def top_k_values(values_MxV: jax.Array, k: int) -> jax.Array:
    """The k top_k_values values of each row, [M, k], in falling order.

    A few are taken one after the other, from all rows at once and without sorting, which a CPU does row by row on one core: the
    largest is at the head of one of the groups that a row is cut into, and what follows it there becomes the group's new head.
    """
    rows, size = values_MxV.shape
    if k > _ROUNDS:
        return jax.lax.top_k(values_MxV, k)[0]
    groups = min(_GROUPS, 2 ** math.ceil(math.log2(2 * math.sqrt(size))))
    padded = jnp.pad(values_MxV, ((0, 0), (0, -size % groups)), constant_values=-jnp.inf)
    grouped_MxGxS = padded.reshape(rows, groups, -1)
    places_Gx1 = jnp.arange(groups)[:, None]

    def take(state: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], jax.Array]:
        heads_GxM, last_M, last_place_M, equal_M = state
        value_M = heads_GxM.max(axis=0)
        place_M = jnp.where(heads_GxM == value_M, places_Gx1, groups - 1).min(axis=0)
        group_MxS = jnp.take_along_axis(grouped_MxGxS, place_M[:, None, None], axis=1, mode="promise_in_bounds")[:, 0]
        # Of equal values in one group, how many were taken: they follow each other.
        equal_M = jnp.where((value_M == last_M) & (place_M == last_place_M), equal_M, 0) + 1
        below_M = jnp.where(group_MxS < value_M[:, None], group_MxS, -jnp.inf).max(axis=1)
        head_M = jnp.where((group_MxS == value_M[:, None]).sum(axis=1) > equal_M, value_M, below_M)
        return (jnp.where(places_Gx1 == place_M, head_M, heads_GxM), value_M, place_M, equal_M), value_M

    none_M = jnp.full(rows, -1)
    start = (grouped_MxGxS.max(axis=2).T, jnp.full(rows, jnp.nan, values_MxV.dtype), none_M, none_M)
    return jax.lax.scan(take, start, None, length=k)[1].T


@functools.partial(jax.jit, static_argnames=("policy", "top_k", "chunk"))
def score_batch(
    policy: Transformer,
    params: Params,
    inputs_NxS: jax.Array,
    targets_NxS: jax.Array,
    lengths_N: jax.Array,
    *,
    top_k: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the leaves of `Scores`, [N, S] each, of `targets` given `inputs` up to the same place."""
    hidden_NxSxD, _, _ = prefill(policy, params, inputs_NxS, lengths_N)

    def score(hidden_MxD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits_MxV = scaled_logits(head(policy, params), hidden_MxD, 1.0)
        top_MxK = top_k_values(logits_MxV, top_k)
        right_M = jnp.take_along_axis(logits_MxV, targets_M[:, None], axis=-1)[:, 0] == top_MxK[:, 0]
        total_M = jax.nn.logsumexp(logits_MxV, axis=-1)
        return top_k_entropy(top_MxK), right_M, top_k_entropy(top_MxK, total_M)

    flat = hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1])
    leaves = over_token_chunks(score, chunk, flat, targets_NxS.reshape(-1))
    return tuple(leaf.reshape(inputs_NxS.shape) for leaf in leaves)


def score_documents(
    policy: Transformer,
    params: Params,
    documents: Sequence[Sequence[int]],
    *,
    bos_id: int,
    size: int,
    batch: int,
    top_k: int,
    chunk: int,
    mesh: Mesh,
    advance: Callable[[], None] = lambda: None,
) -> list[Scores]:
    """Score every position of every document.

    Args:
      documents: token ids, each at most `size` long.
      bos_id: begins every document, as in training.
      size: length of the longest. Documents are padded to it, or to a half, a quarter … of it that holds them.
      batch: [memory] documents of that length a forward pass; shorter ones go in batches of as many tokens.
      top_k, chunk: see `top_k_entropy` and `over_token_chunks`.
      mesh: over which a batch is split.
      advance: called after each batch.
    """
    scores: list[Any] = [None] * len(documents)
    waiting: list[tuple[list[int], Any]] = []  # What is computed while the host reads and writes.

    def collect(at_most: int) -> None:
        while len(waiting) > at_most:
            numbers, leaves = waiting.pop(0)
            leaves = to_host(leaves)
            for i, number in enumerate(numbers):
                scores[number] = Scores(*(leaf[i, : len(documents[number])] for leaf in leaves))
            advance()

    for length, numbers in _buckets(np.array([len(ids) for ids in documents]), size, batch):
        rows = next_token_rows([documents[n] for n in numbers], batch * (size // length), bos_id, length)
        leaves = score_batch(policy, params, *shard_prompts(rows, mesh), top_k=top_k, chunk=chunk)
        waiting.append((numbers, leaves))
        collect(at_most=1)
    collect(at_most=0)
    return scores


def next_token_rows(
    documents: Sequence[Sequence[int]], rows: int, bos_id: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs and targets of next-token prediction, int32 [rows, size], and lengths, of which an empty row has 1."""
    inputs, targets = np.zeros((2, rows, size), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, ids in enumerate(documents):
        inputs[i, 0], inputs[i, 1 : len(ids)], targets[i, : len(ids)] = bos_id, ids[:-1], ids
        lengths[i] = len(ids)
    return inputs, targets, lengths


def _buckets(lengths_N: np.ndarray, size: int, batch: int) -> Iterator[tuple[int, list[int]]]:
    """Yield batches as their padded length and the numbers of their documents."""
    padded_N, shorter = np.full(len(lengths_N), size), size
    while shorter % 2 == 0 and shorter // 2 >= _SHORTEST:
        shorter //= 2
        padded_N[lengths_N <= shorter] = shorter
    for padded in np.unique(padded_N).tolist():
        numbers, step = np.flatnonzero(padded_N == padded).tolist(), batch * (size // padded)
        yield from ((padded, numbers[i : i + step]) for i in range(0, len(numbers), step))


def score_shard(
    experiment: Experiment,
    policy: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    directory: Path,
    shard: int,
    shards: int,
    proxy: str,
    advance: Callable[[str], None],
) -> None:
    """Write the entropies of one shard that is tokenized, or leave those that are there.

    Of several processes all read and compute, and one writes.

    Args:
      proxy: `fingerprint_arrays` of `params`.
      advance: called with a few words after each of `forward_passes`.

    Raises: UserError, where those that are there are of other tokens, another proxy or another k.
    """
    tokens = Records(directory, "tokens", shards, [shard])
    made_from = {
        "tokens": digest(read_summary(directory, "tokens", shard, shards)),
        "proxy": proxy,
        "data.entropy_top_k": experiment.data.entropy_top_k,
    }
    if summary := read_summary(directory, "scores", shard, shards):
        check_same(directory, summary, made_from)
        return
    histogram, size = np.zeros(BINS, np.int64), _block_size(experiment)
    tell = functools.partial(advance, f"shard {shard} of {shards}")
    with ShardWriter(directory, "scores", shard, shards) if is_leader() else contextlib.nullcontext() as writer:
        for first in range(0, len(tokens), size):
            windows = tokens.read(range(first, min(first + size, len(tokens))))
            documents = [ids for ids, _ in windows]
            scores = score_part(experiment, policy, params, tokenizer, mesh, documents, tell)
            for (_, lengths_S), score in zip(windows, scores, strict=True):
                if writer:
                    writer.write(stored_entropies(score, lengths_S), [len(lengths_S)])
                bins = np.minimum(score.entropy_S[lengths_S > 0] / BIN, BINS - 1).astype(np.int64)
                histogram += np.bincount(bins, minlength=BINS)
        if writer:
            writer.commit({**made_from, "histogram": histogram.tolist()})


def stored_entropies(score: Scores, lengths_S: np.ndarray) -> tuple[np.ndarray, ...]:
    """What is kept of a document: both entropies, and `NO_ENTROPY` for tokens without bytes, which are special."""
    return tuple(np.where(lengths_S > 0, e, NO_ENTROPY) for e in (score.entropy_S, score.plain_entropy_S))


def forward_passes(experiment: Experiment, directory: Path, shard: int, shards: int) -> int:
    """How many a shard takes that is tokenized."""
    [rows] = read_index(directory, shards, [shard])
    longest, size = experiment.data.max_document_tokens, _block_size(experiment)
    lengths = np.diff(window_ends(rows["tokens"].astype(np.int64), longest), prepend=0)
    blocks = (lengths[first : first + size] for first in range(0, len(lengths), size))
    return sum(1 for block in blocks for _ in _buckets(block, longest, experiment.data.score_batch_windows))


def _block_size(experiment: Experiment) -> int:
    """Windows that are read, sorted by length and scored together."""
    return _BLOCK * experiment.data.score_batch_windows


def score_part(
    experiment: Experiment,
    policy: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    documents: Sequence[Sequence[int]],
    advance: Callable[[], None] = lambda: None,
) -> list[Scores]:
    """`score_documents` with the sizes of the config."""
    return score_documents(
        policy,
        params,
        documents,
        bos_id=tokenizer.bos_id,
        size=experiment.data.max_document_tokens,
        batch=experiment.data.score_batch_windows,
        top_k=experiment.data.entropy_top_k,
        chunk=experiment.training.logit_chunk_tokens,
        mesh=mesh,
        advance=advance,
    )


def keep_fraction(histogram_N: np.ndarray, threshold: float) -> float:
    """Share of positions above `threshold` nats, which must be a border between bins."""
    first = round(threshold / BIN)
    if not math.isclose(first * BIN, threshold):
        raise ValueError(threshold)
    return float(histogram_N[first:].sum() / max(1, histogram_N.sum()))
