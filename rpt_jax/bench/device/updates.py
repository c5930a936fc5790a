"""The update: response tokens per second and model FLOPs utilization, with prompts shared by their responses or repeated."""

from __future__ import annotations

import argparse
import time

from rpt_jax.bench.device.ceilings import Ceilings, measure_ceilings, seconds_per_call, this_chip
from rpt_jax.bench.device.report import Report
from rpt_jax.bench.device.rollouts import DTYPE, HEAD_PRECISION
from rpt_jax.bench.device.sizes import SAMPLES, Sizes, Workload
from rpt_jax.bench.update import add_options, make_batch, unshared, update_call, update_flops
from rpt_jax.config import Experiment, PolicyConfig, PromptConfig, RolloutConfig, TrainingConfig
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.model.model_config import preset
from rpt_jax.rollout.memory import device_memory
from rpt_jax.sizes.mesh import mesh_sizes
from rpt_jax.sizes.plan import plan_memory


def update_options(workload: Workload) -> argparse.Namespace:
    """Return the options of `bench update` for a workload, with the memory fields that a run would plan on this device."""
    experiment = Experiment(
        policy=PolicyConfig(preset=workload.model, dtype=DTYPE, head_precision=HEAD_PRECISION),
        prompt=PromptConfig(max_tokens=workload.prompt_tokens),
        rollout=RolloutConfig(samples_per_prompt=SAMPLES, max_new_tokens=workload.response_tokens),
        training=TrainingConfig(prompts_per_step=workload.prompts),
    )
    sizes = mesh_sizes(make_mesh(-1, 1, 1))
    planned = plan_memory(experiment, preset(workload.model), sizes, device_memory()).experiment
    return parse_options(
        workload,
        f"--microbatch-tokens={planned.training.microbatch_tokens}",
        f"--logit-chunk-tokens={planned.training.logit_chunk_tokens}",
        f"--remat={planned.policy.remat}",
    )


def parse_options(workload: Workload, *arguments: str) -> argparse.Namespace:
    """Return the options of `bench update` for a workload, with further arguments. This does not start JAX's backends."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(
        [
            f"--preset={workload.model}",
            f"--prompts={workload.prompts}",
            f"--samples={SAMPLES}",
            f"--prompt-tokens={workload.prompt_tokens}",
            f"--response-tokens={workload.response_tokens}",
            f"--dtype={DTYPE}",
            f"--head-precision={HEAD_PRECISION}",
            *arguments,
        ]
    )


def measure(report: Report, sizes: Sizes) -> None:
    """Measure the update of every workload."""
    ceilings = measure_ceilings(sizes)
    for workload in sizes.workloads:
        for shared in (True, False):
            prompts = "shared" if shared else "repeated"
            with report.measurement(f"{workload}, prompts {prompts}"):
                _measure_workload(report, workload, shared, ceilings)


def _measure_workload(report: Report, workload: Workload, shared: bool, ceilings: Ceilings) -> None:
    options = update_options(workload)
    config = preset(workload.model)
    batch = make_batch(options, config)
    start = time.perf_counter()
    call = update_call(options, config, batch if shared else unshared(batch))
    call()
    first_seconds = time.perf_counter() - start
    seconds = seconds_per_call(call)
    flops_per_second = update_flops(options, config, prompts_per_group=1 if shared else SAMPLES) / seconds
    chip = this_chip()
    report.figure(
        model=workload.model,
        live=workload.live,
        context=workload.context,
        prompts="shared" if shared else "repeated",
        tokens_per_second=workload.live * workload.response_tokens / seconds,
        seconds=seconds,
        mfu=chip and flops_per_second / chip.flops,
        of_measured_peak=flops_per_second / ceilings.flops_per_second,
        remat=options.remat,
        row_tokens=options.microbatch_tokens,
        logit_chunk_tokens=options.logit_chunk_tokens,
        first_run_seconds=first_seconds,
    )
