"""Attention by plain XLA and by kernels: seconds of single operations, forward and backward, and of decode steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rpt_jax.bench.device.ceilings import Ceilings, measure_ceilings, seconds_per_call
from rpt_jax.bench.device.operations import Operation, causal_attention, packed_attention
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.rollouts import DTYPE, decode_programs, decoding_of, random_policy, random_prompts, run
from rpt_jax.bench.device.sizes import Sizes, Workload
from rpt_jax.model.attention.dispatch import choose_attention
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.flops import attention_flops
from rpt_jax.model.model_config import preset

_DECODE_LAYERS = 2
_DECODE_VOCAB = 1024  # A small head, so that most of a step is attention.


def measure(report: Report, sizes: Sizes) -> None:
    """Time every implementation of the platform."""
    if choose_attention("auto", target_platform()) == "blockwise":
        report.note("This platform has no kernels: only plain XLA is timed. The kernels need a GPU or a TPU.")
    ceilings = measure_ceilings(sizes)
    contexts = sorted({workload.context for workload in sizes.workloads})
    operations = [packed_attention(sizes.row_tokens, context) for context in contexts]
    operations.append(causal_attention(rows=max(1, sizes.row_tokens // contexts[-1]), tokens=contexts[-1]))
    for model in sizes.models:
        for operation in operations:
            _time_operation(report, operation, model, ceilings)
        for workload in sizes.workloads:
            if workload.model == model and workload.live == sizes.workloads[0].live:
                _time_decoding(report, workload)


def _time_operation(report: Report, operation: Operation, model: str, ceilings: Ceilings) -> None:
    config = preset(model)
    arrays = operation.arrays(config, DTYPE)
    flops = attention_flops(dataclasses.replace(config, layers=1), operation.pairs)
    for passes, factor in (("forward", 1), ("forward and backward", 3)):
        plain = None
        for implementation in operation.implementations(DTYPE):
            with report.measurement(f"{operation.name}, {implementation}, {model}, {passes}"):
                make = operation.forward if passes == "forward" else operation.forward_and_backward
                function: Callable[..., Any] = make(implementation)
                seconds = seconds_per_call(lambda function=function: function(arrays))
                plain = seconds if implementation == "blockwise" else plain
                report.figure(
                    operation=operation.name,
                    model=model,
                    implementation=implementation,
                    passes=passes,
                    ms=1000 * seconds,
                    of_measured_peak=factor * flops / seconds / ceilings.flops_per_second,
                    times_blockwise=plain and plain / seconds,
                )


def _time_decoding(report: Report, workload: Workload) -> None:
    """Time decode steps of a few layers of a model."""
    config = dataclasses.replace(preset(workload.model), layers=_DECODE_LAYERS, vocab=_DECODE_VOCAB)
    plain = None
    for implementation in dict.fromkeys(("blockwise", choose_attention("auto", target_platform()))):
        with report.measurement(f"decode steps, {workload}, {implementation}"):
            policy, params = random_policy(config, implementation)
            programs = decode_programs(policy, params, random_prompts(config, workload), decoding_of(workload))
            run(programs)
            decoded = run(programs)
            seconds = decoded.decode / decoded.steps
            plain = seconds if implementation == "blockwise" else plain
            report.figure(
                operation=f"decode step of {_DECODE_LAYERS} layers, {workload.live} live, context {workload.context}",
                model=workload.model,
                implementation=implementation,
                passes="forward",
                ms=1000 * seconds,
                times_blockwise=plain and plain / seconds,
            )
