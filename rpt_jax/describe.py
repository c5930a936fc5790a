"""What a config comes to: sizes, tokens, compute and memory, by arithmetic alone.

Nothing is run and no array of the run's size is made, so a config for a pod can be described on a laptop.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rpt_jax.config import Experiment, MeshConfig
from rpt_jax.distributed.mesh import resharding_axis_sizes
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.infra.optimizer import make_schedule
from rpt_jax.model.model_config import ModelConfig, check_preset, preset
from rpt_jax.registry import REWARDS
from rpt_jax.rollout.memory import cache_bytes
from rpt_jax.setup import cold_start_of
from rpt_jax.weights.hf import load_model_config

_FLOAT32 = 4  # Bytes.
_BYTES = "bytes"  # Begins the name of every row whose value is a size in memory or on disk.
_SAMPLES = "rollout.samples_per_prompt"
_PROMPTS = "training.prompts_per_step"
_MICROBATCH = "training.microbatch_tokens"
_WEIGHTS = "policy, mesh.fsdp, mesh.tensor"


class Row(NamedTuple):
    """A derived quantity: what it is, its value, and the config fields (or whole sections) that it comes from."""

    what: str
    value: int | float | str
    fields: str


class _Mesh(NamedTuple):
    """Devices along each axis, and into how many parts they split a batch and a matrix."""

    data: int
    fsdp: int
    tensor: int
    rollout_tensor: int

    @property
    def replicas(self) -> int:
        """Parts of a batch while the policy samples."""
        return self.batch_ways * self.tensor // self.rollout_tensor

    @property
    def batch_ways(self) -> int:
        return self.data * self.fsdp

    @property
    def weight_ways(self) -> int:
        return self.fsdp * self.tensor

    def share(self, count: int) -> int:
        """The part of `count` prompts or documents that falls to the fullest device."""
        return -(-count // self.batch_ways)


class _Tree(NamedTuple):
    """A stem and what branches off it: a prompt and its G responses, or a document and its rows of traces.

    The stem runs once for all its branches, and before them.
    """

    stem: int
    branches: int
    length: int

    @property
    def tokens(self) -> int:
        return self.stem + self.branches * self.length

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the stem, and of all branches: tokens, and pairs of one of them with a key that it is compared with."""
        branch_tokens = self.branches * self.length
        return (self.stem, self.stem**2), (branch_tokens, branch_tokens * (self.stem + self.length))

    @property
    def pairs(self) -> int:
        return sum(pairs for _, pairs in self.parts)


def print_description(experiment: Experiment, devices: int | None = None) -> None:
    """Print `describe` for `devices`, or for those that are here. Raises: UserError, as `describe` does."""
    rows = describe(experiment, jax.device_count() if devices is None else devices)
    readable = [(r.what, _size(r.value) if r.what.startswith(_BYTES) else r.value, r.fields) for r in rows]
    table("What this config comes to", ("quantity", "value", "derived from"), readable)


def describe(experiment: Experiment, devices: int) -> list[Row]:
    """Derive every size of an experiment on `devices` devices.

    Lengths are the limits of the config: tokens, FLOPs and caches are what a step takes where every prompt and every
    response is as long as it may be. FLOPs are 2 a token and matmul parameter forward and 6 forward and backward, and
    the attention's by its pairs of query and key, hidden ones included since they are computed; what rematerialization
    repeats, scoring and evaluation are left out. Memory is what the arrays named take; XLA's temporaries come on top.

    Raises: UserError, where the mesh, the preset, the policy's config.json or the schedule is at fault.
    """
    shape, source = model_config_of(experiment)
    mesh = _resolve(experiment.mesh, devices)
    rows = [
        Row("policy: layers x width, vocabulary", f"{shape.layers} x {shape.width}, {shape.vocab}", source),
        Row("parameters", shape.parameters, "policy"),
        Row("parameters that a token is multiplied with (N)", shape.matmul_parameters, "policy"),
        Row("mesh: data x fsdp x tensor", _mesh_text(mesh, devices), "mesh"),
    ]
    if experiment.task == "score":
        return rows + _score_rows(experiment, shape, mesh)
    if experiment.task == "pretrain":
        rows += _pretrain_rows(experiment, shape, mesh)
    else:
        rows += _batch_rows(experiment, mesh) + _token_rows(experiment) + _compute_rows(experiment, shape)
        rows += _rpt_memory_rows(experiment, shape, mesh)
        if experiment.cold_start.total_steps:
            rows += [
                Row(f"{what}; of the cold start", value, f"cold_start, {fields}")
                for what, value, fields in _pretrain_rows(cold_start_of(experiment), shape, mesh)
            ]
    return rows + _run_rows(experiment, shape)


def attention_flops(shape: ModelConfig, pairs: int) -> int:
    """Forward FLOPs of the scores and weighted values of `pairs` of a query and a key, in all layers."""
    return 4 * shape.layers * shape.heads * shape.head_size * pairs


def model_config_of(experiment: Experiment) -> tuple[ModelConfig, str]:
    policy = experiment.policy
    if experiment.task == "pretrain" or not policy.path:
        return preset(policy.preset), f"policy.preset={policy.preset}"
    if Path(policy.path).exists():
        shape = load_model_config(policy.path)[0]
        check_preset(policy.path, policy.preset, shape)
        return shape, f"policy.path={policy.path}"
    return preset(policy.preset), f"policy.preset={policy.preset} (policy.path={policy.path} is not on this machine)"


def _resolve(config: MeshConfig, devices: int) -> _Mesh:
    """Fill in the -1; where `devices` are too few for the other axes, take the smallest mesh that has those."""
    sizes = (config.data, config.fsdp, config.tensor)
    if sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1):
        named = ", ".join(f"mesh.{name}={size}" for name, size in zip(_Mesh._fields, sizes, strict=False))
        raise UserError(f"{named}: every axis must be 1 or more, but for at most one -1.")
    left = max(1, devices // abs(math.prod(sizes)))
    mesh = _Mesh(*(left if size == -1 else size for size in sizes), config.rollout_tensor)
    mesh = mesh._replace(rollout_tensor=mesh.rollout_tensor or mesh.tensor)
    resharding_axis_sizes(*mesh[1:])
    return mesh


def _mesh_text(mesh: _Mesh, devices: int) -> str:
    count = mesh.batch_ways * mesh.tensor
    missing = "" if count == devices else f"; here are {devices}, so this will not run here"
    return f"{mesh.data} x {mesh.fsdp} x {mesh.tensor} = {count} device{'s' * (count > 1)}{missing}"


def _tree(experiment: Experiment) -> _Tree:
    rollout = experiment.rollout
    return _Tree(experiment.prompt.max_tokens, rollout.samples_per_prompt, rollout.max_new_tokens)


def _batch_rows(experiment: Experiment, mesh: _Mesh) -> list[Row]:
    t, samples = experiment.training, experiment.rollout.samples_per_prompt
    whole = (t.microbatch_tokens - experiment.prompt.max_tokens) // experiment.rollout.max_new_tokens
    microbatches = math.ceil(t.prompts_per_step * math.ceil(samples / max(1, whole)) / mesh.batch_ways)
    mine = mesh.share(t.prompts_per_step)
    return [
        Row("prompts per step", t.prompts_per_step, _PROMPTS),
        Row("rollouts per step", t.prompts_per_step * samples, f"{_PROMPTS}, {_SAMPLES}"),
        Row("minibatches per step", t.minibatches_per_step, "training.minibatches_per_step"),
        Row("microbatches per step, at most", microbatches, f"{_PROMPTS}, rollout, {_MICROBATCH}"),
        Row("prompts per device", mine, f"{_PROMPTS}, mesh.data, mesh.fsdp"),
        Row("rollouts per device", mine * samples, f"{_PROMPTS}, {_SAMPLES}, mesh.data, mesh.fsdp"),
        Row("tokens per device, microbatch", t.microbatch_tokens, _MICROBATCH),
    ]


def _token_rows(experiment: Experiment) -> list[Row]:
    tree, prompts = _tree(experiment), experiment.training.prompts_per_step
    unshared = tree.branches * (tree.stem + tree.length)
    responses, lengths = f"{_SAMPLES}, rollout.max_new_tokens", "prompt.max_tokens, rollout"
    return [
        Row("prompt tokens per step, at most", prompts * tree.stem, f"{_PROMPTS}, prompt.max_tokens"),
        Row("response tokens per step, at most", prompts * tree.branches * tree.length, f"{_PROMPTS}, {responses}"),
        Row("trunk tokens per prompt, its samples sharing it: S + G*T", tree.tokens, lengths),
        Row("trunk tokens per prompt, were it not shared: G*(S + T)", unshared, lengths),
        Row("trunk tokens, shared / not shared", tree.tokens / unshared, lengths),
    ]


def _compute_rows(experiment: Experiment, shape: ModelConfig) -> list[Row]:
    t, o, tree = experiment.training, experiment.objective, _tree(experiment)
    matmuls = 2 * shape.matmul_parameters * tree.tokens * t.prompts_per_step
    attention = attention_flops(shape, tree.pairs) * t.prompts_per_step
    # With several minibatches, the log-probabilities of before the first take a forward pass of their own; so do those of the
    # policy that a KL term holds on to.
    passes = 3 + (t.minibatches_per_step > 1) + (o.kl != "none")
    sampling, update = matmuls + attention, passes * (matmuls + attention)
    step, kl = f"policy, prompt, rollout, {_PROMPTS}", "training.minibatches_per_step, objective.kl"
    rows = [
        Row("FLOPs of sampling: 2*N a token", float(matmuls), step),
        Row("FLOPs of sampling: attention", float(attention), step),
        Row(f"FLOPs of the update: {2 * passes}*N a token", float(passes * matmuls), f"{step}, {kl}"),
        Row("FLOPs of the update: attention", float(passes * attention), f"{step}, {kl}"),
    ]
    if reward := _reward_flops(experiment, shape):
        rows.append(Row("FLOPs of the reward: forward passes", float(reward), f"{step}, objective.reward"))
    if documents := _document_flops(experiment, shape):
        fields = f"policy, {_PROMPTS}, data.max_document_tokens, objective.document_weight"
        rows.append(Row("FLOPs of the documents: 6*N a token, and attention", float(documents), fields))
    total = sampling + update + reward + documents
    dynamic_steps = max(0, t.total_steps + 1 - max(1, t.dynamic_sampling_from))
    repeated = dynamic_steps * (t.dynamic_sampling_rounds - 1) * (sampling + reward)
    return [
        *rows,
        Row("FLOPs of a step, at most", float(total), "all above"),
        Row("FLOPs of all steps, at most", float(t.total_steps * total), "training.total_steps"),
        Row("FLOPs of dynamic sampling on top, at most", float(repeated), "training.dynamic_sampling_*"),
    ]


def _reward_flops(experiment: Experiment, shape: ModelConfig) -> int:
    """What asking the policy once more for the reward costs, beyond sampling."""
    flops, parts = 0, _tree(experiment).parts
    needs = REWARDS[experiment.objective.reward].requirements
    for (tokens, pairs), passes in zip(parts, (needs.prompt_passes, needs.response_passes), strict=True):
        flops += (passes - 1) * (2 * shape.matmul_parameters * tokens + attention_flops(shape, pairs))
    return flops * experiment.training.prompts_per_step


def _document_flops(experiment: Experiment, shape: ModelConfig) -> int:
    tokens = experiment.data.max_document_tokens if experiment.objective.document_weight else 0
    document = 6 * shape.matmul_parameters * tokens + 3 * attention_flops(shape, tokens**2)
    return document * experiment.training.prompts_per_step


def _rpt_memory_rows(experiment: Experiment, shape: ModelConfig, mesh: _Mesh) -> list[Row]:
    tree, token = _tree(experiment), cache_bytes(shape, experiment.policy.dtype)
    prompts = -(-experiment.training.prompts_per_step // mesh.replicas)
    parameters = _FLOAT32 * shape.parameters // mesh.weight_ways
    state = [
        Row("bytes per device: parameters, and those of the start", 2 * parameters, _WEIGHTS),
        Row("bytes per device: Adam's two moments", 2 * parameters, _WEIGHTS),
    ]
    if REWARDS[experiment.objective.reward].requirements.average:
        state.append(Row("bytes per device: moving average of the parameters", parameters, "policy, objective.reward"))
    rollouts = prompts * tree.branches
    slots = min(-(-experiment.rollout.decode_slots // mesh.replicas) or rollouts, rollouts)
    prompt_cache, response_cache = (
        n * token // mesh.rollout_tensor for n in (prompts * tree.stem, slots * tree.length)
    )
    scores = _dense(experiment) * _FLOAT32 * prompts * shape.heads * tree.stem**2 // mesh.rollout_tensor
    copy = _decoding_copy(experiment, shape, mesh)
    resident, t = _sum(state), experiment.training
    # Of several minibatches, any may meet a number that is not finite; then none has changed anything.
    begin = resident - parameters if t.minibatches_per_step > 1 else 0
    update = [
        Row("bytes per device: gradients, sum and microbatch's", 2 * parameters, _WEIGHTS),
        Row("bytes per device: the state before the step", begin, f"{_WEIGHTS}, training.minibatches_per_step"),
        *_backward_rows(experiment, shape, mesh, _Tree(t.microbatch_tokens, 0, 0), 1, _MICROBATCH),
    ]
    sampled = f"policy, mesh, {_PROMPTS}"
    return [
        *state,
        Row("bytes of a token's keys and values", token, "policy"),
        Row("bytes per device: keys and values of prompts", prompt_cache, f"{sampled}, prompt.max_tokens"),
        Row("bytes per device: keys and values of responses", response_cache, f"{sampled}, rollout"),
        Row("bytes per device: a layer's attention scores, prompts", scores, f"{sampled}, prompt.max_tokens"),
        Row("bytes per device: parameters laid out for decoding", copy, "policy, mesh.rollout_tensor"),
        # The prompts have run before the responses' cache is made.
        Row(
            "bytes per device in all while sampling, at least",
            resident + copy + prompt_cache + max(response_cache, scores),
            "parameters, moments, layout, prompts, the larger of responses and scores",
        ),
        *update,
        Row("bytes per device in all in the update, at least", resident + _sum(update), "parameters, moments, these"),
    ]


def _decoding_copy(experiment: Experiment, shape: ModelConfig, mesh: _Mesh) -> int:
    """Bytes a device of the parameters that decoding reads: whole where training splits them over fsdp, in policy.dtype."""
    dtype = jnp.dtype(experiment.policy.dtype)
    if mesh.fsdp == 1 and mesh.tensor == mesh.rollout_tensor and dtype == jnp.float32:
        return 0
    matrices = shape.matmul_parameters - shape.vocab * shape.width
    return (matrices * dtype.itemsize + (shape.parameters - matrices) * _FLOAT32) // mesh.rollout_tensor


def _dense(experiment: Experiment) -> bool:
    """Whether all scores of a layer's attention exist at one time."""
    return experiment.policy.attention == "reference"


def _sum(rows: list[Row]) -> int:
    return sum(row.value for row in rows)


def _backward_rows(
    experiment: Experiment, shape: ModelConfig, mesh: _Mesh, tree: _Tree, count: int, field: str
) -> list[Row]:
    """What the pass forward and backward over `count` trees a device keeps, beside parameters and gradients."""
    itemsize = jnp.dtype(experiment.policy.dtype).itemsize
    # What a layer's derivative needs. Of plain attention: its exponentials in float32 and its weights in the compute dtype.
    # Else: what goes in and out of both norms, which work in float32, and six products of the feed-forward part.
    pair_bytes = _dense(experiment) * shape.heads * (_FLOAT32 + itemsize) / mesh.tensor
    token_bytes = shape.width * (6 * _FLOAT32 + 2 * itemsize) + 6 * shape.ffn * itemsize / mesh.tensor
    tokens, pairs = (sum(part) for part in zip(*tree.parts, strict=True))
    inputs, layers = 0, shape.layers
    if experiment.policy.remat != "none":
        # A layer's input outlives it and, with "dots", what its projections give and what attention in blocks gave. The rest is
        # run again, for stem or branches, just before its derivative.
        kept = shape.width
        if experiment.policy.remat == "dots":
            attended = 0 if _dense(experiment) else shape.head_size * shape.heads
            projected = shape.head_size * (shape.heads + 2 * shape.kv_heads) + 2 * shape.ffn + attended
            kept += 2 * shape.width + projected / mesh.tensor
        inputs, layers = shape.layers * tokens * kept * itemsize, 1
        tokens, pairs = max(tree.parts, key=lambda part: part[0] * token_bytes + part[1] * pair_bytes)
    logits = _FLOAT32 * experiment.training.logit_chunk_tokens * shape.vocab // mesh.tensor
    fields = f"policy, mesh, {field}"
    scores, others = count * layers * pairs * pair_bytes, count * (inputs + layers * tokens * token_bytes)
    return [
        Row("bytes per device: attention scores for the backward pass", int(scores), fields),
        Row("bytes per device: other activations for it", int(others), fields),
        Row("bytes per device: a chunk of logits", logits, "policy, mesh.tensor, training.logit_chunk_tokens"),
    ]


def _pretrain_rows(experiment: Experiment, shape: ModelConfig, mesh: _Mesh) -> list[Row]:
    p, batch = experiment.pretrain, "pretrain.documents_per_step"
    tree = _Tree(experiment.data.max_document_tokens, p.rows_per_document, p.row_tokens)
    tokens = p.documents_per_step * tree.tokens
    step = 6 * shape.matmul_parameters * tokens + 3 * attention_flops(shape, tree.pairs) * p.documents_per_step
    sizes = f"{batch}, data.max_document_tokens, pretrain.rows_per_document, pretrain.row_tokens"
    documents = mesh.share(p.documents_per_step)
    parameters = _FLOAT32 * shape.parameters // mesh.weight_ways
    memory = [
        Row("bytes per device: parameters", parameters, _WEIGHTS),
        Row("bytes per device: Adam's two moments", 2 * parameters, _WEIGHTS),
        Row("bytes per device: gradients", parameters, _WEIGHTS),
        *_backward_rows(experiment, shape, mesh, tree, documents, batch),
    ]
    return [
        Row("documents per step", p.documents_per_step, batch),
        Row("documents per device", documents, f"{batch}, mesh.data, mesh.fsdp"),
        Row(
            "traces per step, at most",
            p.documents_per_step * p.traces_per_document,
            f"{batch}, pretrain.traces_per_document",
        ),
        Row("tokens per step, at most", tokens, sizes),
        Row("FLOPs of a step, at most: 6*N a token, and attention", float(step), f"policy, {sizes}"),
        Row("FLOPs of all steps, at most", float(step * experiment.training.total_steps), "training.total_steps"),
        *memory,
        Row("bytes per device in all, at least", _sum(memory), "the six above"),
    ]


def _score_rows(experiment: Experiment, shape: ModelConfig, mesh: _Mesh) -> list[Row]:
    """Of the task "score": a batch of the longest documents; shorter ones go in batches of as many tokens."""
    size, documents = experiment.data.max_document_tokens, experiment.data.score_batch_windows
    batch = "data.score_batch_windows, data.max_document_tokens"
    flops = 2 * shape.matmul_parameters + attention_flops(shape, size**2) / size
    return [
        Row("tokens per batch", documents * size, batch),
        Row("documents per device, of a batch of the longest", mesh.share(documents), f"{batch}, mesh"),
        Row("FLOPs a token, in the longest documents", float(flops), f"policy, {batch}"),
        Row("bytes of the prepared corpus, a token, at most", 6 + 8, "2 of lengths, 4 of ids, 8 of two entropies"),
        Row("bytes per device: parameters", _FLOAT32 * shape.parameters // mesh.weight_ways, _WEIGHTS),
    ]


def _run_rows(experiment: Experiment, shape: ModelConfig) -> list[Row]:
    steps, optimizer = experiment.training.total_steps, experiment.optimizer
    schedule, last = make_schedule(optimizer, steps), steps - 1
    marks = sorted({0, min(optimizer.warmup_steps, last), last})
    rates = ", ".join(f"{float(schedule(mark)):.3g} in step {mark + 1}" for mark in marks)
    trees = 4 if experiment.task == "rpt" and REWARDS[experiment.objective.reward].requirements.average else 3
    kept = trees * _FLOAT32 * shape.parameters * experiment.checkpoint.keep
    return [
        Row("steps", steps, "training.total_steps"),
        Row("learning rate", rates, "optimizer"),
        Row("bytes of checkpoints on disk", kept, "policy, checkpoint.keep, objective.reward"),
    ]


def _size(count: float) -> str:
    """Write bytes for people: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
