"""Gradient of the loss over a batch: packed rows are processed in passes that sum one numerator and one denominator."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import ObjectiveConfig
from rpt_jax.distributed.sharding import shard_map_batch
from rpt_jax.model.experts import Routing, balance_terms, expert_counts, expert_shares, load_metrics
from rpt_jax.model.flops import causal_pairs, forward_flops, training_flops
from rpt_jax.model.lora import join_adapters
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params, Transformer, apply_with_routing, head, prefill
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch, UpdateLimits
from rpt_jax.objective.logprobs import token_logprobs, token_scores
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


class RowScores(NamedTuple):
    """What the policy makes of N rows. Values per response token are undefined after each response's length.

    Attributes:
      logprobs_NxJxT: float32 log-probability of every response token at the sampling temperature.
      entropies_NxJxT: float32 entropies of the distributions that they are from; None if they were not asked for.
      routing: experts of all tokens in all layers, [L, N, W, …]; None if the policy has no experts.
    """

    logprobs_NxJxT: jax.Array
    entropies_NxJxT: jax.Array | None
    routing: Routing | None


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
        scores = row_scores(policy, limits, params, rows, size)
        logprobs_RxT = logprobs_RxT.at[responses_NxJ].set(scores.logprobs_NxJxT, mode="drop")
        return logprobs_RxT, flops + row_flops(policy, rows)

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
    shares_LxE = None
    counting_flops = jnp.float32(0)
    if objective.balance_weight > 0:
        counts_LxE, counting_flops = count_experts(policy, join_adapters(frozen, params), groups)
        shares_LxE = expert_shares(counts_LxE)

    def numerator(params: Params, part: RowBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = loss_sums(policy, objective, limits, join_adapters(frozen, params), part, reference, shares_LxE)
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
    zero_sums = _zero_sums(policy.config, objective)
    grads, sums = jax.lax.fori_loop(0, groups.passes, accumulate, (zero_grads, zero_sums))
    sums["flops"] += counting_flops

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
    shares_LxE: jax.Array | None,
) -> dict[str, jax.Array]:
    """Return the contributions of some rows to the loss (numerator "loss", denominator "count") and to the metrics.

    The loss of a token is weight · policy loss + kl_weight · KL - entropy_weight · entropy + balance_weight · balance.

    Args:
      policy, objective, limits: static.
      params: all parameters of the policy.
      part: the rows.
      reference: parameters of the KL term's reference policy; None without a KL term.
      shares_LxE: share of the batch's tokens that each expert gets; None without a load-balancing term.

    Returns:
      Scalars, the histogram of differences to the sampler's log-probabilities, int32 [len(_MISMATCH_EDGES) + 1], and, of a policy
      with experts, the number of tokens of each, int32 [L, E].
    """
    # Score the response tokens, forward and backward. With exactly on-policy updates, the old log-probabilities are the
    # current ones.
    mask = part.mask_NxJxT
    size = mask.shape[-1]
    scores = row_scores(policy, limits, params, part.rows, size, entropies=objective.entropy_weight > 0)
    logprobs = scores.logprobs_NxJxT
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
        reference_scores = row_scores(policy, limits, reference, part.rows, size)
        flops += row_flops(policy, part.rows)
        kl = KL_ESTIMATORS[objective.kl].function(
            jnp.where(mask, logprobs, 0.0), jnp.where(mask, reference_scores.logprobs_NxJxT, 0.0)
        )
        terms = terms + objective.kl_weight * kl
        sums["kl"] = jnp.sum(jnp.where(kept, kl, 0.0))
    if scores.entropies_NxJxT is not None:
        terms = terms - objective.entropy_weight * scores.entropies_NxJxT
        sums["entropy"] = jnp.sum(jnp.where(kept, scores.entropies_NxJxT, 0.0))
    if scores.routing is not None:
        sums["experts"] = expert_counts(scores.routing, _predicting_tokens(part.rows))
    if shares_LxE is not None:
        assert scores.routing is not None
        balance = part.rows.split(balance_terms(scores.routing, shares_LxE), size)
        terms = terms + objective.balance_weight * balance
        sums["balance"] = jnp.sum(jnp.where(kept, balance, 0.0))

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
) -> RowScores:
    """Score every response token of some rows, with T = `size`; compute entropies too if `entropies`."""
    hidden_NxWxD, routing = run_rows(policy, params, rows)
    score = functools.partial(
        token_scores,
        temperature=limits.temperature,
        logit_chunk_tokens=limits.logit_chunk_tokens,
        entropies=entropies,
    )
    # Under shard_map the gradient of the head is summed over devices once, and not after every chunk.
    results = shard_map_batch(score, head(policy, params), rows.filled_N, hidden_NxWxD, rows.targets_NxW)
    logprobs_NxJxT, entropies_NxJxT = jax.tree.map(lambda x_NxW: rows.split(x_NxW, size), results)
    return RowScores(logprobs_NxJxT=logprobs_NxJxT, entropies_NxJxT=entropies_NxJxT, routing=routing)


def run_rows(policy: Transformer, params: Params, rows: Rows) -> tuple[jax.Array, Routing | None]:
    """Return the hidden states of all tokens of some rows, [N, W, D], and their experts, [L, N, W, …], None without any."""
    inputs = rows.tokens_NxW[:, None], rows.positions_NxW[:, None]
    (hidden_Nx1xWxD, _), routing = apply_with_routing(policy, params, *inputs, key_ranges=rows.key_ranges)
    return hidden_Nx1xWxD[:, 0], jax.tree.map(lambda x: x[:, :, 0], routing)


def _predicting_tokens(rows: Rows) -> jax.Array:
    """Return True for tokens that predict a response token, [N, W]: all but prompts and padding."""
    return jnp.arange(rows.tokens_NxW.shape[1]) < rows.filled_N[:, None]


@jax.named_scope("count_experts")
def count_experts(policy: Transformer, params: Params, groups: PackedGroups) -> tuple[jax.Array, jax.Array]:
    """Return how many tokens that predict a response token each expert gets, int32 [L, E], and the FLOPs of counting them."""

    def add(index: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        counts_LxE, flops = total
        rows = groups.rows(index)
        _, routing = run_rows(policy, params, rows)
        assert routing is not None
        return counts_LxE + expert_counts(routing, _predicting_tokens(rows)), flops + row_flops(
            policy, rows, head=False
        )

    zeros_LxE = jnp.zeros((policy.config.layers, policy.config.experts), jnp.int32)
    return jax.lax.fori_loop(0, groups.passes, add, (zeros_LxE, jnp.float32(0)))


def row_flops(policy: Transformer, rows: Rows, *, trains: bool = False, head: bool = True) -> jax.Array:
    """Return the FLOPs of a forward pass over packed rows, float32, and of the backward pass if `trains`.

    Only response tokens reach the head, and none do without `head`.
    """
    used = rows.used.astype(jnp.float32)
    # A token attends to as many earlier tokens as its position says, wherever they are in the row, and to itself.
    pairs = rows.positions_NxW.astype(jnp.float32).sum() + used
    head_tokens = rows.filled_N.sum().astype(jnp.float32) * head
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
    return objective.kl != "none" or objective.entropy_weight > 0 or objective.balance_weight > 0


def _zero_sums(config: ModelConfig, objective: ObjectiveConfig) -> dict[str, jax.Array]:
    """Return the initial values of `loss_sums`, summed over passes."""
    floats = ["loss", "ratio", "clipped", "mismatch", "mismatch_max", "flops"]
    if objective.kl != "none":
        floats.append("kl")
    if objective.entropy_weight > 0:
        floats.append("entropy")
    if objective.importance != "none":
        floats.append("weight")
    if objective.balance_weight > 0:
        floats.append("balance")
    integers = ("tokens", "kept", "learned", "count", "trunk")
    zeros: dict[str, jax.Array] = {name: jnp.float32(0) for name in floats}
    zeros |= {name: jnp.int32(0) for name in integers}
    zeros["mismatch_histogram"] = jnp.zeros(len(_MISMATCH_EDGES) + 1, jnp.int32)
    if config.experts:
        zeros["experts"] = jnp.zeros((config.layers, config.experts), jnp.int32)
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
    if "experts" in sums:
        metrics |= load_metrics(expert_shares(sums["experts"]))
    if "balance" in sums:
        metrics["loss/balance"] = sums["balance"] / kept
    return metrics
