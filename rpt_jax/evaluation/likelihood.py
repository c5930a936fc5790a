"""Log-likelihoods of continuations: of options, of the next token of a text, and of whole texts."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.distributed.mesh import num_batch_shards
from rpt_jax.distributed.sharding import shard_prompts
from rpt_jax.model.context_length import trained_context
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, branch_hidden, head
from rpt_jax.objective.logprobs import over_token_chunks, scaled_logits

# Padded sizes begin with these, in tokens: each shorter one would compile another program.
_MIN_PROMPT = 32
_MIN_CONTINUATION = 2


class Request(NamedTuple):
    """A prompt and its continuations, whose log-likelihoods are asked for.

    Attributes:
      prompt: token ids, at least one.
      continuations: token ids of each, at least one.
    """

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation.

    Attributes:
      logprob: sum over its tokens, in nats.
      is_greedy: whether each of its tokens is the most likely one.
      first_token: the most likely first token.
    """

    logprob: float
    is_greedy: bool
    first_token: int


class LaunchedRequests(NamedTuple):
    """Requests whose computation was launched.

    Attributes:
      indices: for each array, the index of the request of each of its rows.
      arrays: log-probability (float32) and most likely token (int32) at each position, [P, G, T] each.
    """

    indices: list[list[int]]
    arrays: list[tuple[Any, Any]]


@functools.partial(jax.jit, static_argnames=("policy", "logit_chunk_tokens"))
@jax.named_scope("likelihood")
@in_policy_precision
def score_continuations(
    policy: Transformer,
    params: Params,
    prompts_PxS: jax.Array,
    lengths_P: jax.Array,
    continuations_PxGxT: jax.Array,
    *,
    logit_chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each token of the continuations, and the most likely token in its place, [P, G, T] each.

    A prompt runs once for all its continuations.

    Args:
      policy: the decoder.
      params: its parameters.
      prompts_PxS: int32 token ids, padded on the right.
      lengths_P: int32 prompt lengths, at least 1.
      continuations_PxGxT: int32 token ids, padded on the right; at least two.
      logit_chunk_tokens: tokens whose logits are in memory at the same time.
    """
    hidden = branch_hidden(policy, params, prompts_PxS, lengths_P, continuations_PxGxT)

    def score(hidden_MxD: jax.Array, tokens_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_MxV = scaled_logits(head(policy, params), hidden_MxD, 1.0)
        chosen_M = jnp.take_along_axis(logits_MxV, tokens_M[:, None], axis=-1)[:, 0]
        return chosen_M - jax.nn.logsumexp(logits_MxV, axis=-1), jnp.argmax(logits_MxV, axis=-1).astype(jnp.int32)

    flat_MxD = hidden.reshape(-1, hidden.shape[-1])
    logprobs, most_likely = over_token_chunks(score, logit_chunk_tokens, flat_MxD, continuations_PxGxT.reshape(-1))
    return logprobs.reshape(continuations_PxGxT.shape), most_likely.reshape(continuations_PxGxT.shape)


class LikelihoodScorer:
    """Scores continuations with a policy, in batches of similar size."""

    def __init__(
        self, policy: Transformer, params: Params, mesh: Mesh, *, tokens_per_pass: int, logit_chunk_tokens: int
    ):
        """
        Args:
          policy: the decoder.
          params: its parameters, on `mesh`.
          mesh: the devices.
          tokens_per_pass: tokens of a forward pass on each device, padding included; a longer request is a pass by itself.
          logit_chunk_tokens: tokens whose logits are in memory at the same time.
        """
        self._policy = policy
        self._params = params
        self._mesh = mesh
        self._tokens_per_pass = tokens_per_pass
        self._logit_chunk_tokens = logit_chunk_tokens
        self.max_tokens = trained_context(policy.config)

    def launch(self, requests: Sequence[Request]) -> LaunchedRequests:
        """Start to score requests. A prompt that is too long for the policy's context loses its oldest tokens."""
        # Group requests by their padded sizes, so that few programs are compiled.
        groups: dict[tuple[int, int, int], list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            longest = max(map(len, request.continuations))
            prompt_tokens = min(len(request.prompt), self.prompt_limit(longest))
            sizes = (
                _bucket(prompt_tokens, _MIN_PROMPT),
                len(request.continuations),
                _bucket(longest, _MIN_CONTINUATION),
            )
            groups[sizes].append(index)

        shards = num_batch_shards(self._mesh)
        indices: list[list[int]] = []
        arrays: list[tuple[Any, Any]] = []
        for (prompt_size, count, size), members in sorted(groups.items()):
            rows = shards * max(1, self._tokens_per_pass // (prompt_size + count * size))
            for first in range(0, len(members), rows):
                kept = members[first : first + rows]
                batch = self._pad([requests[i] for i in kept], (rows, prompt_size, count, size))
                indices.append(kept)
                arrays.append(
                    score_continuations(
                        self._policy,
                        self._params,
                        *shard_prompts(batch, self._mesh),
                        logit_chunk_tokens=self._logit_chunk_tokens,
                    )
                )
        return LaunchedRequests(indices=indices, arrays=arrays)

    def prompt_limit(self, continuation_tokens: int) -> int:
        """Return how many tokens of a prompt fit in the context. The last token of the continuation is predicted, not read."""
        return max(1, self.max_tokens - continuation_tokens + 1)

    def _pad(
        self, requests: Sequence[Request], sizes: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return prompts, their lengths and continuations, padded to `sizes`: rows, prompt, continuations, continuation."""
        rows, prompt_size, count, size = sizes
        prompts_PxS = np.zeros((rows, prompt_size), np.int32)
        lengths_P = np.ones(rows, np.int32)
        continuations_PxGxT = np.zeros((rows, count, size), np.int32)
        for p, request in enumerate(requests):
            longest = max(map(len, request.continuations))
            prompt = request.prompt[-self.prompt_limit(longest) :]
            prompts_PxS[p, : len(prompt)] = prompt
            lengths_P[p] = len(prompt)
            for g, continuation in enumerate(request.continuations):
                continuations_PxGxT[p, g, : len(continuation)] = continuation
        return prompts_PxS, lengths_P, continuations_PxGxT


def collect(
    requests: Sequence[Request], indices: Sequence[Sequence[int]], arrays: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[list[Likelihood]]:
    """Return the likelihoods of the continuations of each request.

    Args:
      requests: the arguments of `LikelihoodScorer.launch`.
      indices, arrays: its result, with the arrays on the host.
    """
    results: dict[int, list[Likelihood]] = {}
    for members, (logprobs_PxGxT, most_likely_PxGxT) in zip(indices, arrays, strict=True):
        for p, index in enumerate(members):
            results[index] = [
                Likelihood(
                    logprob=float(logprobs_PxGxT[p, g, : len(tokens)].sum(dtype=np.float64)),
                    is_greedy=bool(np.array_equal(most_likely_PxGxT[p, g, : len(tokens)], tokens)),
                    first_token=int(most_likely_PxGxT[p, g, 0]),
                )
                for g, tokens in enumerate(requests[index].continuations)
            ]
    return [results[index] for index in range(len(requests))]


def _bucket(tokens: int, least: int) -> int:
    """Return the padded size of a sequence: a power of two."""
    return max(least, 1 << (tokens - 1).bit_length())
