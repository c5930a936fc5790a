"""Kernels against the plain reference on the device: attention forward and backward, and log-probabilities of rollouts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rpt_jax.bench.device.operations import Operation, causal_attention, packed_attention
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.rollouts import decode_programs, decoding_of, random_prompts
from rpt_jax.bench.device.sizes import Sizes, Workload
from rpt_jax.config import PolicyConfig
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.distributed.sharding import init_parameters
from rpt_jax.model.attention.dispatch import choose_attention
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.model_config import preset
from rpt_jax.model.precision import in_policy_precision
from rpt_jax.model.transformer import Params, Transformer, in_compute_dtype
from rpt_jax.objective.batch import UpdateBatch, UpdateLimits
from rpt_jax.objective.gradient import response_logprobs
from rpt_jax.rollout.prefix_sharing import Prompts
from rpt_jax.rollout.rollouts import Rollouts
from rpt_jax.setup import make_policy

_DTYPES = ("bfloat16", "float32")
# Largest difference from the reference, in units of the reference's largest number. bfloat16 rounds weights and results to 8
# bits; gradients of queries and keys differ more, because rowsum(dO * O) takes the rounded output, as in FlashAttention-2.
_TOLERANCES = {
    "bfloat16": {"out": 1e-2, "dq": 5e-2, "dk": 5e-2, "dv": 1e-2},
    "float32": dict.fromkeys(("out", "dq", "dk", "dv"), 1e-4),
}
# Mean difference of log-probabilities, in nats, of random weights.
_LOGPROB_TOLERANCES = {"bfloat16": 3e-2, "float32": 1e-4}
_PARITY_LAYERS = 2
_PARITY_VOCAB = 4096
_LIVE = 64
# Prompts and responses that are shorter than the kernels' blocks of keys.
_SHORT_CONTEXT = 40


def measure(report: Report, sizes: Sizes) -> None:
    """Compare every implementation of the platform with the reference, for the heads of every model."""
    if choose_attention("auto", target_platform()) == "blockwise":
        report.note("This platform has no kernels: only plain XLA is compared. The kernels need a GPU or a TPU.")
    operations = (
        causal_attention(rows=2, tokens=sizes.parity_tokens // 2),
        packed_attention(sizes.parity_tokens, sizes.parity_tokens // 8),
    )
    for dtype in _DTYPES:
        for model in sizes.models:
            for operation in operations:
                for implementation in operation.implementations(dtype):
                    with report.measurement(f"{operation.name}, {implementation}, {model}, {dtype}"):
                        _compare_operation(report, operation, implementation, model, dtype)
            for context in (sizes.parity_tokens // 8, _SHORT_CONTEXT):
                with report.measurement(f"log-probabilities, context {context}, {model}, {dtype}"):
                    _compare_logprobs(report, Workload(model, _LIVE, context), dtype)


def _compare_operation(report: Report, operation: Operation, implementation: str, model: str, dtype: str) -> None:
    arrays = operation.arrays(preset(model), dtype)
    # The reference sees the same rounded numbers. Its products, and those of kernels in float32, are not TensorFloat-32.
    with jax.default_matmul_precision("highest"):
        expected = operation.forward_and_backward("reference")(
            arrays._replace(**{name: getattr(arrays, name).astype(jnp.float32) for name in ("q", "k", "v", "dout")})
        )
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        results = operation.forward_and_backward(implementation)(arrays)
    for name, theirs in expected.items():
        difference = _relative_difference(results[name], theirs)
        tolerance = _TOLERANCES[dtype][name]
        report.figure(
            operation=operation.name,
            implementation=implementation,
            model=model,
            dtype=dtype,
            result=name,
            difference=difference,
            tolerance=tolerance,
            agrees=difference <= tolerance,
        )


def _relative_difference(ours: jax.Array, theirs: jax.Array) -> float:
    """Return the largest difference in units of the largest number; NaN if any number is not finite."""
    return float(jnp.max(jnp.abs(ours.astype(jnp.float32) - theirs)) / jnp.max(jnp.abs(theirs)))


def _compare_logprobs(report: Report, workload: Workload, dtype: str) -> None:
    """Sample, and compute the log-probabilities of the samples again as the update does, by kernels and by the reference."""
    config = dataclasses.replace(
        preset(workload.model), layers=_PARITY_LAYERS, vocab=min(_PARITY_VOCAB, preset(workload.model).vocab)
    )
    policy = make_policy(PolicyConfig(dtype=dtype, precision="float32", head_precision=dtype), config)
    mesh = make_mesh(-1, 1, 1)
    with use_mesh(mesh):
        params = init_parameters(policy, mesh, seed=0)
    prompts = random_prompts(config, workload)
    rollouts = _sample(policy, params, prompts, workload)
    reference = make_policy(
        PolicyConfig(dtype=dtype, precision="float32", head_precision=dtype, attention="reference"), config
    )
    by: Mapping[str, jax.Array] = {
        "sampler": rollouts.logprobs_PxGxT,
        "update": _update_logprobs(policy, params, prompts, rollouts, workload),
        "reference": _update_logprobs(reference, params, prompts, rollouts, workload),
    }
    for one, other in (("sampler", "update"), ("sampler", "reference"), ("update", "reference")):
        differences = jnp.abs(by[one] - by[other])
        mean = float(differences.mean())
        tolerance = _LOGPROB_TOLERANCES[dtype]
        report.figure(
            operation=f"log-probabilities, context {workload.context}: {one} and {other}",
            implementation=policy.attention,
            model=workload.model,
            dtype=dtype,
            result="mean, nats",
            difference=mean,
            tolerance=tolerance,
            agrees=mean <= tolerance,
            largest=float(differences.max()),
        )


def _sample(policy: Transformer, params: Params, prompts: Prompts, workload: Workload) -> Rollouts:
    """Return rollouts of full length, [P, G]."""
    weights = jax.jit(in_compute_dtype, static_argnums=0)(policy, params)

    def sample(policy: Transformer) -> Rollouts:
        programs = decode_programs(policy, weights, prompts, decoding_of(workload))
        return programs.decode(*programs.start()).rollouts

    rollouts = in_policy_precision(sample)(policy)
    return jax.tree.map(lambda x: x.reshape(workload.prompts, -1, *x.shape[1:]), rollouts)


def _update_logprobs(
    policy: Transformer, params: Params, prompts: Prompts, rollouts: Rollouts, workload: Workload
) -> jax.Array:
    """Return the log-probabilities of the responses in packed rows, [P, G, T]."""
    groups, samples = rollouts.lengths_PxG.shape
    zeros_PxG = jnp.zeros((groups, samples), jnp.float32)
    prompts_PxS: Any = prompts.roots_NxS  # Prompts that share nothing are their own roots.
    batch = UpdateBatch(
        prompts_PxS=jnp.asarray(prompts_PxS),
        lengths_P=jnp.asarray(prompts.lengths_P),
        window_P=jnp.arange(groups, dtype=jnp.int32),
        tokens_PxGxT=rollouts.tokens_PxGxT,
        mask_PxGxT=rollouts.mask_PxGxT,
        sampler_logprobs_PxGxT=rollouts.logprobs_PxGxT,
        advantages_PxG=zeros_PxG,
        counted_P=jnp.ones(groups, bool),
    )
    limits = UpdateLimits(
        minibatches=1,
        rows=1,
        microbatch_tokens=2 * workload.context,
        logit_chunk_tokens=workload.context,
        temperature=decoding_of(workload).temperature,
        max_new_tokens=workload.response_tokens,
    )
    logprobs = jax.jit(functools.partial(in_policy_precision(response_logprobs), policy, limits))
    return logprobs(params, batch)[0]
