"""One mesh, or several, tried on a topology: what is printed, and what `--json` writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.distributed.mesh import check_batches, mesh_fields, use_mesh
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.preflight.costs import flops_a_chip
from rpt_jax.preflight.programs import Step, make_step
from rpt_jax.preflight.topology import Topology
from rpt_jax.preflight.verdict import GIB, Memory, Verdict, as_record, judge_step
from rpt_jax.rollout.memory import USABLE
from rpt_jax.setup import check_sampling, mesh_of

_ONCE = ("score",)  # Before the first step, and not in each.


def preflight(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """Compile for the config's mesh, print all, and return it. Raises: UserError, where the config does not fit the topology."""
    experiment = for_topology(experiment, topology)
    mesh = mesh_of(experiment.mesh, devices(topology))
    check_split(experiment, mesh)
    step, verdicts = judge(experiment, topology, mesh)
    show(experiment, topology, mesh, step, verdicts)
    return as_result(experiment, topology, mesh, step, verdicts)


def for_topology(experiment: Experiment, topology: Topology) -> Experiment:
    """The experiment as it can be compiled here: a GPU's attention kernel cannot be without one.

    Raises: UserError, where its task has no preflight.
    """
    if experiment.task == "pretrain":
        raise UserError("task='pretrain' has no preflight: it knows the programs of 'rpt' and 'score'.")
    if topology.is_compiled_for:
        return experiment
    return dataclasses.replace(experiment, policy=dataclasses.replace(experiment.policy, attention="blockwise"))


def devices(topology: Topology) -> list[Any]:
    """The devices that programs are compiled for. Raises: UserError, where the compiler knows no such topology."""
    if not topology.is_compiled_for:
        return jax.devices()
    # Both cores of a v4 are one device, as on machines that have them.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    if topology.count < topology.chip.host:
        # A part of a host, such as one chip: libtpu takes hosts to be whole.
        options["chips_per_host_bounds"] = (*topology.sizes, 1)[:3]
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology.name}: libtpu knows no such slice: {str(error).splitlines()[0]}"
        ) from None


def judge(experiment: Experiment, topology: Topology, mesh: Mesh, only: str = "") -> tuple[Step, list[Verdict]]:
    """Compile the programs of a step on a mesh, or the one called `only`.

    Raises: UserError, where the config does not fit the mesh, or not even the plan of its decode slots.
    """
    with use_mesh(mesh, experiment.mesh.split_rows):
        step = make_step(experiment, mesh, int(USABLE * topology.chip.memory))
        step = step._replace(programs=tuple(p for p in step.programs if only in ("", p.name)))
    # Outside of a mesh whose devices are not here: it runs an operation or two.
    flops = flops_a_chip(experiment, step)
    with use_mesh(mesh, experiment.mesh.split_rows):
        return step, judge_step(experiment, step, topology, flops)


def fits(verdicts: list[Verdict]) -> bool:
    """Whether every program does."""
    return all(verdict.fits for verdict in verdicts)


def step_seconds(verdicts: list[Verdict]) -> float:
    """What the programs of a step imply together."""
    return sum(v.times.seconds for v in verdicts if v.times and v.program not in _ONCE)


def as_result(
    experiment: Experiment, topology: Topology, mesh: Mesh, step: Step, verdicts: list[Verdict]
) -> dict[str, Any]:
    """What `--json` writes of one mesh."""
    return {
        "fits": fits(verdicts),
        "topology": topology.name,
        "chips": topology.count,
        "prompts_per_step": experiment.training.prompts_per_step,
        "compiled_for": "the topology" if topology.is_compiled_for else "simulated CPU devices",
        "mesh": mesh_fields(mesh),
        "decode_slots": step.decoding.slots if step.decoding else None,
        "estimated_step_seconds": step_seconds(verdicts),
        "programs": [as_record(verdict) for verdict in verdicts],
    }


def show(experiment: Experiment, topology: Topology, mesh: Mesh, step: Step, verdicts: list[Verdict]) -> None:
    """Print tables of memory and time, the collectives, and the verdict in a sentence or two."""
    arranged = " x ".join(f"{name} {size}" for name, size in mesh_fields(mesh).items())
    slots = f", {step.decoding.slots} decode slots" if step.decoding else ""
    where = f"{topology.name}, {arranged}{slots}"
    rows = [
        (
            v.program,
            round(v.compile_seconds, 1),
            *(_gib(size) for size in v.memory),
            _gib(v.memory.total),
            f"{v.memory.total / v.limit:.0%}",
        )
        for v in verdicts
    ]
    kinds = [*Memory._fields, "total"]
    columns = ["program", "compiled in s", *(f"{kind}, GiB" for kind in kinds), f"of {verdicts[0].limit / GIB:.4g} GiB"]
    table(f"Memory a chip: {where}", columns, rows)
    rows = [
        (v.program, v.flops / 1e12, v.moved.memory / 1e9, sum(v.moved.sent.values()) / 1e9, *v.times, v.times.bound)
        for v in verdicts
        if v.times
    ]
    columns = ["program", "TFLOPs", "GB of memory", "GB sent", "s compute", "s memory", "s network", "bound by"]
    table(f"Time a chip, estimated: {where}", columns, rows)
    rows = [
        (v.program, c.kind, c.size, "yes" if c.in_host else "no", round(v.moved.runs[c]), sent / 1e9)
        for v in verdicts
        if v.moved
        for c, sent in sorted(v.moved.sent.items(), key=lambda item: -item[1])
    ]
    if rows:
        table("Collectives", ["program", "kind", "among", "in a host", "runs", "GB sent a chip"], rows)
    _conclude(experiment, topology, verdicts)


def _conclude(experiment: Experiment, topology: Topology, verdicts: list[Verdict]) -> None:
    print(
        "\nFLOPs are a formula's; bytes and collectives the compiled program's, loops as often as they run with every prompt and "
        "response of full length. Times are estimates: each part at the maker's figures, the longest of them the whole."
    )
    if not topology.is_compiled_for:
        print(
            f"There is no compiler for {topology.kind} here: memory, bytes and collectives are those of {topology.count} "
            "simulated CPU devices with blockwise attention, and are estimates, too."
        )
    unknown = sorted(set().union(*(v.moved.guessed for v in verdicts if v.moved)))
    if unknown:
        print(f"Counted once, because nothing says how often they run: loops of {', '.join(unknown)}.")
    for v in verdicts:
        if not v.fits:
            print(f"{v.program}: {_gib(v.memory.total - v.limit):.2f} GiB a chip too much: {v.advice}.")
    if fits(verdicts):
        seconds = step_seconds(verdicts)
        said = f" A step takes {seconds:.4g} s or more (estimate)." if experiment.task == "rpt" else ""
        print(f"It fits.{said}")
    else:
        print("It does not fit.")


def check_split(experiment: Experiment, mesh: Mesh) -> None:
    """Raises: UserError, where what the experiment runs does not split evenly over the mesh."""
    check_batches(mesh, {"data.score_batch_windows": experiment.data.score_batch_windows})
    if experiment.task == "rpt":
        check_sampling(experiment, mesh)


def _gib(size: float) -> float:
    return round(size / GIB, 3)
