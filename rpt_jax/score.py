"""How hard each position of a document is for a policy, and whether its direct guess is right."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.infra.sharding import shard_prompts
from rpt_jax.objective.logprobs import over_token_chunks, scaled_logits
from rpt_jax.policy.transformer import Params, Transformer, head, prefill


class Scores(NamedTuple):
    """Of one document with S tokens; entry i belongs to token i given those before it.

    Attributes:
      entropy_S: float32, nats, over the likeliest next tokens.
      right_S: bool, the likeliest next token is the true one (the paper's standard next-token prediction).
    """

    entropy_S: np.ndarray
    right_S: np.ndarray


def top_k_entropy(logits_MxV: jax.Array, k: int) -> jax.Array:
    """Entropy in nats of the k likeliest next tokens, renormalised among them, [M] (paper, section 3.3).

    The paper takes k = 16 and does not say whether it renormalises; this does, which makes it an entropy.
    """
    top_MxK = jax.lax.top_k(logits_MxV, k)[0]
    logprobs_MxK = jax.nn.log_softmax(top_MxK, axis=-1)
    return -jnp.sum(jnp.exp(logprobs_MxK) * logprobs_MxK, axis=-1)


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
) -> tuple[jax.Array, jax.Array]:
    """Return entropy_NxS (float32) and right_NxS (bool) of `targets` given `inputs` up to the same place."""
    hidden_NxSxD, _, _ = prefill(policy, params, inputs_NxS, lengths_N)

    def score(hidden_MxD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_MxV = scaled_logits(head(policy, params), hidden_MxD, 1.0)
        return top_k_entropy(logits_MxV, top_k), jnp.argmax(logits_MxV, axis=-1) == targets_M

    flat = hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1])
    entropy_M, right_M = over_token_chunks(score, chunk, flat, targets_NxS.reshape(-1))
    return entropy_M.reshape(inputs_NxS.shape), right_M.reshape(inputs_NxS.shape)


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
) -> list[Scores]:
    """Score every position of every document.

    Args:
      documents: token ids, each at most `size` long.
      bos_id: begins every document, as in training.
      size: length that documents are padded to; one compiled program serves all.
      batch: [memory] documents a forward pass.
      top_k, chunk: see `top_k_entropy` and `over_token_chunks`.
      mesh: over which a batch is split.
    """
    scores = []
    for first in range(0, len(documents), batch):
        rows = documents[first : first + batch]
        arrays = shard_prompts(next_token_rows(rows, batch, bos_id, size), mesh)
        entropy, right = jax.device_get(score_batch(policy, params, *arrays, top_k=top_k, chunk=chunk))
        scores += [Scores(entropy[i, : len(ids)], right[i, : len(ids)]) for i, ids in enumerate(rows)]
    return scores


def next_token_rows(
    documents: Sequence[Sequence[int]], rows: int, bos_id: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs and targets of next-token prediction, int32 [rows, size], and lengths, of which an empty row has 1."""
    inputs, targets = np.zeros((2, rows, size), np.int32)
    lengths = np.ones(rows, np.int32)
    for i, ids in enumerate(documents):
        inputs[i, : len(ids)] = [bos_id, *ids[:-1]]
        targets[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return inputs, targets, lengths
