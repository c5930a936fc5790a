"""The gradient of a batch: rows of packed groups one after the other, one numerator, one denominator."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.distributed.sharding import shard_map_batch
from rpt_jax.model.transformer import Head, Params, Transformer, head, prefill
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch, UpdateConfig
from rpt_jax.objective.logprobs import over_row_chunks, scores, token_logprobs
from rpt_jax.objective.packing import Packed, Rows, fitting_divisor, pack_groups
from rpt_jax.registry import AGGREGATIONS, IMPORTANCE_WEIGHTS, KL_ESTIMATORS, LOSSES

# Distances of log-probabilities are counted in bins, each an eighth wider than the one before: counts add up, quantiles do not.
_DISTANCES = np.logspace(-9, 1, 197, dtype=np.float32)


class RowBatch(NamedTuple):
    """What is run at one time: N rows of up to J responses of up to T tokens, and what the batch says of these."""

    rows: Rows
    mask_NxJxT: jax.Array
    sampler_logprobs_NxJxT: jax.Array
    old_logprobs_NxJxT: jax.Array | None
    advantages_NxJ: jax.Array


def packed(batch: UpdateBatch, wanted_P: jax.Array, config: UpdateConfig) -> Packed:
    """The groups of a batch that are wanted, in rows."""
    lengths_PxG = batch.mask_PxGxT.sum(axis=-1, dtype=jnp.int32)
    groups = batch.prompts_PxS, batch.lengths_P, batch.tokens_PxGxT, lengths_PxG, batch.window_P
    return pack_groups(*groups, wanted_P, rows=config.rows, row_tokens=config.row_tokens)


def row_scores(
    policy: Transformer, params: Params, rows: Rows, limit: int, config: UpdateConfig, entropies: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of every response token at the sampling temperature; where asked, the entropy of what it was drawn from.

    Float32 [N, J, T], defined up to each response's length; T is `limit`.
    """
    tokens, positions = rows.tokens_NxW[:, None], rows.positions_NxW[:, None]
    hidden, _ = policy.apply({"params": params}, tokens, positions, key_ranges=rows.seen)

    def score(head: Head, filled_N: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        chunk = (
            config.chunk * len(filled_N) // config.rows
        )  # A device's part of the tokens whose logits exist at one time.
        each = functools.partial(scores, head, temperature=config.temperature, entropies=entropies)
        return over_row_chunks(each, chunk, filled_N, *arrays)

    # Or the devices would add their gradients of the head up after every chunk.
    both = shard_map_batch(score, head(policy, params), rows.filled_N, hidden[:, 0], rows.targets_NxW)
    return jax.tree.map(lambda x_NxW: rows.split(x_NxW, limit), both)


@jax.named_scope("old_logprobs")
def response_logprobs(policy: Transformer, params: Params, batch: UpdateBatch, config: UpdateConfig) -> jax.Array:
    """Log-probability of every response token at the sampling temperature, float32 [P, G, T]; defined under the mask."""
    groups, limit = packed(batch, jnp.ones_like(batch.counted_P), config), batch.tokens_PxGxT.shape[-1]

    def fill(index: jax.Array, logprobs_RxT: jax.Array) -> jax.Array:
        rows = groups.rows(index)
        places_NxJ = jnp.where(rows.lengths_NxJ > 0, rows.responses_NxJ, len(logprobs_RxT))
        return logprobs_RxT.at[places_NxJ].set(row_scores(policy, params, rows, limit, config)[0], mode="drop")

    zeros = jnp.zeros((batch.tokens_PxGxT[..., 0].size, limit), jnp.float32)
    return jax.lax.fori_loop(0, groups.passes, fill, zeros).reshape(batch.tokens_PxGxT.shape)


@jax.named_scope("policy_gradient")
def policy_gradient(
    policy: Transformer,
    params: Params,
    batch: UpdateBatch,
    old_logprobs_PxGxT: jax.Array | None,
    config: UpdateConfig,
    reference: Params | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the loss over the counted groups, and what to report of it.

    Rows add up numerators and denominators; the one global denominator divides once. Groups whose advantages are all zero
    contribute exactly nothing to the numerator, unless a term without advantages is on: they are in no row. The metrics are of
    the others alone.
    """
    taught_P = (
        batch.counted_P if config.every_group_matters else (batch.advantages_PxG != 0).any(axis=1) & batch.counted_P
    )
    groups, limit = packed(batch, taught_P, config), batch.tokens_PxGxT.shape[-1]

    def numerator(params: Params, part: RowBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = loss_sums(policy, params, part, config, reference)
        return sums["loss"], sums

    def accumulate(index: jax.Array, carry: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, dict[str, jax.Array]]:
        rows = groups.rows(index)
        old = None if old_logprobs_PxGxT is None else rows.of_responses(old_logprobs_PxGxT)
        part = RowBatch(
            rows,
            jnp.arange(limit) < rows.lengths_NxJ[..., None],
            rows.of_responses(batch.sampler_logprobs_PxGxT),
            old,
            rows.of_responses(batch.advantages_PxG),
        )
        grads, sums = jax.grad(numerator, has_aux=True)(params, part)
        totals = jax.tree.map(jnp.add, carry[1], sums)
        totals["worst"] = jnp.maximum(carry[1]["worst"], sums["worst"])
        return jax.tree.map(jnp.add, carry[0], grads), totals

    zeros = dict.fromkeys(config.sums, jnp.float32(0)) | dict.fromkeys(
        ("tokens", "kept", "count", "trunk"), jnp.int32(0)
    )
    zeros["distances"] = jnp.zeros(len(_DISTANCES) + 1, jnp.int32)
    start = jax.tree.map(jnp.zeros_like, params), zeros
    grads, sums = jax.lax.fori_loop(0, groups.passes, accumulate, start)
    idle = batch.mask_PxGxT & (batch.counted_P & ~taught_P)[:, None, None]
    count = jnp.maximum(sums["count"] + AGGREGATIONS[config.aggregation].function(idle, config.response_limit)[1], 1)
    room = jnp.maximum(groups.passes, 1) * groups.shape[0] * groups.shape[1]
    return jax.tree.map(lambda g: g / count, grads), _loss_metrics(sums, count) | {
        "update/filled": sums["trunk"] / room
    }


def loss_sums(
    policy: Transformer,
    params: Params,
    part: RowBatch,
    config: UpdateConfig,
    reference: Params | None,
) -> dict[str, jax.Array]:
    """What some rows add: to the numerator of the loss, "loss", to its denominator, "count", and to the metrics.

    Each token's term is weight · policy loss + kl_weight · KL - entropy_weight · entropy.
    """
    mask, limit = part.mask_NxJxT, part.mask_NxJxT.shape[-1]
    logprobs, entropies = row_scores(policy, params, part.rows, limit, config, config.entropy_weight > 0)
    now = jax.lax.stop_gradient(logprobs)
    old = now if part.old_logprobs_NxJxT is None else part.old_logprobs_NxJxT
    token = LOSSES[config.loss].function(logprobs, old, part.advantages_NxJ[..., None], mask, config.bounds)
    terms, kept, sums = token.loss, mask, {}
    if config.importance != "none":
        ratio = jnp.exp(jnp.where(mask, old - part.sampler_logprobs_NxJxT, 0.0))
        weights, accepted = IMPORTANCE_WEIGHTS[config.importance].function(
            ratio, config.importance_low, config.importance_high
        )
        terms, kept = weights * terms, mask & accepted
        sums["weight"] = jnp.sum(jnp.where(kept, weights, 0.0))
    if config.kl != "none":
        theirs, _ = row_scores(policy, reference, part.rows, limit, config)
        kl = KL_ESTIMATORS[config.kl].function(*(jnp.where(mask, x, 0.0) for x in (logprobs, theirs)))
        terms, sums["kl"] = terms + config.kl_weight * kl, jnp.sum(jnp.where(kept, kl, 0.0))
    if entropies is not None:
        terms, sums["entropy"] = terms - config.entropy_weight * entropies, jnp.sum(jnp.where(kept, entropies, 0.0))
    shares, count = AGGREGATIONS[config.aggregation].function(kept, config.response_limit)
    mismatch = jnp.abs(jnp.where(mask, now - part.sampler_logprobs_NxJxT, 0.0))
    return sums | {
        "loss": jnp.sum(jnp.where(kept, shares * terms, 0.0)),
        "count": count,
        "ratio": jnp.sum(jnp.where(mask, token.ratio, 0.0)),
        "clipped": jnp.sum(mask & token.clipped).astype(jnp.float32),
        "mismatch": mismatch.sum(),
        "worst": mismatch.max(),
        "distances": jnp.zeros(len(_DISTANCES) + 1, jnp.int32).at[jnp.searchsorted(_DISTANCES, mismatch)].add(mask),
        "kept": kept.sum(),
        "tokens": mask.sum(),
        "trunk": part.rows.used,
    }


def _loss_metrics(sums: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    seen, kept = (jnp.maximum(sums[name], 1) for name in ("tokens", "kept"))
    below_99 = jnp.cumsum(sums["distances"]) < 0.99 * sums["tokens"]
    metrics = {
        "loss/policy": sums["loss"] / count,
        "ratio/mean": jnp.where(sums["tokens"] > 0, sums["ratio"] / seen, 1.0),
        "ratio/clipped": sums["clipped"] / seen,
        "mismatch/mean": sums["mismatch"] / seen,
        # The end of the bin in which the 99th percentile lies.
        "mismatch/p99": jnp.minimum(
            jnp.asarray(_DISTANCES)[below_99.sum().clip(max=len(_DISTANCES) - 1)], sums["worst"]
        ),
        "mismatch/max": sums["worst"],
        "update/tokens": sums["tokens"].astype(jnp.float32),
        "update/trunk_tokens": sums["trunk"].astype(jnp.float32),
    }
    if "weight" in sums:
        rejected = (sums["tokens"] - sums["kept"]) / seen
        metrics |= {"importance/mean": sums["weight"] / kept, "importance/rejected": rejected}
    names = {"kl": "policy/kl", "entropy": "policy/entropy_exact"}
    return metrics | {names[name]: sums[name] / kept for name in names if name in sums}


def document_gradient(
    policy: Transformer, params: Params, documents: NextTokenBatch, config: UpdateConfig
) -> tuple[Params, jax.Array]:
    """Gradient of the mean next-token cross-entropy over the documents' tokens (paper, Equation 1), and that mean."""
    count, size = documents.inputs_NxS.shape
    microbatch = fitting_divisor(count, config.rows * config.row_tokens // size, config.rows)

    def nll(params: Params, part: NextTokenBatch) -> jax.Array:
        lengths_N = jnp.full(microbatch, size, jnp.int32)
        hidden_NxSxD, _, _ = prefill(policy, params, part.inputs_NxS, lengths_N)
        flat_MxD = hidden_NxSxD.reshape(-1, hidden_NxSxD.shape[-1])
        logprobs_M = token_logprobs(head(policy, params), flat_MxD, part.targets_NxS.reshape(-1), 1.0, config.chunk)
        return -jnp.sum(jnp.where(part.mask_NxS.reshape(-1), logprobs_M, 0.0))

    def accumulate(index: jax.Array, carry: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        rows = index * microbatch + jnp.arange(microbatch)
        part = jax.tree.map(lambda x: x[rows], documents)
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(nll)(params, part))

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    loss, grads = jax.lax.fori_loop(0, count // microbatch, accumulate, zeros)
    tokens = jnp.maximum(documents.mask_NxS.sum(), 1)
    return jax.tree.map(lambda g: g / tokens, grads), loss / tokens
