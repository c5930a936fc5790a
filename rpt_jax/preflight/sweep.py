"""Which mesh, and how many decode slots: those that fit are compared by the step time that they imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.describe import describe, model_config_of
from rpt_jax.distributed.mesh import make_mesh, mesh_fields
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.preflight.programs import Step
from rpt_jax.preflight.report import as_result, check_split, devices, fits, for_topology, judge, step_seconds
from rpt_jax.preflight.topology import Topology
from rpt_jax.preflight.verdict import Verdict

_REPLICAS = (1, 2, 4)  # Of the parameters, where there is room for them: values of mesh.data.
_SHARES = (1, 2, 4, 8)  # Of all rollouts, that are live at once: fewer read the weights more often, and are tried last.


class Trial(NamedTuple):
    """A mesh as it came out, with the most decode slots that fit: none compiled, where arithmetic refused it."""

    mesh: Mesh
    step: Step | None
    verdicts: list[Verdict]
    note: str

    @property
    def fits(self) -> bool:
        return bool(self.verdicts) and fits(self.verdicts)


def sweep(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """Try the meshes of a topology, print a table of them, and recommend one. Raises: UserError, where there is none to try."""
    experiment = for_topology(experiment, topology)
    trials = []
    for mesh in meshes(experiment, topology):
        trials.append(try_mesh(_on(experiment, mesh), topology, mesh))
        print(f"{_words(mesh)}: {_outcome(trials[-1])}", flush=True)
    if not trials:
        raise UserError(
            f"--topology={topology.name}: no mesh of {topology.count} chips divides the policy and the batch."
        )
    rows = [_row(trial) for trial in trials]
    columns = [
        "data x fsdp x tensor, decoding",
        "decode slots",
        "fits",
        "fullest",
        "s sample",
        "s update",
        "s a step",
        "note",
    ]
    table(f"Meshes of {topology.name}, times estimated", columns, rows)
    best = min((t for t in trials if t.fits), key=lambda t: step_seconds(t.verdicts), default=None)
    result = {"fits": best is not None, "topology": topology.name, "recommended": None}
    if best:
        slots = f" --config.rollout.decode_slots={best.step.decoding.slots}" if best.step.decoding else ""
        chosen = " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh_fields(best.mesh).items())
        result["recommended"] = as_result(experiment, topology, best.mesh, best.step, best.verdicts)
        print(f"\nRecommended: {chosen}{slots}, {step_seconds(best.verdicts):.4g} s a step or more (estimate).")
    else:
        print("\nNone fits: take more chips, or chips with more memory, or shorter prompts and responses.")
    tried = [as_result(experiment, topology, t.mesh, t.step, t.verdicts) for t in trials if t.step]
    return result | {"tried": tried}


def meshes(experiment: Experiment, topology: Topology) -> Iterator[Mesh]:
    """Meshes of all chips whose axes divide the policy's kv heads and the batches, by the most tensor parallelizm first."""
    shape, here = model_config_of(experiment)[0], devices(topology)
    for tensor in (t for t in range(shape.kv_heads, 0, -1) if shape.kv_heads % t == 0):
        for data in _REPLICAS:
            if topology.count % (tensor * data) or shape.width % (topology.count // (tensor * data)):
                continue
            # While it samples, a policy may also be shared by no more chips than a host has.
            for together in dict.fromkeys((tensor, min(tensor, topology.chip.host))):
                try:
                    mesh = make_mesh(data, -1, tensor, here, together)
                    check_split(experiment, mesh)
                except UserError:
                    continue
                yield mesh


def try_mesh(experiment: Experiment, topology: Topology, mesh: Mesh) -> Trial:
    """Compile everything for a mesh, and sampling for ever fewer slots until it fits."""
    needed = max(row.value for row in describe(experiment, mesh.size) if row.what.startswith("bytes per device"))
    if needed > topology.chip.memory:
        return Trial(mesh, None, [], f"needs {needed / 2**30:.0f} GiB by arithmetic alone")
    rollouts = experiment.training.prompts_per_step * experiment.rollout.samples_per_prompt
    trial = Trial(mesh, None, [], "")
    for share in _SHARES if experiment.task == "rpt" else _SHARES[:1]:
        rollout = dataclasses.replace(experiment.rollout, decode_slots=rollouts // share)
        asked = dataclasses.replace(experiment, rollout=rollout)
        try:
            step, verdicts = judge(asked, topology, mesh, "sample" if trial.verdicts else "")
        except UserError as error:
            trial = trial._replace(note=str(error).split(":")[0])
            continue
        known = [v for v in trial.verdicts if v.program != "sample"]
        trial = Trial(mesh, step, [*known, *verdicts], "")
        misfits = [v.program for v in trial.verdicts if not v.fits]
        if misfits != ["sample"]:
            break
    misfits = [f"{v.program}: {v.advice}" for v in trial.verdicts if not v.fits]
    return trial._replace(note="; ".join(misfits) or trial.note)


def _on(experiment: Experiment, mesh: Mesh) -> Experiment:
    return dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, **mesh_fields(mesh)))


def _words(mesh: Mesh) -> str:
    *sizes, together = mesh_fields(mesh).values()
    return f"{' x '.join(map(str, sizes))}, {together}"


def _outcome(trial: Trial) -> str:
    return f"{step_seconds(trial.verdicts):.4g} s a step" if trial.fits else f"does not fit, {trial.note}"


def _row(trial: Trial) -> tuple[Any, ...]:
    seconds = {v.program: f"{v.times.seconds:.4g}" for v in trial.verdicts if v.times}
    fullest = max((v.memory.total / v.limit for v in trial.verdicts), default=0.0)
    slots = trial.step.decoding.slots if trial.step and trial.step.decoding else "-"
    whole = f"{step_seconds(trial.verdicts):.4g}" if trial.fits else "-"
    parts = (seconds.get(name, "-") for name in ("sample", "update"))
    share = f"{fullest:.0%}" if trial.verdicts else "-"
    return _words(trial.mesh), slots, "yes" if trial.fits else "no", share, *parts, whole, trial.note
