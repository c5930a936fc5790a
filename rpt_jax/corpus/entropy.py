"""Score a corpus with a policy: the next-token entropy of every position, and whether the policy's top guess is right."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.store import Records, ShardWriter, read_index, read_summary
from rpt_jax.corpus.tokenization import check_made_from, window_ends
from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.infra.console import Progress
from rpt_jax.infra.digest import digest
from rpt_jax.infra.fingerprint import fingerprint_arrays
from rpt_jax.infra.out_of_memory import explain_out_of_memory
from rpt_jax.model.flops import causal_pairs, forward_flops
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.logprobs import over_token_chunks, scaled_logits
from rpt_jax.tokenizers.tokenizer import Tokenizer

BLOCK_BATCHES = 128  # Windows are read, and sorted by length, in blocks of this many batches.
BIN_NATS = 0.05  # Width of the bins of the entropy histogram.
BINS = 80  # Covers 0 to 4 nats; the last bin also counts everything above.
NO_ENTROPY = -1.0  # In place of the entropy of a special token, which is never predicted.
_MIN_BUCKET_TOKENS = 64  # Shorter buckets would save little time, and each compiles another program.
_GROUPS = 128  # Groups that `top_k_values` divides a row into; 64 and 256 are slower, except for small vocabularies.
_MAX_SELECTED = 32  # For a larger k, `top_k_values` uses `jax.lax.top_k`.

TokenIds = Sequence[int] | np.ndarray


class Scores(NamedTuple):
    """Scores of one window of S tokens; element i belongs to the prediction of token i from those before it.

    Attributes:
      entropy_S: float32, nats; entropy over the k most likely next tokens, renormalized (paper, section 3.3).
      top1_correct_S: bool; no next token is more likely than the true one (the paper's standard next-token prediction).
      partial_entropy_S: float32, nats; what the same k tokens contribute to the entropy over the whole vocabulary.
    """

    entropy_S: np.ndarray
    top1_correct_S: np.ndarray
    partial_entropy_S: np.ndarray


# --- entropies of a batch -----------------------------------------------------------------------------


def top_k_entropy(top_MxK: jax.Array, total_M: jax.Array | None = None) -> jax.Array:
    """Return the entropy over the k most likely next tokens in nats, float32 [M] (paper, section 3.3).

    The paper uses k = 16 and does not say whether the k probabilities are renormalized; without `total_M` they are.

    Args:
      top_MxK: the k largest logits.
      total_M: logsumexp of all logits; if given, the result is the contribution of the k tokens to the full entropy.
    """
    if total_M is None:
        total_M = jax.nn.logsumexp(top_MxK, axis=-1)
    logprobs_MxK = top_MxK - total_M[:, None]
    return -jnp.sum(jnp.exp(logprobs_MxK) * logprobs_MxK, axis=-1)


def top_k_values(values_MxV: jax.Array, k: int) -> jax.Array:
    """Return the k largest values of each row in descending order, [M, k] in the dtype of the values.

    On a CPU, `jax.lax.top_k` sorts row by row on one core. A small k is faster by selection: each row is divided into groups
    whose maxima are known, the largest maximum is taken, and the maximum of its group is replaced by the next value there.

    Args:
      values_MxV: floats.
      k: at most V.
    """
    rows, size = values_MxV.shape
    if k > _MAX_SELECTED:
        return jax.lax.top_k(values_MxV, k)[0]

    # Divide each row into groups: for a small vocabulary, about twice the square root of its size.
    groups = min(_GROUPS, 2 ** math.ceil(math.log2(2 * math.sqrt(size))))
    padded = jnp.pad(values_MxV, ((0, 0), (0, -size % groups)), constant_values=-jnp.inf)
    grouped_MxGxS = padded.reshape(rows, groups, -1)
    index_Gx1 = jnp.arange(groups)[:, None]

    def select(state: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], jax.Array]:
        max_GxM, last_value_M, last_group_M, taken_M = state
        # The first group that has the largest value.
        value_M = max_GxM.max(axis=0)
        group_M = jnp.where(max_GxM == value_M, index_Gx1, groups - 1).min(axis=0)
        values_MxS = jnp.take_along_axis(grouped_MxGxS, group_M[:, None, None], axis=1, mode="promise_in_bounds")[:, 0]
        # How many equal values of this group have been taken; they are taken one after another.
        taken_M = jnp.where((value_M == last_value_M) & (group_M == last_group_M), taken_M, 0) + 1
        below_M = jnp.where(values_MxS < value_M[:, None], values_MxS, -jnp.inf).max(axis=1)
        next_M = jnp.where((values_MxS == value_M[:, None]).sum(axis=1) > taken_M, value_M, below_M)
        max_GxM = jnp.where(index_Gx1 == group_M, next_M, max_GxM)
        return (max_GxM, value_M, group_M, taken_M), value_M

    # Take k values, one a step. No value is equal to the initial NaN.
    no_group_M = jnp.full(rows, -1)
    start = (grouped_MxGxS.max(axis=2).T, jnp.full(rows, jnp.nan, values_MxV.dtype), no_group_M, no_group_M)
    return jax.lax.scan(select, start, None, length=k)[1].T


@functools.partial(jax.jit, static_argnames=("policy", "top_k", "logit_chunk_tokens"))
@jax.named_scope("score")
@in_policy_precision
def score_batch(
    policy: Transformer,
    params: Params,
    inputs_NxS: jax.Array,
    targets_NxS: jax.Array,
    lengths_N: jax.Array,
    *,
    top_k: int,
    logit_chunk_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the fields of `Scores`, [N, S] each, for a batch as `next_token_rows` makes it.

    Args:
      policy: the decoder.
      params: its parameters.
      inputs_NxS, targets_NxS: int32 token ids.
      lengths_N: int32, tokens of each row.
      top_k: number of next tokens that entropies are computed over.
      logit_chunk_tokens: tokens whose logits are in memory at the same time.
    """
    hidden_NxSxD, _, _ = prefill(policy, params, inputs_NxS, lengths_N)

    def score(hidden_MxD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits_MxV = scaled_logits(head(policy, params), hidden_MxD, 1.0)
        top_MxK = top_k_values(logits_MxV, top_k)
        correct_M = jnp.take_along_axis(logits_MxV, targets_M[:, None], axis=-1)[:, 0] == top_MxK[:, 0]
        total_M = jax.nn.logsumexp(logits_MxV, axis=-1)
        return top_k_entropy(top_MxK), correct_M, top_k_entropy(top_MxK, total_M)

    flat = hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1])
    entropy, correct, partial_entropy = over_token_chunks(score, logit_chunk_tokens, flat, targets_NxS.reshape(-1))
    shape = inputs_NxS.shape
    return entropy.reshape(shape), correct.reshape(shape), partial_entropy.reshape(shape)


def next_token_rows(
    windows: Sequence[TokenIds], rows: int, bos_id: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad windows to a batch for next-token prediction.

    Args:
      windows: token ids, at most `rows` windows of 1 to `size` tokens.
      rows: number of rows of the batch.
      bos_id: prepended to every window, as in training.
      size: tokens of a row.

    Returns: inputs and targets, int32 [rows, size], and lengths, int32 [rows]; an unused row has length 1.
    """
    inputs = np.zeros((rows, size), np.int32)
    targets = np.zeros((rows, size), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, ids in enumerate(windows):
        inputs[i, 0] = bos_id
        inputs[i, 1 : len(ids)] = ids[:-1]
        targets[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return inputs, targets, lengths


def length_buckets(lengths_N: np.ndarray, max_tokens: int, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Group windows of similar length into batches of the same number of tokens, padding included.

    Windows are padded to `max_tokens` or to a half, a quarter, … of it, down to 64.

    Args:
      lengths_N: tokens of each window.
      max_tokens: length of the longest bucket.
      batch_size: windows of that length in a batch; shorter buckets have proportionally more.

    Yields: the padded length of a batch and the indices of its windows; batches of short windows come first.
    """
    padded_N = np.full(len(lengths_N), max_tokens)
    shorter = max_tokens
    while shorter % 2 == 0 and shorter // 2 >= _MIN_BUCKET_TOKENS:
        shorter //= 2
        padded_N[lengths_N <= shorter] = shorter
    for padded in np.unique(padded_N).tolist():
        numbers = np.flatnonzero(padded_N == padded).tolist()
        step = batch_size * (max_tokens // padded)
        yield from ((padded, numbers[i : i + step]) for i in range(0, len(numbers), step))


# --- windows and shards -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores windows with a policy.

    Attributes:
      policy: the policy.
      params: its parameters, on `mesh`.
      tokenizer: the policy's.
      mesh: a batch is split over it.
      config: `data.max_document_tokens`, `data.score_batch_windows`, `data.entropy_top_k` and `training.logit_chunk_tokens` set
        the sizes.
    """

    policy: Transformer
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh
    config: Experiment

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the parameters."""
        return fingerprint_arrays(self.params)

    def score(self, windows: Sequence[TokenIds], advance: Callable[[], None] = lambda: None) -> list[Scores]:
        """Score every position of every window.

        Args:
          windows: token ids, 1 to `data.max_document_tokens` each.
          advance: called after each batch.

        Returns: the scores of each window, in the order of `windows`.
        """
        data = self.config.data
        scores: list[Any] = [None] * len(windows)
        # Batches that the devices compute while the host prepares the next batch and copies the results of the previous one.
        in_flight: collections.deque[tuple[list[int], tuple[jax.Array, ...]]] = collections.deque()

        def fetch_oldest() -> None:
            numbers, arrays = in_flight.popleft()
            entropy_NxS, correct_NxS, partial_entropy_NxS = to_host(arrays)
            for i, number in enumerate(numbers):
                length = len(windows[number])
                scores[number] = Scores(
                    entropy_S=entropy_NxS[i, :length],
                    top1_correct_S=correct_NxS[i, :length],
                    partial_entropy_S=partial_entropy_NxS[i, :length],
                )
            advance()

        # Launch the batches, with at most one more in flight while the results of a batch are fetched.
        lengths_N = np.array([len(ids) for ids in windows])
        memory_fields = {
            "data.score_batch_windows": data.score_batch_windows,
            "training.logit_chunk_tokens": self.config.training.logit_chunk_tokens,
        }
        with explain_out_of_memory("scoring", memory_fields):
            for length, numbers in length_buckets(lengths_N, data.max_document_tokens, data.score_batch_windows):
                row_count = data.score_batch_windows * (data.max_document_tokens // length)
                rows = next_token_rows([windows[n] for n in numbers], row_count, self.tokenizer.bos_id, length)
                arrays = score_batch(
                    self.policy,
                    self.params,
                    *shard_prompts(rows, self.mesh),
                    top_k=data.entropy_top_k,
                    logit_chunk_tokens=self.config.training.logit_chunk_tokens,
                )
                in_flight.append((numbers, arrays))
                if len(in_flight) > 1:
                    fetch_oldest()

            while in_flight:
                fetch_oldest()
        return scores

    def score_with_progress(self, windows: Sequence[TokenIds]) -> list[Scores]:
        """Score as `score` does, with a progress bar."""
        batches = self._count_batches(np.array([len(ids) for ids in windows]))
        with Progress("score, batches of windows", batches, transient=True) as progress:
            return self.score(windows, progress.advance)

    def score_shard(self, directory: Path, shard: int, shards: int, advance: Callable[[str], None]) -> None:
        """Write the entropies of a tokenized shard, unless they are already complete.

        All processes read and compute; the leader writes.

        Args:
          directory: of the corpus.
          shard, shards: number of the shard, and how many there are.
          advance: called with a short status after each of the `count_batches` batches.

        Raises: UserError, if complete entropies belong to other tokens, another policy or another k.
        """
        # Skip a complete shard, but refuse one that was made from something else.
        tokens = Records(directory, "tokens", shards, [shard])
        made_from = {
            "tokens": digest(read_summary(directory, "tokens", shard, shards)),
            "proxy": self.fingerprint,
            "data.entropy_top_k": self.config.data.entropy_top_k,
        }
        if summary := read_summary(directory, "scores", shard, shards):
            check_made_from(directory, summary.get("made_from"), made_from)
            return

        # Score the windows in blocks, so that each block can be sorted by length, and write the scores in the original order.
        histogram_N = np.zeros(BINS, np.int64)
        flops = 0.0
        report_batch = functools.partial(advance, f"shard {shard} of {shards}")
        with ShardWriter(directory, "scores", shard, shards) if is_leader() else contextlib.nullcontext() as writer:
            block = self._block_windows()
            for first in range(0, len(tokens), block):
                records = tokens.read(range(first, min(first + block, len(tokens))))
                scores = self.score([ids_S for ids_S, _ in records], report_batch)
                flops += scoring_flops(self.policy.config, [len(ids_S) for ids_S, _ in records])
                for (_, lengths_S), score in zip(records, scores, strict=True):
                    if writer:
                        writer.write(stored_entropies(score, lengths_S), [len(lengths_S)])
                    bins = np.minimum(score.entropy_S[lengths_S > 0] / BIN_NATS, BINS - 1).astype(np.int64)
                    histogram_N += np.bincount(bins, minlength=BINS)
            if writer:
                writer.commit({"made_from": made_from, "histogram": histogram_N.tolist(), "flops": flops})

    def count_batches(self, directory: Path, shard: int, shards: int) -> int:
        """Return the number of batches that `score_shard` computes for a tokenized shard."""
        data = self.config.data
        [rows] = read_index(directory, shards, [shard])
        ends = window_ends(rows["tokens"].astype(np.int64), data.max_document_tokens)
        lengths_N = np.diff(ends, prepend=0)
        block = self._block_windows()
        return sum(self._count_batches(lengths_N[first : first + block]) for first in range(0, len(lengths_N), block))

    def _count_batches(self, lengths_N: np.ndarray) -> int:
        """Return the number of batches that `score` computes for windows of these lengths."""
        data = self.config.data
        return sum(1 for _ in length_buckets(lengths_N, data.max_document_tokens, data.score_batch_windows))

    def _block_windows(self) -> int:
        return BLOCK_BATCHES * self.config.data.score_batch_windows


def scoring_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Return the model FLOPs of scoring windows of these lengths in tokens."""
    lengths_N = np.fromiter(lengths, np.int64)
    tokens = int(lengths_N.sum())
    return float(forward_flops(config, tokens=tokens, pairs=causal_pairs(lengths_N).sum(), head_tokens=tokens))


def stored_entropies(score: Scores, lengths_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both entropies of a window as they are stored, float32 [S] each, with `NO_ENTROPY` for special tokens.

    Args:
      score: scores of the window.
      lengths_S: integers, bytes of each token; a special token has none.
    """
    is_text_S = lengths_S > 0
    return (
        np.where(is_text_S, score.entropy_S, NO_ENTROPY),
        np.where(is_text_S, score.partial_entropy_S, NO_ENTROPY),
    )


def fraction_above(histogram_N: np.ndarray, threshold: float) -> float:
    """Return the fraction of positions with an entropy above `threshold` nats.

    Args:
      histogram_N: int64, positions in each bin of `BIN_NATS` nats.
      threshold: a boundary between bins.

    Raises: ValueError, if the threshold is not a boundary between bins.
    """
    first = round(threshold / BIN_NATS)
    if not math.isclose(first * BIN_NATS, threshold):
        raise ValueError(f"threshold={threshold} is not a multiple of {BIN_NATS}")
    return float(histogram_N[first:].sum() / max(1, histogram_N.sum()))
