"""Check one mesh on a topology: the tables that are printed and the JSON of `--json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.distributed.mesh import mesh_fields, use_mesh
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.model.precision import choose_dtype, choose_head_precision
from rpt_jax.preflight.check import GIB, Memory, ProgramReport, as_record, check_programs
from rpt_jax.preflight.costs import flops_per_chip, kernel_bytes
from rpt_jax.preflight.programs import ProgramName, Step, make_step
from rpt_jax.preflight.topology import Topology
from rpt_jax.rollout.memory import USABLE
from rpt_jax.setup import check_split, mesh_from_config
from rpt_jax.sizes.limits import short_response_warnings
from rpt_jax.sizes.mesh import mesh_sizes
from rpt_jax.sizes.plan import Plan, check_slots, plan_memory
from rpt_jax.sizes.policy import model_config_of

_BEFORE_FIRST_STEP = (ProgramName.SCORE,)  # Programs that do not run in every step.


def preflight(experiment: Experiment, topology: Topology, only: Collection[str] = ()) -> dict[str, Any]:
    """Compile the programs of a step for the config's mesh, print tables and return the JSON record.

    Args:
      experiment: the experiment.
      topology: the chips.
      only: names of the programs to compile; empty for all of them.

    Raises:
      UserError: the config does not fit the topology, or it has no program of a name.
    """
    experiment = for_topology(experiment, topology)
    mesh = mesh_from_config(experiment.mesh, devices(topology))
    check_split(experiment, mesh)
    plan = plan_for(experiment, topology, mesh)
    experiment = plan.experiment
    for field, value, reason in plan.fields:
        print(f"Planned: {field}={value} ({reason})")
    config, _ = model_config_of(experiment)
    for warning in (*plan.warnings, *short_response_warnings(experiment, config)):
        print(f"Warning: {warning}")
    step, reports = check_mesh(experiment, topology, mesh, only)
    show(experiment, topology, mesh, step, reports)
    return as_result(experiment, topology, mesh, step, reports)


def for_topology(experiment: Experiment, topology: Topology) -> Experiment:
    """Return the experiment in the form that is compiled: with the precision that the chips choose.

    Without a GPU, blockwise attention replaces a GPU's kernel.

    Raises:
      UserError: preflight does not support the task.
    """
    if experiment.task in ("pretrain", "difficulty", "traces"):
        raise UserError(f"task='{experiment.task}' has no preflight: choose 'rpt', 'rft' or 'score'.", field="task")
    policy = experiment.policy
    platform = topology.chip.platform
    policy = dataclasses.replace(
        policy,
        dtype=choose_dtype(policy.dtype, platform),
        head_precision=choose_head_precision(policy.head_precision, platform),
        attention=policy.attention if topology.has_compiler else "blockwise",
    )
    return dataclasses.replace(experiment, policy=policy)


def devices(topology: Topology) -> list[Any]:
    """Return the devices that programs are compiled for.

    Raises:
      UserError: the compiler does not know the topology.
    """
    if not topology.has_compiler:
        return jax.devices()
    # Both cores of a v4 form one device, as on real machines.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    if topology.chips < topology.chip.devices_per_host:
        # libtpu assumes whole hosts; a part of one, such as a single chip, has to be described.
        options["chips_per_host_bounds"] = (*topology.sizes, 1)[:3]
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology.name}: libtpu does not know this slice: {reason}", field="--topology"
        ) from None


def plan_for(experiment: Experiment, topology: Topology, mesh: Mesh) -> Plan:
    """Plan the memory fields that a config leaves open, for the chips of a topology.

    Raises:
      UserError: the decode slots do not fit.
    """
    config, _ = model_config_of(experiment)
    sizes = mesh_sizes(mesh)
    memory = int(USABLE * topology.chip.memory)
    plan = plan_memory(experiment, config, sizes, memory)
    if experiment.reinforces:
        check_slots(plan.experiment, config, sizes, memory)
    return plan


def check_mesh(
    experiment: Experiment, topology: Topology, mesh: Mesh, only: Collection[str] = ()
) -> tuple[Step, list[ProgramReport]]:
    """Compile the programs of a step on a mesh, or only those whose names are in `only`; the experiment is planned.

    Raises:
      UserError: the config does not fit the mesh, or it has no program of a name.
    """
    with use_mesh(mesh, experiment.mesh.split_rows):
        step = make_step(experiment, mesh)
        programs = {program.name: program for program in step.programs}
        for name in only:
            if name not in programs:
                raise UserError(
                    f"--programs: this run has no program '{name}'. It has: {', '.join(programs)}.", field="--programs"
                )
        if only:
            step = step._replace(programs=tuple(programs[name] for name in programs if name in only))
    # Outside of the mesh's context: these compute on this machine, and the devices of the mesh may not exist here.
    flops = flops_per_chip(experiment, step)
    of_kernels = kernel_bytes(experiment, step)
    with use_mesh(mesh, experiment.mesh.split_rows):
        return step, check_programs(experiment, step, topology, flops, of_kernels)


def fits(reports: list[ProgramReport]) -> bool:
    """Return whether every program fits."""
    return all(report.fits for report in reports)


def step_seconds(reports: list[ProgramReport]) -> float:
    """Return the estimated time of a step: the sum over the programs that run in every step."""
    return sum(r.times.seconds for r in reports if r.times and r.program not in _BEFORE_FIRST_STEP)


def as_result(
    experiment: Experiment, topology: Topology, mesh: Mesh, step: Step, reports: list[ProgramReport]
) -> dict[str, Any]:
    """Return the JSON record of one mesh."""
    return {
        "fits": fits(reports),
        "topology": topology.name,
        "chips": topology.chips,
        "prompts_per_step": experiment.training.prompts_per_step,
        "compiled_for": "the topology" if topology.has_compiler else "simulated CPU devices",
        "mesh": mesh_fields(mesh),
        "decode_slots": step.decoding.slots if step.decoding else None,
        "estimated_step_seconds": step_seconds(reports),
        "programs": [as_record(report) for report in reports],
    }


def show(experiment: Experiment, topology: Topology, mesh: Mesh, step: Step, reports: list[ProgramReport]) -> None:
    """Print tables of memory, time and collectives, and the conclusion."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh_fields(mesh).items())
    slots = f", {step.decoding.slots} decode slots" if step.decoding else ""
    where = f"{topology.name}, {axes}{slots}"

    # Memory, all programs.
    rows = [
        (
            report.program,
            round(report.compile_seconds, 1),
            *(_gib(size) for size in report.memory),
            _gib(report.memory.total),
            f"{report.memory.total / report.limit:.0%}",
        )
        for report in reports
    ]
    sizes = [f"{kind}, GiB" for kind in (*Memory._fields, "total")]
    columns = ["program", "compiled in s", *sizes, f"of {reports[0].limit / GIB:.4g} GiB"]
    table(f"Memory per chip: {where}", columns, rows)

    # Time, of the programs that compile.
    rows = [
        (
            report.program,
            report.flops / 1e12,
            report.traffic.memory / 1e9,
            sum(report.traffic.sent.values()) / 1e9,
            report.times.compute,
            report.times.memory,
            report.times.network,
            report.times.bound,
        )
        for report in reports
        if report.traffic and report.times
    ]
    columns = ["program", "TFLOPs", "GB of memory", "GB sent", "s compute", "s memory", "s network", "bound by"]
    table(f"Estimated time per chip: {where}", columns, rows)

    # Collectives, of each program the one that sends most first.
    rows = [
        (
            report.program,
            collective.kind,
            collective.size,
            "yes" if collective.in_host else "no",
            round(report.traffic.runs[collective]),
            sent / 1e9,
        )
        for report in reports
        if report.traffic
        for collective, sent in sorted(report.traffic.sent.items(), key=lambda item: -item[1])
    ]
    if rows:
        table("Collectives", ["program", "kind", "group size", "within a host", "runs", "GB sent per chip"], rows)
    _print_conclusion(experiment, topology, reports)


def _print_conclusion(experiment: Experiment, topology: Topology, reports: list[ProgramReport]) -> None:
    """Print how the figures were obtained, advice for the programs that do not fit, and whether the run fits."""
    print(
        "\nFLOPs come from a formula; bytes and collectives come from the compiled programs, with loops counted as often as they "
        "run at full prompt and response lengths. Times are estimates at published figures: the longest part counts."
    )
    if not topology.has_compiler:
        print(
            f"There is no compiler for {topology.kind} here: memory, bytes and collectives are estimates from {topology.chips} "
            "simulated CPU devices with blockwise attention."
        )
    for report in reports:
        if report.least_memory and report.traffic:
            print(
                f"{report.program}: {report.traffic.memory / report.least_memory:.2f} times the memory traffic of reading all "
                "weights and filled keys once per decode step."
            )
    unknown = sorted(set().union(*(r.traffic.unknown_loops for r in reports if r.traffic)))
    if unknown:
        print(f"Loops with an unknown trip count, counted once: {', '.join(unknown)}.")
    for report in reports:
        if not report.fits:
            print(
                f"{report.program}: {_gib(report.memory.total - report.limit):.2f} GiB per chip too much: {report.advice}."
            )
    if not fits(reports):
        print("It does not fit.")
        return
    seconds = step_seconds(reports)
    print("It fits." + (f" These take at least {seconds:.4g} s per step (estimate)." if experiment.reinforces else ""))
    budget = experiment.training.seconds_budget
    if experiment.reinforces and budget and seconds:
        steps = min(experiment.training.total_steps, math.ceil(budget / seconds))
        print(f"training.seconds_budget={budget:g} allows at most {steps:,} steps (estimate).")


def _gib(size: float) -> float:
    return round(size / GIB, 3)
