"""Gradient of the loss over a batch: packed rows are processed in passes that sum one numerator and one denominator."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import ObjectiveConfig
from rpt_jax.distributed.sharding import shard_map_batch
from rpt_jax.model.flops import causal_pairs, forward_flops, training_flops
from rpt_jax.model.lora import join_adapters
from rpt_jax.model.transformer import Params, Transformer, head, prefill
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch, UpdateLimits
from rpt_jax.objective.logprobs import TokenScores, token_logprobs, token_scores
from rpt_jax.objective.loss import ClipRange
from rpt_jax.objective.packing import PackedGroups, Rows, fitting_divisor, pack_groups
from rpt_jax.registry import AGGREGATIONS, IMPORTANCE_WEIGHTS, KL_ESTIMATORS, LOSSES

# Bin edges of a histogram of log-probability differences; each bin is an eighth wider than the one before. Counts can
# be summed over passes, quantiles cannot.
_MISMATCH_EDGES = np.logspace(-9, 1, 197, dtype=np.float32)


class RowBatch(NamedTuple):
    """One pass: N rows of up to J responses of up to T tokens, with the batch's arrays for these responses.

    Attributes:
      rows: the packed tokens.
      mask_NxJxT: bool, True for response tokens.
      sampler_logprobs_NxJxT: float32 log-probabilities that the sampler computed.
      old_logprobs_NxJxT: float32 log-probabilities before the first minibatch, or None if the update is exactly
        on-policy.
      advantages_NxJ: float32.
    """

    rows: Rows
    mask_NxJxT: jax.Array
    sampler_logprobs_NxJxT: jax.Array
    old_logprobs_NxJxT: jax.Array | None
    advantages_NxJ: jax.Array


@jax.named_scope("old_logprobs")
def response_logprobs(
    policy: Transformer, limits: UpdateLimits, params: Params, batch: UpdateBatch
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of every response token at the sampling temperature, float32 [P, G, T], and the FLOPs.

    Log-probabilities outside of the mask are undefined.
    """
    size = batch.tokens_PxGxT.shape[-1]
    groups = _pack(batch, jnp.ones_like(batch.counted_P), limits)

    def fill(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logprobs_RxT, flops = carry
        rows = groups.rows(index)
        responses_NxJ = jnp.where(rows.lengths_NxJ > 0, rows.responses_NxJ, len(logprobs_RxT))
        logprobs_NxJxT, _ = row_scores(policy, limits, params, rows, size)
        return logprobs_RxT.at[responses_NxJ].set(logprobs_NxJxT, mode="drop"), flops + row_flops(policy, rows)

    zeros = jnp.zeros((batch.tokens_PxGxT[..., 0].size, size), jnp.float32)
    logprobs_RxT, flops = jax.lax.fori_loop(0, groups.passes, fill, (zeros, jnp.float32(0)))
    return logprobs_RxT.reshape(batch.tokens_PxGxT.shape), flops


@jax.named_scope("policy_gradient")
def policy_gradient(
    policy: Transformer,
    objective: ObjectiveConfig,
    limits: UpdateLimits,
    params: Params,
    batch: UpdateBatch,
    old_logprobs_PxGxT: jax.Array | None,
    reference: Params | None = None,
    frozen: Params | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """Return the gradient of the loss over the counted groups, and its metrics.

    Passes sum numerators and denominators, and the gradient is divided once by the total denominator. Groups without
    advantages contribute zero to the numerator unless the loss has a term without advantages, so they are left out of
    the rows. The metrics cover the remaining groups.

    Args:
      policy, objective, limits: static.
      params: parameters to differentiate by.
      batch: the groups.
      old_logprobs_PxGxT: float32 log-probabilities before the first minibatch; None if the update is exactly on-policy.
      reference: parameters of the KL term's reference policy; None without a KL term.
      frozen: parameters of the policy that are not differentiated by; None if all are.
    """
    size = batch.tokens_PxGxT.shape[-1]
    # Pack only the groups that contribute to the numerator.
    used_P = batch.counted_P
    if not _needs_all_groups(objective):
        used_P = (batch.advantages_PxG != 0).any(axis=1) & batch.counted_P
    groups = _pack(batch, used_P, limits)

    def numerator(params: Params, part: RowBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = loss_sums(policy, objective, limits, join_adapters(frozen, params), part, reference)
        return sums["loss"], sums

    def accumulate(index: jax.Array, carry: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, dict[str, jax.Array]]:
        total_grads, total_sums = carry
        rows = groups.rows(index)
        part = RowBatch(
            rows=rows,
            mask_NxJxT=jnp.arange(size) < rows.lengths_NxJ[..., None],
            sampler_logprobs_NxJxT=rows.take_responses(batch.sampler_logprobs_PxGxT),
            old_logprobs_NxJxT=None if old_logprobs_PxGxT is None else rows.take_responses(old_logprobs_PxGxT),
            advantages_NxJ=rows.take_responses(batch.advantages_PxG),
        )
        grads, sums = jax.grad(numerator, has_aux=True)(params, part)
        totals = jax.tree.map(jnp.add, total_sums, sums)
        totals["mismatch_max"] = jnp.maximum(total_sums["mismatch_max"], sums["mismatch_max"])
        return jax.tree.map(jnp.add, total_grads, grads), totals

    # The number of passes depends on the lengths of the responses, so this is a loop on the device.
    zero_grads = jax.tree.map(jnp.zeros_like, params)
    grads, sums = jax.lax.fori_loop(0, groups.passes, accumulate, (zero_grads, _zero_sums(objective)))

    # Groups that were left out still count in the denominator.
    unused_PxGxT = batch.mask_PxGxT & (batch.counted_P & ~used_P)[:, None, None]
    _, unused_count = AGGREGATIONS[objective.aggregation].function(unused_PxGxT, limits.max_new_tokens)
    count = jnp.maximum(sums["count"] + unused_count, 1)
    metrics = _loss_metrics(sums, count)
    capacity = jnp.maximum(groups.passes, 1) * groups.row_count * groups.row_size
    metrics["update/filled"] = sums["trunk"] / capacity
    return jax.tree.map(lambda g: g / count, grads), metrics


@jax.named_scope("loss")
def loss_sums(
    policy: Transformer,
    objective: ObjectiveConfig,
    limits: UpdateLimits,
    params: Params,
    part: RowBatch,
    reference: Params | None,
) -> dict[str, jax.Array]:
    """Return the contributions of some rows to the loss (numerator "loss", denominator "count") and to the metrics.

    The loss of a token is weight · policy loss + kl_weight · KL - entropy_weight · entropy.

    Args:
      policy, objective, limits: static.
      params: all parameters of the policy.
      part: the rows.
      reference: parameters of the KL term's reference policy; None without a KL term.

    Returns:
      Scalars, and the histogram of differences to the sampler's log-probabilities, int32 [len(_MISMATCH_EDGES) + 1].
    """
    # Score the response tokens, forward and backward. With exactly on-policy updates, the old log-probabilities are the
    # current ones.
    mask = part.mask_NxJxT
    size = mask.shape[-1]
    logprobs, entropies = row_scores(policy, limits, params, part.rows, size, entropies=objective.entropy_weight > 0)
    flops = row_flops(policy, part.rows, trains=True)
    current = jax.lax.stop_gradient(logprobs)
    old = current if part.old_logprobs_NxJxT is None else part.old_logprobs_NxJxT

    # The policy loss, weighted by the importance of each token under the sampler.
    clip_range = ClipRange(low=objective.clip_low, high=objective.clip_high, dual=objective.dual_clip)
    token = LOSSES[objective.loss].function(logprobs, old, part.advantages_NxJ[..., None], mask, clip_range)
    terms = token.loss
    kept = mask
    sums: dict[str, jax.Array] = {}
    if objective.importance != "none":
        ratio = jnp.exp(jnp.where(mask, old - part.sampler_logprobs_NxJxT, 0.0))
        weights, accepted = IMPORTANCE_WEIGHTS[objective.importance].function(
            ratio, objective.importance_low, objective.importance_high
        )
        terms = weights * terms
        kept = mask & accepted
        sums["weight"] = jnp.sum(jnp.where(kept, weights, 0.0))

    # Optional terms of the loss.
    if objective.kl != "none":
        assert reference is not None
        reference_logprobs, _ = row_scores(policy, limits, reference, part.rows, size)
        flops += row_flops(policy, part.rows)
        kl = KL_ESTIMATORS[objective.kl].function(
            jnp.where(mask, logprobs, 0.0), jnp.where(mask, reference_logprobs, 0.0)
        )
        terms = terms + objective.kl_weight * kl
        sums["kl"] = jnp.sum(jnp.where(kept, kl, 0.0))
    if entropies is not None:
        terms = terms - objective.entropy_weight * entropies
        sums["entropy"] = jnp.sum(jnp.where(kept, entropies, 0.0))

    # Aggregate, and sum what the metrics need.
    token_weights, count = AGGREGATIONS[objective.aggregation].function(kept, limits.max_new_tokens)
    # The sampler is compared with the policy that sampled: `current` has moved on after the first minibatch.
    mismatch = jnp.abs(jnp.where(mask, old - part.sampler_logprobs_NxJxT, 0.0))
    has_gradient = kept & (_has_terms_without_advantages(objective) | (part.advantages_NxJ != 0)[..., None])
    histogram = jnp.zeros(len(_MISMATCH_EDGES) + 1, jnp.int32)
    return sums | {
        "loss": jnp.sum(jnp.where(kept, token_weights * terms, 0.0)),
        "count": count,
        "ratio": jnp.sum(jnp.where(mask, token.ratio, 0.0)),
        "clipped": jnp.sum(mask & token.clipped).astype(jnp.float32),
        "mismatch": mismatch.sum(),
        "mismatch_max": mismatch.max(),
        "mismatch_histogram": histogram.at[jnp.searchsorted(_MISMATCH_EDGES, mismatch)].add(mask),
        "kept": kept.sum(),
        "learned": has_gradient.sum(),
        "tokens": mask.sum(),
        "trunk": part.rows.used,
        "flops": flops,
    }


def row_scores(
    policy: Transformer, limits: UpdateLimits, params: Params, rows: Rows, size: int, *, entropies: bool = False
) -> TokenScores:
    """Return the log-probability of every response token at the sampling temperature and, if `entropies`, its entropy.

    Both are float32 [N, J, T] with T = `size`, and undefined after each response's length.
    """
    tokens_Nx1xW = rows.tokens_NxW[:, None]
    positions_Nx1xW = rows.positions_NxW[:, None]
    hidden_Nx1xWxD, _ = policy.apply({"params": params}, tokens_Nx1xW, positions_Nx1xW, key_ranges=rows.key_ranges)

    score = functools.partial(
        token_scores,
        temperature=limits.temperature,
        logit_chunk_tokens=limits.logit_chunk_tokens,
        entropies=entropies,
    )
    # Under shard_map the gradient of the head is summed over devices once, and not after every chunk.
    results = shard_map_batch(score, head(policy, params), rows.filled_N, hidden_Nx1xWxD[:, 0], rows.targets_NxW)
    return jax.tree.map(lambda x_NxW: rows.split(x_NxW, size), results)


def row_flops(policy: Transformer, rows: Rows, *, trains: bool = False) -> jax.Array:
    """Return the FLOPs of a forward pass over packed rows, float32, and of the backward pass if `trains`.

    Only response tokens reach the head.
    """
    used = rows.used.astype(jnp.float32)
    # A token attends to as many earlier tokens as its position says, wherever they are in the row, and to itself.
    pairs = rows.positions_NxW.astype(jnp.float32).sum() + used
    head_tokens = rows.filled_N.sum().astype(jnp.float32)
    if not trains:
        return forward_flops(policy.config, tokens=used, pairs=pairs, head_tokens=head_tokens)
    frozen = policy.lora is not None
    return training_flops(policy.config, tokens=used, pairs=pairs, head_tokens=head_tokens, frozen=frozen)


@jax.named_scope("document_gradient")
def document_gradient(
    policy: Transformer,
    limits: UpdateLimits,
    params: Params,
    documents: NextTokenBatch,
    frozen: Params | None = None,
) -> tuple[Params, jax.Array, jax.Array]:
    """Return the gradient and value of the mean next-token cross-entropy of documents (paper, Equation 1), and the FLOPs."""
    count, size = documents.inputs_NxS.shape
    microbatch = fitting_divisor(count, maximum=limits.rows * limits.microbatch_tokens // size, multiple=limits.rows)

    def cross_entropy(params: Params, part: NextTokenBatch) -> jax.Array:
        params = join_adapters(frozen, params)
        lengths_N = jnp.full(microbatch, size, jnp.int32)
        hidden_NxSxD, _, _ = prefill(policy, params, part.inputs_NxS, lengths_N)
        logprobs_M = token_logprobs(
            head(policy, params),
            hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1]),
            part.targets_NxS.reshape(-1),
            temperature=1.0,
            logit_chunk_tokens=limits.logit_chunk_tokens,
        )
        return -jnp.sum(jnp.where(part.mask_NxS.reshape(-1), logprobs_M, 0.0))

    def accumulate(index: jax.Array, carry: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        rows = index * microbatch + jnp.arange(microbatch)
        part = jax.tree.map(lambda x: x[rows], documents)
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(cross_entropy)(params, part))

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    loss, grads = jax.lax.fori_loop(0, count // microbatch, accumulate, zeros)
    lengths_N = documents.mask_NxS.sum(axis=1).astype(jnp.float32)
    tokens = lengths_N.sum()
    flops = training_flops(
        policy.config,
        tokens=tokens,
        pairs=causal_pairs(lengths_N).sum(),
        head_tokens=tokens,
        frozen=policy.lora is not None,
    )
    tokens = jnp.maximum(tokens, 1)
    return jax.tree.map(lambda g: g / tokens, grads), loss / tokens, flops


def _pack(batch: UpdateBatch, used_P: jax.Array, limits: UpdateLimits) -> PackedGroups:
    return pack_groups(
        prompts_PxS=batch.prompts_PxS,
        lengths_P=batch.lengths_P,
        tokens_PxGxT=batch.tokens_PxGxT,
        response_lengths_PxG=batch.mask_PxGxT.sum(axis=-1, dtype=jnp.int32),
        window_P=batch.window_P,
        used_P=used_P,
        rows=limits.rows,
        microbatch_tokens=limits.microbatch_tokens,
    )


def _needs_all_groups(objective: ObjectiveConfig) -> bool:
    """Return whether groups without variance have a gradient, or must be scored to know which of their tokens count."""
    return _has_terms_without_advantages(objective) or objective.importance == "mask"


def _has_terms_without_advantages(objective: ObjectiveConfig) -> bool:
    return objective.kl != "none" or objective.entropy_weight > 0


def _zero_sums(objective: ObjectiveConfig) -> dict[str, jax.Array]:
    """Return the initial values of `loss_sums`, summed over passes."""
    floats = ["loss", "ratio", "clipped", "mismatch", "mismatch_max", "flops"]
    if objective.kl != "none":
        floats.append("kl")
    if objective.entropy_weight > 0:
        floats.append("entropy")
    if objective.importance != "none":
        floats.append("weight")
    integers = ("tokens", "kept", "learned", "count", "trunk")
    zeros: dict[str, jax.Array] = {name: jnp.float32(0) for name in floats}
    zeros |= {name: jnp.int32(0) for name in integers}
    zeros["mismatch_histogram"] = jnp.zeros(len(_MISMATCH_EDGES) + 1, jnp.int32)
    return zeros


def _loss_metrics(sums: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Return metrics by their names in metrics.jsonl from the sums over all passes."""
    tokens = jnp.maximum(sums["tokens"], 1)
    kept = jnp.maximum(sums["kept"], 1)
    below_p99 = jnp.cumsum(sums["mismatch_histogram"]) < 0.99 * sums["tokens"]
    p99_bin = below_p99.sum().clip(max=len(_MISMATCH_EDGES) - 1)
    metrics = {
        "loss/policy": sums["loss"] / count,
        "ratio/mean": jnp.where(sums["tokens"] > 0, sums["ratio"] / tokens, 1.0),
        "ratio/clipped": sums["clipped"] / tokens,
        "mismatch/mean": sums["mismatch"] / tokens,
        # The upper edge of the bin that contains the 99th percentile.
        "mismatch/p99": jnp.minimum(jnp.asarray(_MISMATCH_EDGES)[p99_bin], sums["mismatch_max"]),
        "mismatch/max": sums["mismatch_max"],
        "update/tokens": sums["tokens"].astype(jnp.float32),
        "update/trunk_tokens": sums["trunk"].astype(jnp.float32),
        "update/flops": sums["flops"],
        # 1 if no token has a gradient.
        "update/skipped": (sums["learned"] == 0).astype(jnp.float32),
    }
    if "weight" in sums:
        metrics["importance/mean"] = sums["weight"] / kept
        metrics["importance/rejected"] = (sums["tokens"] - sums["kept"]) / tokens
    if "kl" in sums:
        metrics["policy/kl"] = sums["kl"] / kept
    if "entropy" in sums:
        metrics["policy/entropy_exact"] = sums["entropy"] / kept
    return metrics
