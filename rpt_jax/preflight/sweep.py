"""Compare meshes and numbers of decode slots by their estimated step time, and recommend one that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.describe import derive
from rpt_jax.distributed.mesh import make_mesh, mesh_fields
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.preflight.check import GIB, ProgramReport
from rpt_jax.preflight.programs import ProgramName, Step
from rpt_jax.preflight.report import (
    as_result,
    check_mesh,
    devices,
    fits,
    for_topology,
    plan_for,
    step_seconds,
)
from rpt_jax.preflight.topology import Topology
from rpt_jax.rollout.memory import USABLE
from rpt_jax.setup import check_split
from rpt_jax.sizes.policy import model_config_of

# Values of mesh.data that are tried: replicas of the parameters.
_REPLICAS = (1, 2, 4)
# Fractions of all rollouts that are live at once, as divisors. Fewer live rollouts read the weights more often, so they are
# tried only if more do not fit.
_SLOT_DIVISORS = (1, 2, 4, 8)


class Trial(NamedTuple):
    """The result of one mesh, with the most decode slots that fit.

    Attributes:
      mesh: the mesh.
      step: the compiled step, None if arithmetic already ruled it out.
      reports: reports of its programs; empty without a step.
      note: why it does not fit, else "".
    """

    mesh: Mesh
    step: Step | None
    reports: list[ProgramReport]
    note: str

    @property
    def fits(self) -> bool:
        """Whether every program of the step compiles and fits."""
        return bool(self.reports) and fits(self.reports)


def sweep(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """Try the meshes of a topology, print a table, recommend the fastest and return the JSON record.

    Raises:
      UserError: no mesh of the topology divides the policy and the batches.
    """
    # Compile for each mesh. That takes minutes, so report progress.
    experiment = for_topology(experiment, topology)
    trials = []
    for mesh in meshes(experiment, topology):
        trials.append(try_mesh(_with_mesh(experiment, mesh), topology, mesh))
        print(f"{_format_mesh(mesh)}: {_format_outcome(trials[-1])}", flush=True)
    if not trials:
        raise UserError(
            f"--topology={topology.name}: no mesh of {topology.chips} chips divides the policy and the batches.",
            field="--topology",
        )

    # Compare.
    columns = [
        "data x fsdp x tensor, rollout",
        "decode slots",
        "fits",
        "peak memory",
        "s sample",
        "s update",
        "s per step",
        "note",
    ]
    table(f"Meshes of {topology.name}, estimated times", columns, [_row(trial) for trial in trials])

    # Recommend the fastest mesh that fits.
    best = min((t for t in trials if t.fits), key=lambda t: step_seconds(t.reports), default=None)
    result: dict[str, Any] = {"fits": best is not None, "topology": topology.name, "recommended": None}
    if best and best.step:
        slots = f" --config.rollout.decode_slots={best.step.decoding.slots}" if best.step.decoding else ""
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh_fields(best.mesh).items())
        result["recommended"] = as_result(experiment, topology, best.mesh, best.step, best.reports)
        print(f"\nRecommended: {mesh}{slots}, at least {step_seconds(best.reports):.4g} s per step (estimate).")
    else:
        print("\nNo mesh fits: use more chips, chips with more memory, or shorter prompts and responses.")
    tried = [as_result(experiment, topology, t.mesh, t.step, t.reports) for t in trials if t.step]
    return result | {"tried": tried}


def meshes(experiment: Experiment, topology: Topology) -> Iterator[Mesh]:
    """Yield the meshes of all chips whose axes divide the policy's kv heads and the batches, largest tensor axis first."""
    config, _ = model_config_of(experiment)
    chips = devices(topology)
    for tensor in (t for t in range(config.kv_heads, 0, -1) if config.kv_heads % t == 0):
        for data in _REPLICAS:
            if topology.chips % (tensor * data) or config.width % (topology.chips // (tensor * data)):
                continue
            # For sampling, also try to keep each replica within a host.
            for rollout_tensor in dict.fromkeys((tensor, min(tensor, topology.chip.devices_per_host))):
                try:
                    mesh = make_mesh(data, -1, tensor, chips, rollout_tensor)
                    check_split(experiment, mesh)
                except UserError:
                    continue
                yield mesh


def try_mesh(experiment: Experiment, topology: Topology, mesh: Mesh) -> Trial:
    """Compile all programs for a mesh, and sampling again with fewer decode slots until it fits."""
    # Do not compile what is known to be too large.
    needed = derive(experiment, mesh.size, USABLE * topology.chip.memory).peak_bytes_per_device
    if needed > topology.chip.memory:
        return Trial(mesh=mesh, step=None, reports=[], note=f"needs {needed / GIB:.0f} GiB by arithmetic alone")

    rollouts = experiment.training.prompts_per_step * experiment.rollout.samples_per_prompt
    trial = Trial(mesh=mesh, step=None, reports=[], note="")
    for divisor in _SLOT_DIVISORS if experiment.reinforces else _SLOT_DIVISORS[:1]:
        rollout = dataclasses.replace(experiment.rollout, decode_slots=rollouts // divisor)
        candidate = dataclasses.replace(experiment, rollout=rollout)
        # Decode slots change the sampling program alone: keep the reports of the others.
        only = (ProgramName.SAMPLE,) if trial.reports else ()
        try:
            step, reports = check_mesh(plan_for(candidate, topology, mesh).experiment, topology, mesh, only)
        except UserError as error:
            trial = trial._replace(note=str(error).split(":")[0])
            continue
        unchanged = [report for report in trial.reports if report.program != ProgramName.SAMPLE]
        trial = Trial(mesh=mesh, step=step, reports=[*unchanged, *reports], note="")
        if [report.program for report in trial.reports if not report.fits] != [ProgramName.SAMPLE]:
            break
    advice = [f"{report.program}: {report.advice}" for report in trial.reports if not report.fits]
    return trial._replace(note="; ".join(advice) or trial.note)


def _with_mesh(experiment: Experiment, mesh: Mesh) -> Experiment:
    return dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, **mesh_fields(mesh)))


def _format_mesh(mesh: Mesh) -> str:
    sizes = mesh_fields(mesh)
    return f"{sizes['data']} x {sizes['fsdp']} x {sizes['tensor']}, {sizes['rollout_tensor']}"


def _format_outcome(trial: Trial) -> str:
    return f"{step_seconds(trial.reports):.4g} s per step" if trial.fits else f"does not fit, {trial.note}"


def _row(trial: Trial) -> tuple[Any, ...]:
    seconds = {report.program: f"{report.times.seconds:.4g}" for report in trial.reports if report.times}
    peak = max((report.memory.total / report.limit for report in trial.reports), default=0.0)
    return (
        _format_mesh(trial.mesh),
        trial.step.decoding.slots if trial.step and trial.step.decoding else "-",
        "yes" if trial.fits else "no",
        f"{peak:.0%}" if trial.reports else "-",
        seconds.get(ProgramName.SAMPLE, "-"),
        seconds.get(ProgramName.UPDATE, "-"),
        f"{step_seconds(trial.reports):.4g}" if trial.fits else "-",
        trial.note,
    )
