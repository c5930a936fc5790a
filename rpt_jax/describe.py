"""Sizes that follow from a config, computed by arithmetic: tokens, FLOPs and memory.

No program runs and no array of the run's size is allocated, so a config for a pod can be described on a laptop. `derive`
computes the sizes as typed fields; `render` and `print_description` only format them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import Experiment, MeshConfig
from rpt_jax.config.derived import cold_start_experiment
from rpt_jax.distributed.mesh import resharding_axis_sizes
from rpt_jax.errors import UserError
from rpt_jax.infra.console import table
from rpt_jax.infra.optimizer import make_schedule
from rpt_jax.model.context_length import context_warnings
from rpt_jax.model.model_config import ModelConfig, check_preset, preset
from rpt_jax.registry import REWARDS
from rpt_jax.rollout.memory import cache_bytes
from rpt_jax.weights.hf import load_model_config

logger = logging.getLogger(__name__)

_FLOAT32_BYTES = 4
# Bytes of a prepared corpus per token: 2 of window lengths, 4 of token ids, 8 of two entropies.
_CORPUS_BYTES_PER_TOKEN = 2 + 4 + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySizes:
    """Sizes of the policy.

    Attributes:
      source: the config field that the sizes were read from, with its value.
      parameters: number of parameters.
      matmul_parameters: parameters that each token is multiplied with (N).
    """

    source: str
    layers: int
    width: int
    vocab: int
    parameters: int
    matmul_parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Devices along each mesh axis.

    Attributes:
      available: devices that the description was asked for; may differ from `devices`.
      rollout_tensor: devices that share one copy of the policy during sampling.
    """

    data: int
    fsdp: int
    tensor: int
    rollout_tensor: int
    available: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Shards of a training batch."""
        return self.data * self.fsdp

    @property
    def weight_shards(self) -> int:
        """Shards of each weight matrix."""
        return self.fsdp * self.tensor

    @property
    def rollout_replicas(self) -> int:
        """Shards of a batch during sampling."""
        return self.batch_shards * self.tensor // self.rollout_tensor

    def max_per_batch_shard(self, count: int) -> int:
        """Return the largest number of `count` batch elements that a batch shard holds."""
        return -(-count // self.batch_shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptBatch:
    """Batch sizes of a step of task "rpt"; `max_` fields are upper bounds."""

    prompts_per_step: int
    rollouts_per_step: int
    minibatches_per_step: int
    max_microbatches_per_step: int
    prompts_per_device: int
    rollouts_per_device: int
    microbatch_tokens_per_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptTokens:
    """Tokens of a step with every prompt (S tokens) and each of its G responses (T tokens) at full length.

    Attributes:
      shared_tokens_per_prompt: S + G·T, tokens of a forward pass that runs each prompt once for all of its responses.
      unshared_tokens_per_prompt: G·(S + T), tokens of a forward pass that repeats the prompt for every response.
    """

    prompt_tokens_per_step: int
    response_tokens_per_step: int
    shared_tokens_per_prompt: int
    unshared_tokens_per_prompt: int

    @property
    def sharing_ratio(self) -> float:
        """Tokens with shared prompts as a fraction of those without sharing."""
        return self.shared_tokens_per_prompt / self.unshared_tokens_per_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptFlops:
    """FLOPs of one step of task "rpt" by stage, on all devices together, at full lengths.

    A forward pass takes 2 FLOPs per token and matmul parameter. Attention counts every pair of a query and a key that is
    computed, masked ones included. Rematerialization, scoring and evaluation are not counted.

    Attributes:
      update_forward_passes: forward passes that the update amounts to; the differentiated pass counts as three.
      reward: forward passes of the training reward beyond sampling.
      documents: the next-token loss on documents.
      dynamic_sampling: upper bound of the FLOPs of repeated sampling rounds, over the whole run.
      total_steps: training steps.
    """

    sampling_matmul: int
    sampling_attention: int
    update_matmul: int
    update_attention: int
    update_forward_passes: int
    reward: int
    documents: int
    dynamic_sampling: int
    total_steps: int

    @property
    def sampling(self) -> int:
        """FLOPs of one round of sampling."""
        return self.sampling_matmul + self.sampling_attention

    @property
    def update(self) -> int:
        """FLOPs of the update on rollouts."""
        return self.update_matmul + self.update_attention

    @property
    def step(self) -> int:
        """FLOPs of one step without dynamic sampling."""
        return self.sampling + self.update + self.reward + self.documents

    @property
    def run(self) -> int:
        """FLOPs of all steps without dynamic sampling."""
        return self.total_steps * self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes per device of the training state.

    Attributes:
      parameters_and_reference: the parameters and those that the run started from.
      moving_average: the moving average of the parameters, 0 if the reward does not need it.
    """

    parameters_and_reference: int
    adam_moments: int
    moving_average: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.parameters_and_reference + self.adam_moments + self.moving_average


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingBytes:
    """Bytes per device that sampling needs in addition to the training state.

    Attributes:
      kv_per_token: keys and values of one token in all layers, unsharded.
      prompt_kv: keys and values of the prompts.
      response_kv: keys and values of the live responses.
      prompt_attention_scores: attention scores of one layer during prefill, 0 unless all of them exist at once.
      resharded_parameters: the copy of the parameters in the layout for decoding, 0 if decoding needs no copy.
    """

    kv_per_token: int
    prompt_kv: int
    response_kv: int
    prompt_attention_scores: int
    resharded_parameters: int

    @property
    def total(self) -> int:
        # Prefill has ended before the cache of the responses is allocated.
        return self.resharded_parameters + self.prompt_kv + max(self.response_kv, self.prompt_attention_scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardBytes:
    """Bytes per device of what a forward and backward pass saves, without parameters and gradients.

    Attributes:
      attention_scores: attention scores saved for the backward pass.
      other_activations: other activations saved for the backward pass.
      logit_chunk: the logits that exist at once.
    """

    attention_scores: int
    other_activations: int
    logit_chunk: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.attention_scores + self.other_activations + self.logit_chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateBytes:
    """Bytes per device that the update needs in addition to the training state.

    Attributes:
      gradients: the accumulated gradient and that of one microbatch.
      state_before_step: a copy of the state, restored if a later minibatch is not finite; 0 with one minibatch.
      backward: what the forward and backward pass saves.
    """

    gradients: int
    state_before_step: int
    backward: BackwardBytes

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.gradients + self.state_before_step + self.backward.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptMemory:
    """Bytes per device of task "rpt": lower bounds, to which XLA adds its temporaries."""

    state: StateBytes
    sampling: SamplingBytes
    update: UpdateBytes

    @property
    def sampling_total(self) -> int:
        """Bytes while rollouts are sampled."""
        return self.state.total + self.sampling.total

    @property
    def update_total(self) -> int:
        """Bytes while the policy is updated."""
        return self.state.total + self.update.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptSizes:
    """Sizes of task "rpt"."""

    batch: RptBatch
    tokens: RptTokens
    flops: RptFlops
    memory: RptMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainMemory:
    """Bytes per device of task "pretrain": lower bounds, to which XLA adds its temporaries."""

    parameters: int
    adam_moments: int
    gradients: int
    backward: BackwardBytes

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.parameters + self.adam_moments + self.gradients + self.backward.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSizes:
    """Sizes of task "pretrain", or of the cold start of task "rpt"; tokens, traces and FLOPs are upper bounds."""

    documents_per_step: int
    documents_per_device: int
    traces_per_step: int
    tokens_per_step: int
    flops_per_step: int
    total_steps: int
    memory: PretrainMemory

    @property
    def run_flops(self) -> int:
        """FLOPs of all steps."""
        return self.total_steps * self.flops_per_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSizes:
    """Sizes of task "score", for a batch of windows of the greatest length.

    Attributes:
      flops_per_batch: FLOPs of one batch on all devices together.
      corpus_bytes_per_token: bytes of the prepared corpus per token, at most.
      parameter_bytes: bytes per device of the parameters.
    """

    windows_per_batch: int
    windows_per_device: int
    tokens_per_batch: int
    flops_per_batch: int
    corpus_bytes_per_token: int
    parameter_bytes: int

    @property
    def flops_per_token(self) -> float:
        """FLOPs per token of a window of the greatest length."""
        return self.flops_per_batch / self.tokens_per_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSizes:
    """Sizes of a training run as a whole.

    Attributes:
      learning_rates: (step, learning rate) of the first step, the step in which warmup ends, and the last.
      checkpoint_bytes: bytes on disk of the checkpoints that are kept.
    """

    total_steps: int
    learning_rates: tuple[tuple[int, float], ...]
    checkpoint_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """Sizes that follow from a config.

    Attributes:
      score: a scoring batch; set for every task but "pretrain".
      rpt: set for task "rpt".
      pretrain: set for task "pretrain".
      cold_start: the pre-training that task "rpt" starts with, if it has one.
      run: set for the tasks that train.
    """

    task: str
    policy: PolicySizes
    mesh: MeshSizes
    score: ScoreSizes | None = None
    rpt: RptSizes | None = None
    pretrain: PretrainSizes | None = None
    cold_start: PretrainSizes | None = None
    run: RunSizes | None = None

    @property
    def peak_bytes_per_device(self) -> int:
        """The largest memory of any stage on one device: a lower bound."""
        totals = [self.score.parameter_bytes] if self.score else []
        totals += [self.rpt.memory.sampling_total, self.rpt.memory.update_total] if self.rpt else []
        totals += [sizes.memory.total for sizes in (self.pretrain, self.cold_start) if sizes]
        return max(totals)


class Row(NamedTuple):
    """A line of the rendered description: a quantity, its value, and the config fields that it is derived from."""

    quantity: str
    value: int | float | str
    derived_from: str


class _PrefixTree(NamedTuple):
    """A shared prefix and branches that continue it: a prompt and its responses, or a document and its rows of traces.

    The forward pass runs the prefix once for all branches.
    """

    prefix: int
    branches: int
    branch: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.branches * self.branch

    @property
    def pairs(self) -> int:
        return self.prefix_size.pairs + self.branches_size.pairs

    @property
    def prefix_size(self) -> _AttentionSize:
        return _AttentionSize(tokens=self.prefix, pairs=self.prefix**2)

    @property
    def branches_size(self) -> _AttentionSize:
        tokens = self.branches * self.branch
        return _AttentionSize(tokens=tokens, pairs=tokens * (self.prefix + self.branch))


class _AttentionSize(NamedTuple):
    """Tokens of a forward pass, and the query-key pairs whose attention scores it computes."""

    tokens: int
    pairs: int


def derive(experiment: Experiment, devices: int) -> Derived:
    """Compute every size of an experiment on `devices` devices.

    Prompts and responses are taken at their length limits, so tokens, FLOPs and caches are upper bounds. Memory counts the
    named arrays only and is a lower bound: XLA's temporaries are added to it.

    Args:
      experiment: a validated config.
      devices: number of devices; if they are too few for the mesh, the smallest mesh that fits the config is described.

    Raises:
      UserError: the mesh, the preset, the policy's config.json or the learning-rate schedule is invalid.
    """
    config, source = model_config_of(experiment)
    mesh = _resolve_mesh(experiment.mesh, devices)
    task = experiment.task
    has_cold_start = task == "rpt" and experiment.cold_start.total_steps > 0
    return Derived(
        task=task,
        policy=PolicySizes(
            source=source,
            layers=config.layers,
            width=config.width,
            vocab=config.vocab,
            parameters=config.parameters,
            matmul_parameters=config.matmul_parameters,
        ),
        mesh=mesh,
        score=None if task == "pretrain" else _score_sizes(experiment, config, mesh),
        rpt=_rpt_sizes(experiment, config, mesh) if task == "rpt" else None,
        pretrain=_pretrain_sizes(experiment, config, mesh) if task == "pretrain" else None,
        cold_start=_pretrain_sizes(cold_start_experiment(experiment), config, mesh) if has_cold_start else None,
        run=None if task == "score" else _run_sizes(experiment, config),
    )


def attention_flops(config: ModelConfig, pairs: int) -> int:
    """Return the forward FLOPs of attention over `pairs` query-key pairs, in all layers.

    Each pair takes 2·C FLOPs for its score and 2·C for its weighted value in every head.
    """
    return 4 * config.layers * config.heads * config.head_size * pairs


def model_config_of(experiment: Experiment) -> tuple[ModelConfig, str]:
    """Return the policy's model config and its source: `policy.path` if that exists here, else `policy.preset`.

    Raises:
      UserError: the preset is unknown, or does not match the policy's config.json.
    """
    policy = experiment.policy
    if not policy.path:
        return preset(policy.preset), f"policy.preset={policy.preset}"
    if Path(policy.path).exists() or not policy.preset:
        config = load_model_config(policy.path)[0]
        check_preset(policy.path, policy.preset, config)
        return config, f"policy.path={policy.path}"
    return preset(policy.preset), f"policy.preset={policy.preset} (policy.path={policy.path} does not exist here)"


def _resolve_mesh(config: MeshConfig, devices: int) -> MeshSizes:
    """Replace the axis of size -1 and `rollout_tensor=0` by their values. Raises UserError for an invalid mesh."""
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if list(sizes.values()).count(-1) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        named = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(f"{named}: every axis must be at least 1, except for at most one -1.", field="mesh")
    # The other axes may need more devices than there are: then the free axis has size 1.
    free = max(1, devices // abs(math.prod(sizes.values())))
    sizes = {name: free if size == -1 else size for name, size in sizes.items()}
    mesh = MeshSizes(**sizes, rollout_tensor=config.rollout_tensor or sizes["tensor"], available=devices)
    resharding_axis_sizes(mesh.fsdp, mesh.tensor, mesh.rollout_tensor)
    return mesh


def _rollout_tree(experiment: Experiment) -> _PrefixTree:
    rollout = experiment.rollout
    return _PrefixTree(
        prefix=experiment.prompt.max_tokens,
        branches=rollout.samples_per_prompt,
        branch=rollout.max_new_tokens,
    )


def _rpt_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> RptSizes:
    return RptSizes(
        batch=_rpt_batch(experiment, mesh),
        tokens=_rpt_tokens(experiment),
        flops=_rpt_flops(experiment, config),
        memory=_rpt_memory(experiment, config, mesh),
    )


def _rpt_batch(experiment: Experiment, mesh: MeshSizes) -> RptBatch:
    training = experiment.training
    samples = experiment.rollout.samples_per_prompt
    # Each row of the update holds a prompt and as many of its responses as fit.
    responses_per_row = (training.microbatch_tokens - experiment.prompt.max_tokens) // experiment.rollout.max_new_tokens
    rows = training.prompts_per_step * math.ceil(samples / max(1, responses_per_row))
    prompts_per_device = mesh.max_per_batch_shard(training.prompts_per_step)
    return RptBatch(
        prompts_per_step=training.prompts_per_step,
        rollouts_per_step=training.prompts_per_step * samples,
        minibatches_per_step=training.minibatches_per_step,
        max_microbatches_per_step=math.ceil(rows / mesh.batch_shards),
        prompts_per_device=prompts_per_device,
        rollouts_per_device=prompts_per_device * samples,
        microbatch_tokens_per_device=training.microbatch_tokens,
    )


def _rpt_tokens(experiment: Experiment) -> RptTokens:
    tree = _rollout_tree(experiment)
    prompts = experiment.training.prompts_per_step
    return RptTokens(
        prompt_tokens_per_step=prompts * tree.prefix,
        response_tokens_per_step=prompts * tree.branches * tree.branch,
        shared_tokens_per_prompt=tree.tokens,
        unshared_tokens_per_prompt=tree.branches * (tree.prefix + tree.branch),
    )


def _rpt_flops(experiment: Experiment, config: ModelConfig) -> RptFlops:
    training = experiment.training
    tree = _rollout_tree(experiment)
    matmul = 2 * config.matmul_parameters * tree.tokens * training.prompts_per_step
    attention = attention_flops(config, tree.pairs) * training.prompts_per_step
    # Forward and backward cost three forward passes. Several minibatches need the log-probabilities from before the first
    # update, and a KL term those of the reference policy: one forward pass each.
    passes = 3 + (training.minibatches_per_step > 1) + (experiment.objective.kl != "none")
    reward = _reward_flops(experiment, config)
    dynamic_steps = max(0, training.total_steps + 1 - max(1, training.dynamic_sampling_from))
    extra_rounds = dynamic_steps * (training.dynamic_sampling_rounds - 1)
    return RptFlops(
        sampling_matmul=matmul,
        sampling_attention=attention,
        update_matmul=passes * matmul,
        update_attention=passes * attention,
        update_forward_passes=passes,
        reward=reward,
        documents=_document_flops(experiment, config),
        dynamic_sampling=extra_rounds * (matmul + attention + reward),
        total_steps=training.total_steps,
    )


def _reward_flops(experiment: Experiment, config: ModelConfig) -> int:
    """Return the FLOPs of the forward passes that the training reward takes beyond sampling."""
    tree = _rollout_tree(experiment)
    requirements = REWARDS[experiment.objective.reward].requirements

    def forward(size: _AttentionSize) -> int:
        return 2 * config.matmul_parameters * size.tokens + attention_flops(config, size.pairs)

    prompt = (requirements.prompt_passes - 1) * forward(tree.prefix_size)
    responses = (requirements.response_passes - 1) * forward(tree.branches_size)
    return (prompt + responses) * experiment.training.prompts_per_step


def _document_flops(experiment: Experiment, config: ModelConfig) -> int:
    tokens = experiment.data.max_document_tokens if experiment.objective.document_weight else 0
    document = 6 * config.matmul_parameters * tokens + 3 * attention_flops(config, tokens**2)
    return document * experiment.training.prompts_per_step


def _rpt_memory(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> RptMemory:
    parameters = _FLOAT32_BYTES * config.parameters // mesh.weight_shards
    needs_average = REWARDS[experiment.objective.reward].requirements.average
    state = StateBytes(
        parameters_and_reference=2 * parameters,
        adam_moments=2 * parameters,
        moving_average=parameters if needs_average else 0,
    )
    training = experiment.training
    row = _PrefixTree(prefix=training.microbatch_tokens, branches=0, branch=0)
    update = UpdateBytes(
        gradients=2 * parameters,
        # The reference parameters never change, so the copy does not hold them.
        state_before_step=state.total - parameters if training.minibatches_per_step > 1 else 0,
        backward=_backward_bytes(experiment, config, mesh, row, count=1),
    )
    return RptMemory(state=state, sampling=_sampling_bytes(experiment, config, mesh), update=update)


def _sampling_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> SamplingBytes:
    tree = _rollout_tree(experiment)
    kv_per_token = cache_bytes(config, experiment.policy.dtype)
    # Each replica samples an equal part of the prompts, with an equal part of the decode slots.
    prompts = -(-experiment.training.prompts_per_step // mesh.rollout_replicas)
    rollouts = prompts * tree.branches
    slots = min(-(-experiment.rollout.decode_slots // mesh.rollout_replicas) or rollouts, rollouts)
    scores = _FLOAT32_BYTES * prompts * config.heads * tree.prefix**2 if _forms_all_scores(experiment) else 0
    return SamplingBytes(
        kv_per_token=kv_per_token,
        prompt_kv=prompts * tree.prefix * kv_per_token // mesh.rollout_tensor,
        response_kv=slots * tree.branch * kv_per_token // mesh.rollout_tensor,
        prompt_attention_scores=scores // mesh.rollout_tensor,
        resharded_parameters=_resharded_bytes(experiment, config, mesh),
    )


def _resharded_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> int:
    """Return the bytes per device of the decoding copy of the parameters: gathered over fsdp, matrices in policy.dtype."""
    dtype = jnp.dtype(experiment.policy.dtype)
    if mesh.fsdp == 1 and mesh.tensor == mesh.rollout_tensor and dtype == jnp.float32:
        return 0
    matrices = config.matmul_parameters - config.vocab * config.width
    size = matrices * dtype.itemsize + (config.parameters - matrices) * _FLOAT32_BYTES
    return size // mesh.rollout_tensor


def _forms_all_scores(experiment: Experiment) -> bool:
    """Return whether all attention scores of a layer exist at once."""
    return experiment.policy.attention == "reference"


def _backward_bytes(
    experiment: Experiment, config: ModelConfig, mesh: MeshSizes, tree: _PrefixTree, count: int
) -> BackwardBytes:
    """Return what a forward and backward pass over `count` trees per device saves, without parameters and gradients."""
    itemsize = jnp.dtype(experiment.policy.dtype).itemsize

    # Saved per layer. Reference attention: its exponentials in float32 and its weights in the compute dtype. Everything else:
    # input and output of both norms, which compute in float32, and six products of the feed-forward block.
    pair_bytes = _forms_all_scores(experiment) * config.heads * (_FLOAT32_BYTES + itemsize) / mesh.tensor
    token_bytes = config.width * (6 * _FLOAT32_BYTES + 2 * itemsize) + 6 * config.ffn * itemsize / mesh.tensor
    saved = _AttentionSize(tokens=tree.tokens, pairs=tree.pairs)

    # Without rematerialization, every layer saves all of this.
    layers = config.layers
    kept = 0
    if experiment.policy.remat != "none":
        # Every layer keeps its input and, with "dots", its projections and the output of blockwise attention. The rest is
        # recomputed one layer at a time, for the prefix or for the branches, just before it is differentiated.
        kept_per_token = config.width
        if experiment.policy.remat == "dots":
            attended = 0 if _forms_all_scores(experiment) else config.head_size * config.heads
            projected = config.head_size * (config.heads + 2 * config.kv_heads) + 2 * config.ffn + attended
            kept_per_token += 2 * config.width + projected / mesh.tensor
        kept = config.layers * tree.tokens * kept_per_token * itemsize
        layers = 1
        parts = tree.prefix_size, tree.branches_size
        saved = max(parts, key=lambda part: part.tokens * token_bytes + part.pairs * pair_bytes)
    return BackwardBytes(
        attention_scores=int(count * layers * saved.pairs * pair_bytes),
        other_activations=int(count * (kept + layers * saved.tokens * token_bytes)),
        logit_chunk=_FLOAT32_BYTES * experiment.training.logit_chunk_tokens * config.vocab // mesh.tensor,
    )


def _pretrain_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> PretrainSizes:
    pretrain = experiment.pretrain
    tree = _PrefixTree(
        prefix=experiment.data.max_document_tokens,
        branches=pretrain.rows_per_document,
        branch=pretrain.row_tokens,
    )
    tokens = pretrain.documents_per_step * tree.tokens
    attention = 3 * attention_flops(config, tree.pairs) * pretrain.documents_per_step
    documents_per_device = mesh.max_per_batch_shard(pretrain.documents_per_step)
    parameters = _FLOAT32_BYTES * config.parameters // mesh.weight_shards
    return PretrainSizes(
        documents_per_step=pretrain.documents_per_step,
        documents_per_device=documents_per_device,
        traces_per_step=pretrain.documents_per_step * pretrain.traces_per_document,
        tokens_per_step=tokens,
        flops_per_step=6 * config.matmul_parameters * tokens + attention,
        total_steps=experiment.training.total_steps,
        memory=PretrainMemory(
            parameters=parameters,
            adam_moments=2 * parameters,
            gradients=parameters,
            backward=_backward_bytes(experiment, config, mesh, tree, documents_per_device),
        ),
    )


def _score_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> ScoreSizes:
    window_tokens = experiment.data.max_document_tokens
    windows = experiment.data.score_batch_windows
    window_flops = 2 * config.matmul_parameters * window_tokens + attention_flops(config, window_tokens**2)
    return ScoreSizes(
        windows_per_batch=windows,
        windows_per_device=mesh.max_per_batch_shard(windows),
        tokens_per_batch=windows * window_tokens,
        flops_per_batch=windows * window_flops,
        corpus_bytes_per_token=_CORPUS_BYTES_PER_TOKEN,
        parameter_bytes=_FLOAT32_BYTES * config.parameters // mesh.weight_shards,
    )


def _run_sizes(experiment: Experiment, config: ModelConfig) -> RunSizes:
    steps = experiment.training.total_steps
    schedule = make_schedule(experiment.optimizer, steps)
    last = steps - 1
    updates = sorted({0, min(experiment.optimizer.warmup_steps, last), last})
    has_average = experiment.task == "rpt" and REWARDS[experiment.objective.reward].requirements.average
    # Parameters, two moments and, for some rewards, the moving average.
    trees = 4 if has_average else 3
    return RunSizes(
        total_steps=steps,
        learning_rates=tuple((update + 1, float(np.asarray(schedule(update)))) for update in updates),
        checkpoint_bytes=trees * _FLOAT32_BYTES * config.parameters * experiment.checkpoint.keep,
    )


def print_description(experiment: Experiment, devices: int | None = None) -> None:
    """Print the sizes of an experiment as a table, for `devices` devices or those of this machine.

    Raises:
      UserError: as `derive` does.
    """
    derived = derive(experiment, jax.device_count() if devices is None else devices)
    table("Sizes derived from this config", ("quantity", "value", "derived from"), render(derived))
    for warning in context_warnings(experiment, model_config_of(experiment)[0]):
        logger.warning(warning)


def render(derived: Derived) -> list[Row]:
    """Return the lines of the description; bytes are formatted with binary units."""
    rows = _policy_rows(derived)
    if derived.task == "score" and derived.score:
        rows += _score_rows(derived.score)
    if derived.rpt:
        rows += _batch_rows(derived.rpt.batch)
        rows += _token_rows(derived.rpt.tokens)
        rows += _flops_rows(derived.rpt.flops)
        rows += _memory_rows(derived.rpt.memory)
    if derived.pretrain:
        rows += _pretrain_rows(derived.pretrain)
    if derived.cold_start:
        rows += [
            Row(f"cold start: {row.quantity}", row.value, f"cold_start, {row.derived_from}")
            for row in _pretrain_rows(derived.cold_start)
        ]
    if derived.run:
        rows += _run_rows(derived.run)
    return rows


_SAMPLES = "rollout.samples_per_prompt"
_PROMPTS = "training.prompts_per_step"
_MICROBATCH = "training.microbatch_tokens"
_DOCUMENTS = "pretrain.documents_per_step"
_WEIGHTS = "policy, mesh.fsdp, mesh.tensor"


def _policy_rows(derived: Derived) -> list[Row]:
    policy = derived.policy
    mesh = derived.mesh
    note = "" if mesh.devices == mesh.available else f"; {mesh.available} available, so this will not run here"
    devices = f"{mesh.devices} device{'s' * (mesh.devices > 1)}{note}"
    return [
        Row("policy: layers x width, vocabulary", f"{policy.layers} x {policy.width}, {policy.vocab}", policy.source),
        Row("parameters", policy.parameters, "policy"),
        Row("matmul parameters (N)", policy.matmul_parameters, "policy"),
        Row("mesh: data x fsdp x tensor", f"{mesh.data} x {mesh.fsdp} x {mesh.tensor} = {devices}", "mesh"),
    ]


def _batch_rows(batch: RptBatch) -> list[Row]:
    return [
        Row("prompts per step", batch.prompts_per_step, _PROMPTS),
        Row("rollouts per step", batch.rollouts_per_step, f"{_PROMPTS}, {_SAMPLES}"),
        Row("minibatches per step", batch.minibatches_per_step, "training.minibatches_per_step"),
        Row("microbatches per step, at most", batch.max_microbatches_per_step, f"{_PROMPTS}, rollout, {_MICROBATCH}"),
        Row("prompts per device", batch.prompts_per_device, f"{_PROMPTS}, mesh.data, mesh.fsdp"),
        Row("rollouts per device", batch.rollouts_per_device, f"{_PROMPTS}, {_SAMPLES}, mesh.data, mesh.fsdp"),
        Row("microbatch tokens per device", batch.microbatch_tokens_per_device, _MICROBATCH),
    ]


def _token_rows(tokens: RptTokens) -> list[Row]:
    responses = f"{_PROMPTS}, {_SAMPLES}, rollout.max_new_tokens"
    lengths = "prompt.max_tokens, rollout"
    return [
        Row("prompt tokens per step, at most", tokens.prompt_tokens_per_step, f"{_PROMPTS}, prompt.max_tokens"),
        Row("response tokens per step, at most", tokens.response_tokens_per_step, responses),
        Row("tokens per prompt, shared by its samples: S + G*T", tokens.shared_tokens_per_prompt, lengths),
        Row("tokens per prompt, without sharing: G*(S + T)", tokens.unshared_tokens_per_prompt, lengths),
        Row("tokens, shared / not shared", tokens.sharing_ratio, lengths),
    ]


def _flops_rows(flops: RptFlops) -> list[Row]:
    step = f"policy, prompt, rollout, {_PROMPTS}"
    update = f"{step}, training.minibatches_per_step, objective.kl"
    rows = [
        Row("FLOPs of sampling: 2*N per token", float(flops.sampling_matmul), step),
        Row("FLOPs of sampling: attention", float(flops.sampling_attention), step),
        Row(f"FLOPs of the update: {2 * flops.update_forward_passes}*N per token", float(flops.update_matmul), update),
        Row("FLOPs of the update: attention", float(flops.update_attention), update),
    ]
    if flops.reward:
        rows.append(Row("FLOPs of the reward: forward passes", float(flops.reward), f"{step}, objective.reward"))
    if flops.documents:
        fields = f"policy, {_PROMPTS}, data.max_document_tokens, objective.document_weight"
        rows.append(Row("FLOPs of the documents: 6*N per token, and attention", float(flops.documents), fields))
    return [
        *rows,
        Row("FLOPs of a step, at most", float(flops.step), "all above"),
        Row("FLOPs of all steps, at most", float(flops.run), "training.total_steps"),
        Row(
            "additional FLOPs of dynamic sampling, at most",
            float(flops.dynamic_sampling),
            "training.dynamic_sampling_*",
        ),
    ]


def _memory_rows(memory: RptMemory) -> list[Row]:
    state = memory.state
    sampling = memory.sampling
    update = memory.update
    prompts = f"policy, mesh, {_PROMPTS}, prompt.max_tokens"
    minibatches = f"{_WEIGHTS}, training.minibatches_per_step"
    # Resident in the whole step.
    rows = [
        _bytes_row("per device: parameters and reference parameters", state.parameters_and_reference, _WEIGHTS),
        _bytes_row("per device: Adam moments", state.adam_moments, _WEIGHTS),
    ]
    if state.moving_average:
        rows.append(
            _bytes_row("per device: moving average of the parameters", state.moving_average, "policy, objective.reward")
        )
    return [
        *rows,
        # Sampling.
        _bytes_row("per token: keys and values", sampling.kv_per_token, "policy"),
        _bytes_row("per device: keys and values of prompts", sampling.prompt_kv, prompts),
        _bytes_row(
            "per device: keys and values of responses", sampling.response_kv, f"policy, mesh, {_PROMPTS}, rollout"
        ),
        _bytes_row("per device: attention scores of prompts, one layer", sampling.prompt_attention_scores, prompts),
        _bytes_row(
            "per device: parameters resharded for decoding",
            sampling.resharded_parameters,
            "policy, mesh.rollout_tensor",
        ),
        _bytes_row(
            "per device: sampling in total, at least",
            memory.sampling_total,
            "state, resharded parameters, prompts, the larger of responses and scores",
        ),
        # Update.
        _bytes_row("per device: gradients, accumulated and of a microbatch", update.gradients, _WEIGHTS),
        _bytes_row("per device: state before the step", update.state_before_step, minibatches),
        *_backward_rows(update.backward, _MICROBATCH),
        _bytes_row("per device: update in total, at least", memory.update_total, "state and the five above"),
    ]


def _backward_rows(backward: BackwardBytes, batch_field: str) -> list[Row]:
    fields = f"policy, mesh, {batch_field}"
    logits = "policy, mesh.tensor, training.logit_chunk_tokens"
    return [
        _bytes_row("per device: attention scores saved for backward", backward.attention_scores, fields),
        _bytes_row("per device: other activations saved for backward", backward.other_activations, fields),
        _bytes_row("per device: one chunk of logits", backward.logit_chunk, logits),
    ]


def _pretrain_rows(sizes: PretrainSizes) -> list[Row]:
    lengths = f"{_DOCUMENTS}, data.max_document_tokens, pretrain.rows_per_document, pretrain.row_tokens"
    memory = sizes.memory
    return [
        Row("documents per step", sizes.documents_per_step, _DOCUMENTS),
        Row("documents per device", sizes.documents_per_device, f"{_DOCUMENTS}, mesh.data, mesh.fsdp"),
        Row("traces per step, at most", sizes.traces_per_step, f"{_DOCUMENTS}, pretrain.traces_per_document"),
        Row("tokens per step, at most", sizes.tokens_per_step, lengths),
        Row(
            "FLOPs of a step, at most: 6*N per token, and attention", float(sizes.flops_per_step), f"policy, {lengths}"
        ),
        Row("FLOPs of all steps, at most", float(sizes.run_flops), "training.total_steps"),
        _bytes_row("per device: parameters", memory.parameters, _WEIGHTS),
        _bytes_row("per device: Adam moments", memory.adam_moments, _WEIGHTS),
        _bytes_row("per device: gradients", memory.gradients, _WEIGHTS),
        *_backward_rows(memory.backward, _DOCUMENTS),
        _bytes_row("per device: total, at least", memory.total, "the six above"),
    ]


def _score_rows(sizes: ScoreSizes) -> list[Row]:
    batch = "data.score_batch_windows, data.max_document_tokens"
    corpus = "lengths, token ids and entropies of the prepared corpus"
    return [
        Row("tokens per batch", sizes.tokens_per_batch, batch),
        Row("windows per device, at full length", sizes.windows_per_device, f"{batch}, mesh"),
        Row("FLOPs per token, at full length", sizes.flops_per_token, f"policy, {batch}"),
        _bytes_row("on disk per token, at most", sizes.corpus_bytes_per_token, corpus),
        _bytes_row("per device: parameters", sizes.parameter_bytes, _WEIGHTS),
    ]


def _run_rows(sizes: RunSizes) -> list[Row]:
    rates = ", ".join(f"{rate:.3g} in step {step}" for step, rate in sizes.learning_rates)
    return [
        Row("steps", sizes.total_steps, "training.total_steps"),
        Row("learning rate", rates, "optimizer"),
        _bytes_row("on disk: checkpoints", sizes.checkpoint_bytes, "policy, checkpoint.keep, objective.reward"),
    ]


def _bytes_row(quantity: str, size: int, derived_from: str) -> Row:
    return Row(f"bytes {quantity}", _format_bytes(size), derived_from)


def _format_bytes(size: float) -> str:
    """Format a number of bytes with a binary unit: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
