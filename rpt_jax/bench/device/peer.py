"""The same rollouts and updates by `transformers` on PyTorch, with weights of the same shape.

It generates with its default cache and repeats each prompt for its samples. An update has float32 weights and bfloat16 autocast.
"""

from __future__ import annotations

import importlib.util
import time

import jax
import numpy as np

from rpt_jax.bench.device.ceilings import seconds_per_call
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.sizes import SAMPLES, Sizes, Workload
from rpt_jax.bench.device.updates import parse_options
from rpt_jax.bench.peer import torch_matmul, transformers_generate, transformers_update
from rpt_jax.bench.update import make_batch
from rpt_jax.model.model_config import preset

_LOGIT_TOKENS = 4096  # Response tokens per pass: their float32 logits exist several times.


def measure(report: Report, sizes: Sizes) -> None:
    """Measure the rollout and the update of every workload."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        report.note(f"not measured: {' and '.join(missing)} not installed")
        return
    # The device belongs to PyTorch in this process.
    jax.config.update("jax_platforms", "cpu")
    with report.measurement("matrix product"):
        seconds = seconds_per_call(torch_matmul(sizes.matrix))
        report.figure(work="bfloat16 matrix product", tflops=2.0 * sizes.matrix**3 / seconds / 1e12)
    for workload in sizes.workloads:
        with report.measurement(f"rollout, {workload}"):
            _measure_rollout(report, workload)
        with report.measurement(f"update, {workload}"):
            _measure_update(report, workload)


def _measure_rollout(report: Report, workload: Workload) -> None:
    config = preset(workload.model)
    dims = (workload.prompts, workload.prompt_tokens)
    prompts_PxS = np.random.default_rng(0).integers(0, config.vocab, dims)
    prompts_BxS = np.repeat(prompts_PxS, SAMPLES, axis=0)
    generate = transformers_generate(config, prompts_BxS, workload.response_tokens)
    generate()
    start = time.perf_counter()
    generate()
    seconds = time.perf_counter() - start
    tokens = workload.live * workload.response_tokens
    report.figure(
        work="rollout",
        model=workload.model,
        live=workload.live,
        context=workload.context,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )


def _measure_update(report: Report, workload: Workload) -> None:
    config = preset(workload.model)
    batch = make_batch(parse_options(workload), config)
    microbatch = max(1, min(workload.live, _LOGIT_TOKENS // workload.response_tokens))
    for name, update in transformers_update(config, batch, microbatch, autocast=True).items():
        seconds = seconds_per_call(update)
        report.figure(
            work=f"update, {name.removeprefix('transformers: ')}",
            model=workload.model,
            live=workload.live,
            context=workload.context,
            seconds=seconds,
            tokens_per_second=workload.live * workload.response_tokens / seconds,
        )
