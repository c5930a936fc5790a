"""Bytes per device of a run's arrays, by arithmetic. They are lower bounds, to which XLA adds its temporaries."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from rpt_jax.config import Experiment
from rpt_jax.model.lora import lora_of
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.registry import REWARDS
from rpt_jax.rollout.memory import RolloutMemory, cache_bytes, rollout_memory
from rpt_jax.setup import dtype_of, head_precision_of
from rpt_jax.sizes.mesh import MeshSizes

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """Bytes per device, by what they are for."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(part.total if isinstance(part, _Parts) else part for part in parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes(_Parts):
    """Bytes per device of the training state.

    Attributes:
      frozen: the parameters that are not trained, 0 if all are.
      parameters_and_reference: the parameters that are trained, and their values that the run started from.
      moving_average: the moving average of the former, 0 if the reward does not need it.
    """

    frozen: int
    parameters_and_reference: int
    adam_moments: int
    moving_average: int


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
class BackwardBytes(_Parts):
    """Bytes per device of what a forward and backward pass saves, without parameters and gradients.

    Attributes:
      attention_scores: attention scores saved for the backward pass.
      other_activations: other activations saved for the backward pass.
      logit_chunk: the logits that exist at once.
    """

    attention_scores: int
    other_activations: int
    logit_chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateBytes(_Parts):
    """Bytes per device that the update needs in addition to the training state.

    Attributes:
      gradients: the accumulated gradient and that of one microbatch.
      state_before_step: a copy of the state, restored if a later minibatch is not finite; 0 with one minibatch.
      backward: what the forward and backward pass saves.
    """

    gradients: int
    state_before_step: int
    backward: BackwardBytes


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
class PretrainMemory(_Parts):
    """Bytes per device of task "pretrain": lower bounds, to which XLA adds its temporaries.

    Attributes:
      frozen: the parameters that are not trained, 0 if all are.
      parameters: the parameters that are trained.
    """

    frozen: int
    parameters: int
    adam_moments: int
    gradients: int
    backward: BackwardBytes


class PrefixTree(NamedTuple):
    """A shared prefix and branches that continue it: a prompt and its responses, or a document and its rows of traces.

    The forward pass runs the prefix once for all branches. Pairs are those of a query and a key whose attention scores
    exist if all of them do, masked ones included.
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
    def prefix_size(self) -> AttentionSize:
        return AttentionSize(tokens=self.prefix, pairs=self.prefix**2)

    @property
    def branches_size(self) -> AttentionSize:
        tokens = self.branches * self.branch
        return AttentionSize(tokens=tokens, pairs=tokens * (self.prefix + self.branch))


class AttentionSize(NamedTuple):
    """Tokens of a forward pass, and its pairs of a query and a key, masked ones included."""

    tokens: int
    pairs: int


def rollout_tree(experiment: Experiment) -> PrefixTree:
    """Return a prompt with its responses, at full length."""
    rollout = experiment.rollout
    return PrefixTree(
        prefix=experiment.prompt.max_tokens,
        branches=rollout.samples_per_prompt,
        branch=rollout.max_new_tokens,
    )


def rollout_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> RolloutMemory:
    """Return the estimate of the memory of rollouts that decode slots are planned with.

    Prompts of one document share their prefill, but each has its own copy of the keys and values.
    """
    return rollout_memory(
        config,
        dtype_of(experiment.policy),
        prompts=-(-experiment.training.prompts_per_step // mesh.rollout_replicas),
        prompt_tokens=experiment.prompt.max_tokens,
        samples=experiment.rollout.samples_per_prompt,
        max_new_tokens=experiment.rollout.max_new_tokens,
        tensor=mesh.rollout_tensor,
    )


def trained_parameters(experiment: Experiment, config: ModelConfig) -> int:
    """Return the number of parameters that are trained: all, or those of the adapters."""
    lora = lora_of(experiment)
    return lora.parameters(config) if lora else config.parameters


def frozen_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> int:
    """Return the bytes per device of the parameters that are not trained, which are stored as decoding needs them."""
    return _decoding_bytes(experiment, config) // mesh.weight_shards if lora_of(experiment) else 0


def rpt_memory(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> RptMemory:
    """Return the memory of task "rpt", whose memory fields are planned or set."""
    parameters = FLOAT32_BYTES * trained_parameters(experiment, config) // mesh.weight_shards
    needs_average = REWARDS[experiment.objective.reward].requirements.average
    state = StateBytes(
        frozen=frozen_bytes(experiment, config, mesh),
        parameters_and_reference=2 * parameters,
        adam_moments=2 * parameters,
        moving_average=parameters if needs_average else 0,
    )
    training = experiment.training
    row = PrefixTree(prefix=training.microbatch_tokens, branches=0, branch=0)
    update = UpdateBytes(
        gradients=2 * parameters,
        # The frozen and the reference parameters never change, so the copy does not hold them.
        state_before_step=state.total - state.frozen - parameters if training.minibatches_per_step > 1 else 0,
        backward=backward_bytes(experiment, config, mesh, row, count=1),
    )
    return RptMemory(state=state, sampling=_sampling_bytes(experiment, config, mesh), update=update)


def _sampling_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> SamplingBytes:
    tree = rollout_tree(experiment)
    kv_per_token = cache_bytes(config, dtype_of(experiment.policy))
    # Each replica samples an equal part of the prompts, with an equal part of the decode slots.
    prompts = -(-experiment.training.prompts_per_step // mesh.rollout_replicas)
    rollouts = prompts * tree.branches
    slots = min(-(-experiment.rollout.decode_slots // mesh.rollout_replicas) or rollouts, rollouts)
    # Prompts are prefilled a few at a time, and long ones in chunks.
    prefill_tokens = experiment.rollout.prefill_tokens
    rows = min(prompts, max(1, prefill_tokens // tree.prefix))
    pairs = rows * min(tree.prefix, prefill_tokens) * tree.prefix
    scores = FLOAT32_BYTES * config.heads * pairs if _forms_all_scores(experiment) else 0
    return SamplingBytes(
        kv_per_token=kv_per_token,
        prompt_kv=prompts * tree.prefix * kv_per_token // mesh.rollout_tensor,
        response_kv=slots * tree.branch * kv_per_token // mesh.rollout_tensor,
        prompt_attention_scores=scores // mesh.rollout_tensor,
        resharded_parameters=_resharded_bytes(experiment, config, mesh),
    )


def _resharded_bytes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> int:
    """Return the bytes per device of the parameters that are copied for decoding: gathered over fsdp, or rounded."""
    lora = lora_of(experiment)
    itemsize = jnp.dtype(dtype_of(experiment.policy)).itemsize
    adapters = lora.parameters(config) * itemsize if lora else 0
    if mesh.fsdp > 1 or mesh.tensor != mesh.rollout_tensor:
        return (_decoding_bytes(experiment, config) + adapters) // mesh.rollout_tensor
    if dtype_of(experiment.policy) == "float32":
        return 0
    return (adapters if lora else _rounded_parameters(experiment, config) * itemsize) // mesh.rollout_tensor


def _decoding_bytes(experiment: Experiment, config: ModelConfig) -> int:
    """Return the bytes of all parameters but adapters for decoding: matrices in policy.dtype, the rest in float32."""
    rounded = _rounded_parameters(experiment, config)
    itemsize = jnp.dtype(dtype_of(experiment.policy)).itemsize
    return rounded * itemsize + (config.parameters - rounded) * FLOAT32_BYTES


def _rounded_parameters(experiment: Experiment, config: ModelConfig) -> int:
    """Return the number of parameters that decoding needs in policy.dtype, see `model.transformer.in_compute_dtype`."""
    policy = experiment.policy
    tables = config.vocab * config.width * (1 if config.tied else 2)
    matrices = config.layer_matrix_parameters
    return matrices + tables if head_precision_of(policy) == dtype_of(policy) == "bfloat16" else matrices


def _forms_all_scores(experiment: Experiment) -> bool:
    """Return whether all attention scores of a layer exist at once."""
    return experiment.policy.attention == "reference"


def backward_bytes(
    experiment: Experiment, config: ModelConfig, mesh: MeshSizes, tree: PrefixTree, count: int
) -> BackwardBytes:
    """Return what a forward and backward pass over `count` trees per device saves, without parameters and gradients."""
    itemsize = jnp.dtype(dtype_of(experiment.policy)).itemsize

    # Saved per layer. Reference attention: its exponentials in float32 and its weights in the compute dtype. Everything else:
    # input and output of both norms, which compute in float32, and six products of the feed-forward block.
    pair_bytes = _forms_all_scores(experiment) * config.heads * (FLOAT32_BYTES + itemsize) / mesh.tensor
    ffn_tensor = mesh.tensor
    ffn_units = config.ffn
    expert_rows = 0
    if config.experts:
        # In the worst case all tokens choose the experts of one device. It then has a row for each pair of a token and one of
        # its experts: two copies of the input, the output, and the hidden units.
        ffn_tensor = 1
        ffn_units *= config.experts_per_token
        expert_rows = 3 * config.experts_per_token * config.width * itemsize
    token_bytes = (
        config.width * (6 * FLOAT32_BYTES + 2 * itemsize) + expert_rows + 6 * ffn_units * itemsize / ffn_tensor
    )
    saved = AttentionSize(tokens=tree.tokens, pairs=tree.pairs)

    # Without rematerialization, every layer saves all of this.
    layers = config.layers
    kept = 0
    if experiment.policy.remat != "none":
        # Every layer keeps its input and, with "dots", its projections and the output of blockwise attention. The rest is
        # recomputed one layer at a time, for the prefix or for the branches, just before it is differentiated.
        kept_per_token = config.width
        if experiment.policy.remat == "dots":
            attended = 0 if _forms_all_scores(experiment) else config.head_size * config.heads
            projected = config.head_size * (config.heads + 2 * config.kv_heads) + attended
            kept_per_token += 2 * config.width + projected / mesh.tensor + 2 * ffn_units / ffn_tensor
        kept = config.layers * tree.tokens * kept_per_token * itemsize
        layers = 1
        parts = tree.prefix_size, tree.branches_size
        saved = max(parts, key=lambda part: part.tokens * token_bytes + part.pairs * pair_bytes)
    return BackwardBytes(
        attention_scores=int(count * layers * saved.pairs * pair_bytes),
        other_activations=int(count * (kept + layers * saved.tokens * token_bytes)),
        logit_chunk=FLOAT32_BYTES * experiment.training.logit_chunk_tokens * config.vocab // mesh.tensor,
    )


def pretrain_tree(experiment: Experiment) -> PrefixTree:
    """Return a document with its rows of traces, at full length. Without a weight, traces are left out."""
    pretrain = experiment.pretrain
    return PrefixTree(
        prefix=experiment.data.max_document_tokens,
        branches=pretrain.rows_per_window if pretrain.trace_weight else 0,
        branch=experiment.pretrain.row_tokens,
    )


def pretrain_memory(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> PretrainMemory:
    """Return the memory of task "pretrain", whose memory fields are planned or set."""
    parameters = FLOAT32_BYTES * trained_parameters(experiment, config) // mesh.weight_shards
    documents = mesh.max_per_batch_shard(experiment.pretrain.windows_per_step)
    return PretrainMemory(
        frozen=frozen_bytes(experiment, config, mesh),
        parameters=parameters,
        adam_moments=2 * parameters,
        gradients=parameters,
        backward=backward_bytes(experiment, config, mesh, pretrain_tree(experiment), documents),
    )
