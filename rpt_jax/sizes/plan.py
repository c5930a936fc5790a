"""Values of memory fields that the config leaves open, planned from the policy and the memory of a device.

A plan is a function of the config, the mesh and the memory: a run that is resumed on the same devices has the same plan. Planned
fields change speed and memory, and results by rounding at most.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.config.derived import cold_start_experiment, evaluation_experiment
from rpt_jax.distributed.processes import least_of_all
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.rollout.memory import device_memory, plan_slots
from rpt_jax.sizes.limits import short_response_warnings
from rpt_jax.sizes.memory import FLOAT32_BYTES, pretrain_memory, rollout_bytes, rpt_memory
from rpt_jax.sizes.mesh import MeshSizes, mesh_sizes
from rpt_jax.sizes.policy import model_config_of

logger = logging.getLogger(__name__)

GIB = 2**30
# What a backward pass and the gradients take, as a multiple of the named arrays: it was 0.9 to 1.6 in the programs that were
# compiled for docs/results/preflight.md.
_XLA_FACTOR = 1.6
# Longer rows do not make an update faster. Shorter ones than the second number do, so rather recompute activations.
_ROW_TOKENS = 16_384
_SHORT_ROW_TOKENS = 8_192
_ROW_MULTIPLE = 128
_REMATS = ("none", "dots", "full")  # From the fastest to the one that needs least memory.
_LOGIT_CHUNKS = (4096, 2048, 1024, 512, 256)
_LOGIT_COPIES = 2  # Logits and their gradient.
_LOGIT_SHARE = 1 / 8  # Of the memory, for logits.


class PlannedField(NamedTuple):
    """A memory field that the config leaves open.

    Attributes:
      field: its name.
      value: the planned value.
      reason: why.
    """

    field: str
    value: int | str
    reason: str


class Plan(NamedTuple):
    """An experiment whose memory fields have values, as far as its task uses them.

    Attributes:
      experiment: the config with the planned values.
      fields: those that the config left open.
      warnings: what the plan could not achieve.
    """

    experiment: Experiment
    fields: tuple[PlannedField, ...]
    warnings: tuple[str, ...]


def plan_run(experiment: Experiment, mesh: Mesh) -> Experiment:
    """Return the experiment with every memory field planned for this machine; log the plan, and warn of what will not work.

    Raises:
      UserError: the decode slots that the config sets do not fit.
    """
    config, _ = model_config_of(experiment)
    sizes = mesh_sizes(mesh)
    memory = _usable_memory()
    plan = plan_memory(experiment, config, sizes, memory)
    if experiment.reinforces:
        check_slots(plan.experiment, config, sizes, memory)
    if plan.fields:
        values = "; ".join(f"{field}={value}, {reason}" for field, value, reason in plan.fields)
        logger.info("Planned for %.4g GiB per device: %s.", memory / GIB, values)
    for warning in (*plan.warnings, *short_response_warnings(experiment, config)):
        logger.warning(warning)
    return plan.experiment


def plan_evaluation(experiment: Experiment, mesh: Mesh) -> Experiment:
    """Return the experiment with the sampling of its evaluations, see `evaluation_experiment`.

    Longer responses and more prompts than in training take more memory, so fewer responses may be decoded at the same time.

    Args:
      experiment: a config whose memory fields are planned.
      mesh: the mesh.
    """
    evaluation = evaluation_experiment(experiment)
    longer = evaluation.rollout.max_new_tokens > experiment.rollout.max_new_tokens
    if not longer and evaluation.training.prompts_per_step <= experiment.training.prompts_per_step:
        return evaluation
    config, _ = model_config_of(experiment)
    fitting, _ = _plan_decode_slots(evaluation, config, mesh_sizes(mesh), _usable_memory())
    slots = min(fitting, experiment.rollout.decode_slots)
    return dataclasses.replace(evaluation, rollout=dataclasses.replace(evaluation.rollout, decode_slots=slots))


def _usable_memory() -> int:
    """Return the bytes of the device with the least memory. A collective: every process must call it."""
    return least_of_all(device_memory() // 2**20) * 2**20


def plan_memory(experiment: Experiment, config: ModelConfig, mesh: MeshSizes, memory: float) -> Plan:
    """Plan the memory fields that a config leaves open and that its task uses.

    Args:
      experiment: the config.
      config: of the policy.
      mesh: the mesh.
      memory: bytes to plan with on each device; may be infinite.
    """
    fields: dict[str, PlannedField] = {}
    warnings: list[str] = []
    planned = experiment

    def set_field(name: str, value: int | str, reason: str) -> None:
        nonlocal planned
        section, field = name.split(".")
        planned = dataclasses.replace(
            planned, **{section: dataclasses.replace(getattr(planned, section), **{field: value})}
        )
        fields[name] = PlannedField(field=name, value=value, reason=reason)

    logit_bytes = _LOGIT_COPIES * FLOAT32_BYTES * config.vocab // mesh.tensor
    if not experiment.training.logit_chunk_tokens:
        fitting = (chunk for chunk in _LOGIT_CHUNKS if chunk * logit_bytes <= _LOGIT_SHARE * memory)
        set_field(
            "training.logit_chunk_tokens",
            next(fitting, _LOGIT_CHUNKS[-1]),
            f"logits take at most {_LOGIT_SHARE:.3g} of the memory",
        )

    if not experiment.rollout.decode_slots and experiment.samples and not experiment.reinforces:
        set_field("rollout.decode_slots", *_plan_decode_slots(planned, config, mesh, memory))
        if _fitting_slots(planned, config, mesh, memory) < 1:
            warnings.append(
                f"Sampling needs more than the {memory / GIB:.4g} GiB per device: split the policy over more devices "
                "(mesh.rollout_tensor), or shorten prompts and responses (prompt.max_tokens, rollout.max_new_tokens)."
            )
    if experiment.task in ("score", "difficulty", "traces"):
        return Plan(experiment=planned, fields=tuple(fields.values()), warnings=tuple(warnings))

    # The backward pass: the fastest rematerialization that fits, with rows that are not short.
    needs = _backward_needs(planned, config, mesh)
    remats = _REMATS if experiment.policy.remat == "auto" else (experiment.policy.remat,)
    rows = _row_sizes(experiment, mesh)
    remat, row = _choose(remats, rows, lambda remat, row: all(need(remat, row) <= memory for need in needs))
    needed = max(need(remat, row) for need in needs)
    reason = f"the update needs {needed / GIB:.3g} GiB of {memory / GIB:.4g}"
    if experiment.policy.remat == "auto":
        set_field("policy.remat", remat, reason)
    if not experiment.training.microbatch_tokens and experiment.reinforces:
        set_field("training.microbatch_tokens", row, reason)
    if needed > memory:
        warnings.append(
            f"The update needs about {needed / GIB:.4g} GiB per device, but there are {memory / GIB:.4g}: shard the policy over "
            "more devices (mesh.fsdp, mesh.tensor), or shorten prompts and responses (prompt.max_tokens, rollout.max_new_tokens)."
        )

    if experiment.reinforces:
        if not experiment.training.logit_chunk_tokens:
            row = planned.training.microbatch_tokens
            kept = dataclasses.replace(planned, training=dataclasses.replace(planned.training, logit_chunk_tokens=row))
            fits = all(need(remat, row) <= memory for need in _backward_needs(kept, config, mesh))
            if row > planned.training.logit_chunk_tokens and fits and row * logit_bytes <= _LOGIT_SHARE * memory:
                set_field("training.logit_chunk_tokens", row, "the update keeps all logits of a row")
        slots = experiment.rollout.decode_slots
        rollouts = _rollouts_per_replica(experiment, mesh) * mesh.rollout_replicas
        if not slots:
            set_field("rollout.decode_slots", *_plan_decode_slots(planned, config, mesh, memory))
        elif slots > rollouts:
            warnings.append(
                f"rollout.decode_slots={slots:,} is more than the {rollouts:,} rollouts of a step (training.prompts_per_step × "
                f"rollout.samples_per_prompt): only {rollouts:,} slots are used. Lower it, or set it to 0."
            )
    return Plan(experiment=planned, fields=tuple(fields.values()), warnings=tuple(warnings))


def check_slots(experiment: Experiment, config: ModelConfig, mesh: MeshSizes, memory: int) -> None:
    """Raise UserError if the decode slots of an experiment do not fit in `memory` bytes per device."""
    replicas = mesh.rollout_replicas
    plan_slots(
        requested=-(-experiment.rollout.decode_slots // replicas),
        rollouts=_rollouts_per_replica(experiment, mesh),
        memory=rollout_bytes(experiment, config, mesh),
        resident=_resident(experiment, config, mesh),
        available=memory,
    )


def _plan_decode_slots(experiment: Experiment, config: ModelConfig, mesh: MeshSizes, memory: float) -> tuple[int, str]:
    """Return as many decode slots as fit, over all replicas and at least one for each, and the reason."""
    rollouts = _rollouts_per_replica(experiment, mesh)
    fitting = _fitting_slots(experiment, config, mesh, memory)
    if fitting >= rollouts:
        return rollouts * mesh.rollout_replicas, "all rollouts of a step fit"
    rollout = rollout_bytes(experiment, config, mesh)
    free = memory - _resident(experiment, config, mesh)
    reason = f"{rollout.per_slot / GIB:.3g} GiB each, {rollout.fixed / GIB:.3g} for prompts, {free / GIB:.4g} free"
    return max(fitting, 1) * mesh.rollout_replicas, reason


def _fitting_slots(experiment: Experiment, config: ModelConfig, mesh: MeshSizes, memory: float) -> int:
    """Return how many rollouts a replica can decode at once."""
    free = memory - _resident(experiment, config, mesh)
    if math.isinf(free):
        return _rollouts_per_replica(experiment, mesh)
    return rollout_bytes(experiment, config, mesh).slots_within(int(free))


def _rollouts_per_replica(experiment: Experiment, mesh: MeshSizes) -> int:
    prompts = -(-experiment.training.prompts_per_step // mesh.rollout_replicas)
    return prompts * experiment.rollout.samples_per_prompt


def _resident(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> int:
    """Return the bytes per device that are in use while rollouts are sampled, apart from the rollouts."""
    memory = rpt_memory(experiment, config, mesh)
    state = memory.state.total
    if not experiment.reinforces:  # The policy alone, without a reference and an optimizer.
        state = memory.state.frozen + memory.state.parameters_and_reference // 2
    return state + memory.sampling.resharded_parameters


def _backward_needs(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> list[Callable[[str, int], float]]:
    """Return functions of (remat, tokens of a row) that estimate the bytes per device of each update of a run."""

    def with_values(base: Experiment, remat: str, row: int) -> Experiment:
        policy = dataclasses.replace(base.policy, remat=remat)
        training = dataclasses.replace(base.training, microbatch_tokens=row)
        return dataclasses.replace(base, policy=policy, training=training)

    def update(remat: str, row: int) -> float:
        memory = rpt_memory(with_values(experiment, remat, row), config, mesh)
        temporary = memory.update.gradients + memory.update.backward.total
        return memory.state.total + memory.update.state_before_step + _XLA_FACTOR * temporary

    def pretraining(base: Experiment, remat: str, row: int) -> float:
        memory = pretrain_memory(with_values(base, remat, row), config, mesh)
        return (
            memory.frozen
            + memory.parameters
            + memory.adam_moments
            + _XLA_FACTOR * (memory.gradients + memory.backward.total)
        )

    if experiment.task == "pretrain":
        return [lambda remat, row: pretraining(experiment, remat, row)]
    if not experiment.cold_start.total_steps:
        return [update]
    cold_start = cold_start_experiment(experiment)
    return [update, lambda remat, row: pretraining(cold_start, remat, row)]


def _row_sizes(experiment: Experiment, mesh: MeshSizes) -> list[int]:
    """Return the tokens per row to try, the most first: those that the config sets, or halves of a good size."""
    training = experiment.training
    if training.microbatch_tokens:
        return [training.microbatch_tokens]
    prompt = experiment.prompt.max_tokens
    responses = experiment.rollout.samples_per_prompt * experiment.rollout.max_new_tokens
    least = prompt + experiment.rollout.max_new_tokens
    prompts = mesh.max_per_batch_shard(-(-training.prompts_per_step // training.minibatches_per_step))
    most = max(least, min(_ROW_TOKENS, prompts * (prompt + responses)))
    multiple = math.lcm(_ROW_MULTIPLE, mesh.tensor)
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    return [-(-size // multiple) * multiple for size in sizes]


def _choose(remats: Sequence[str], rows: Sequence[int], fits: Callable[[str, int], bool]) -> tuple[str, int]:
    """Return the fastest rematerialization and the longest row that fit, or those that need least.

    Rows are made short only where nothing else is left.
    """
    long_rows = [row for row in rows if row >= _SHORT_ROW_TOKENS] or rows[:1]
    tried = [(remat, row) for remat in remats for row in long_rows]
    tried += [(remats[-1], row) for row in rows]
    return next((choice for choice in tried if fits(*choice)), (remats[-1], rows[-1]))
