"""Sizes that follow from a config, computed by arithmetic: tokens, FLOPs and memory.

No program runs and no array of the run's size is allocated, so a config for a pod can be described on a laptop. `derive`
computes the sizes as typed fields; `render` and `print_description` only format them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import NamedTuple

import jax
import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.config.derived import cold_start_experiment
from rpt_jax.corpus.prepared import CORPUS_BYTES_PER_TOKEN
from rpt_jax.distributed.mesh import DECODING, make_abstract_mesh
from rpt_jax.distributed.sharding import parameter_shardings
from rpt_jax.infra.console import table
from rpt_jax.infra.optimizer import make_schedule
from rpt_jax.model.context_length import context_warnings
from rpt_jax.model.flops import cache_flops, causal_pairs, forward_flops, training_flops
from rpt_jax.model.lora import lora_of
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.registry import REWARDS
from rpt_jax.rollout.memory import device_memory
from rpt_jax.setup import check_split, make_policy
from rpt_jax.sizes.kept_rollouts import kept_evaluation_bytes, kept_training_bytes
from rpt_jax.sizes.limits import short_response_warnings
from rpt_jax.sizes.memory import (
    FLOAT32_BYTES,
    BackwardBytes,
    PretrainMemory,
    RptMemory,
    frozen_bytes,
    pretrain_memory,
    pretrain_tree,
    rollout_tree,
    rpt_memory,
    trained_parameters,
)
from rpt_jax.sizes.mesh import MeshSizes, resolve_mesh
from rpt_jax.sizes.plan import Plan, plan_memory
from rpt_jax.sizes.policy import model_config_of

logger = logging.getLogger(__name__)

# Columns of the printed description: longer cells are wrapped.
_COLUMN_WIDTHS = {"quantity": 44, "value": 30, "derived from": 36}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySizes:
    """Sizes of the policy.

    Attributes:
      source: the config field that the sizes were read from, with its value.
      parameters: number of parameters, without adapters.
      trained_parameters: parameters that are trained: all, or those of the adapters.
      matmul_parameters: parameters that each token is multiplied with (N), of the experts those that it runs through.
      experts: experts of each layer, 0 for a dense policy.
      experts_per_token: experts that each token runs through.
    """

    source: str
    layers: int
    width: int
    vocab: int
    parameters: int
    trained_parameters: int
    matmul_parameters: int
    experts: int
    experts_per_token: int


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
    """Model FLOPs of one step of task "rpt" by phase, on all devices together, at full lengths (see `model.flops`).

    No prompts share a prefix in this count. Scoring and evaluation are not counted.

    Attributes:
      sampling: FLOPs of one round of sampling.
      sampling_attention: the part of attention in them.
      update: FLOPs of the update on rollouts.
      update_attention: the part of attention in them.
      update_forward_passes: forward passes that the update amounts to; the differentiated pass counts as three, or as two if the
        matrices are frozen.
      reward: forward passes of the training reward beyond sampling.
      documents: the next-token loss on documents.
      dynamic_sampling: upper bound of the FLOPs of repeated sampling rounds, over the whole run.
      largest_step: upper bound of the FLOPs of any step, with its repeated rounds.
      total_steps: training steps.
    """

    sampling: float
    sampling_attention: float
    update: float
    update_attention: float
    update_forward_passes: int
    reward: float
    documents: float
    dynamic_sampling: float
    largest_step: float
    total_steps: int

    @property
    def step(self) -> float:
        """FLOPs of one step without dynamic sampling."""
        return self.sampling + self.update + self.reward + self.documents

    @property
    def run(self) -> float:
        """FLOPs of all steps without dynamic sampling."""
        return self.total_steps * self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class RptSizes:
    """Sizes of task "rpt"."""

    batch: RptBatch
    tokens: RptTokens
    flops: RptFlops
    memory: RptMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSizes:
    """Sizes of task "pretrain", or of the cold start of task "rpt"; tokens, traces and FLOPs are upper bounds."""

    windows_per_step: int
    windows_per_device: int
    traces_per_step: int
    tokens_per_step: int
    flops_per_step: float
    total_steps: int
    memory: PretrainMemory

    @property
    def run_flops(self) -> float:
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
    flops_per_batch: float
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
      budget_steps: steps that `training.flops_budget` allows at least, without the FLOPs of scoring; None without such a budget.
      seconds_budget: `training.seconds_budget`.
      learning_rates: (step, learning rate) of the first step, the step in which warmup ends, and the last.
      checkpoint_bytes: bytes on disk of the checkpoints that are kept.
      kept_training_bytes: bytes of the kept rollouts of training, before compression.
      kept_evaluation_bytes: bytes of those of evaluations; 0 if the config does not tell.
    """

    total_steps: int
    budget_steps: int | None
    seconds_budget: float
    learning_rates: tuple[tuple[int, float], ...]
    checkpoint_bytes: int
    kept_training_bytes: int
    kept_evaluation_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """Sizes that follow from a config.

    Attributes:
      memory: bytes per device that memory fields were planned with; may be infinite.
      plan: the values of the memory fields.
      score: a scoring batch; set for every task but "pretrain".
      rpt: set for task "rpt".
      pretrain: set for task "pretrain".
      cold_start: the pre-training that task "rpt" starts with, if it has one.
      run: set for the tasks that train.
    """

    task: str
    policy: PolicySizes
    mesh: MeshSizes
    memory: float
    plan: Plan
    score: ScoreSizes | None = None
    rpt: RptSizes | None = None
    pretrain: PretrainSizes | None = None
    cold_start: PretrainSizes | None = None
    run: RunSizes | None = None

    @property
    def peak_bytes_per_device(self) -> int:
        """The largest memory of any phase on one device: a lower bound."""
        totals = [self.score.parameter_bytes] if self.score else []
        totals += [self.rpt.memory.sampling_total, self.rpt.memory.update_total] if self.rpt else []
        totals += [sizes.memory.total for sizes in (self.pretrain, self.cold_start) if sizes]
        return max(totals)


class Row(NamedTuple):
    """A line of the rendered description: a quantity, its value, and the config fields that it is derived from."""

    quantity: str
    value: int | float | str
    derived_from: str


def derive(experiment: Experiment, devices: int, memory: float = math.inf) -> Derived:
    """Compute every size of an experiment on `devices` devices.

    Prompts and responses are taken at their length limits, so tokens, FLOPs and caches are upper bounds. Memory counts the
    named arrays only and is a lower bound: XLA's temporaries are added to it.

    Args:
      experiment: a validated config.
      devices: number of devices; if they are too few for the mesh, the smallest mesh that fits the config is described.
      memory: bytes per device, for the memory fields that the config leaves open; infinite for no limit.

    Raises:
      UserError: the mesh, the preset, the policy's config.json or the learning-rate schedule is invalid.
    """
    config, source = model_config_of(experiment)
    mesh = resolve_mesh(experiment.mesh, devices)
    plan = plan_memory(experiment, config, mesh, memory)
    experiment = plan.experiment
    task = experiment.task
    has_cold_start = task == "rpt" and experiment.cold_start.total_steps > 0
    rpt = _rpt_sizes(experiment, config, mesh) if experiment.reinforces else None
    pretrain = _pretrain_sizes(experiment, config, mesh) if task == "pretrain" else None
    cold_start = _pretrain_sizes(cold_start_experiment(experiment), config, mesh) if has_cold_start else None
    return Derived(
        task=task,
        policy=PolicySizes(
            source=source,
            layers=config.layers,
            width=config.width,
            vocab=config.vocab,
            parameters=config.parameters,
            trained_parameters=trained_parameters(experiment, config),
            matmul_parameters=config.matmul_parameters,
            experts=config.experts,
            experts_per_token=config.experts_per_token,
        ),
        mesh=mesh,
        memory=memory,
        plan=plan,
        score=_score_sizes(experiment, config, mesh) if experiment.scores_corpus else None,
        rpt=rpt,
        pretrain=pretrain,
        cold_start=cold_start,
        run=_run_sizes(experiment, config, _budget_steps(experiment, rpt, pretrain, cold_start))
        if rpt or pretrain
        else None,
    )


def _rpt_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> RptSizes:
    return RptSizes(
        batch=_rpt_batch(experiment, mesh),
        tokens=_rpt_tokens(experiment),
        flops=_rpt_flops(experiment, config),
        memory=rpt_memory(experiment, config, mesh),
    )


def _rpt_batch(experiment: Experiment, mesh: MeshSizes) -> RptBatch:
    training = experiment.training
    samples = experiment.rollout.samples_per_prompt
    # Each row of the update holds a prompt and as many of its responses as fit.
    responses_per_row = (training.microbatch_tokens - experiment.prompt.max_tokens) // experiment.rollout.max_new_tokens
    minibatch_prompts = math.ceil(training.prompts_per_step / training.minibatches_per_step)
    minibatch_rows = minibatch_prompts * math.ceil(samples / max(1, responses_per_row))
    prompts_per_device = mesh.max_per_batch_shard(training.prompts_per_step)
    return RptBatch(
        prompts_per_step=training.prompts_per_step,
        rollouts_per_step=training.prompts_per_step * samples,
        minibatches_per_step=training.minibatches_per_step,
        max_microbatches_per_step=training.minibatches_per_step * math.ceil(minibatch_rows / mesh.batch_shards),
        prompts_per_device=prompts_per_device,
        rollouts_per_device=prompts_per_device * samples,
        microbatch_tokens_per_device=training.microbatch_tokens,
    )


def _rpt_tokens(experiment: Experiment) -> RptTokens:
    tree = rollout_tree(experiment)
    prompts = experiment.training.prompts_per_step
    return RptTokens(
        prompt_tokens_per_step=prompts * tree.prefix,
        response_tokens_per_step=prompts * tree.branches * tree.branch,
        shared_tokens_per_prompt=tree.tokens,
        unshared_tokens_per_prompt=tree.branches * (tree.prefix + tree.branch),
    )


def _rpt_flops(experiment: Experiment, config: ModelConfig) -> RptFlops:
    training = experiment.training
    prompts = training.prompts_per_step
    # Forward and backward cost three forward passes, and those of frozen matrices two. Several minibatches need the
    # log-probabilities from before the first update, a KL term those of the reference policy, and a load-balancing loss the
    # experts of all tokens: one forward pass each.
    objective = experiment.objective
    more_passes = (training.minibatches_per_step > 1) + (objective.kl != "none") + (objective.balance_weight > 0)
    passes = (2 if lora_of(experiment) else 3) + more_passes
    matmul = _update_flops(experiment, config, with_attention=False)
    update_attention = prompts * (3 + more_passes) * (_update_flops(experiment, config) - matmul)
    update = prompts * passes * matmul + update_attention
    sampling = prompts * _sampling_flops(experiment, config)
    reward = prompts * _reward_flops(experiment, config)
    dynamic_steps = max(0, training.total_steps + 1 - max(1, training.dynamic_sampling_from))
    extra_rounds = dynamic_steps * (training.dynamic_sampling_rounds - 1)
    documents = prompts * _document_flops(experiment, config)
    rounds = training.dynamic_sampling_rounds if dynamic_steps else 1
    return RptFlops(
        sampling=sampling,
        sampling_attention=sampling - prompts * _sampling_flops(experiment, config, with_attention=False),
        update=update,
        update_attention=update_attention,
        update_forward_passes=passes,
        reward=reward,
        documents=documents,
        dynamic_sampling=extra_rounds * (sampling + reward),
        largest_step=rounds * (sampling + reward) + update + documents,
        total_steps=training.total_steps,
    )


def _sampling_flops(experiment: Experiment, config: ModelConfig, *, with_attention: bool = True) -> float:
    """Return the FLOPs of sampling all responses to a prompt, as `rollout.cost.sampling_cost` counts them."""
    tree = rollout_tree(experiment)
    before = tree.prefix - 1
    decoded = tree.branch - 1  # The last token of a response is never run.
    return (
        cache_flops(config, tokens=before, pairs=with_attention * causal_pairs(before))
        + forward_flops(config, tokens=1, pairs=with_attention * tree.prefix, head_tokens=1)
        + tree.branches
        * forward_flops(
            config, tokens=decoded, pairs=with_attention * causal_pairs(decoded, tree.prefix), head_tokens=decoded
        )
    )


def _update_flops(experiment: Experiment, config: ModelConfig, *, with_attention: bool = True) -> float:
    """Return the FLOPs of a forward pass over a prompt and its responses, as `objective.gradient.row_flops` counts them."""
    tree = rollout_tree(experiment)
    before = tree.prefix - 1  # The last token of the prompt is run with every response.
    tokens = tree.branches * tree.branch
    pairs = causal_pairs(before) + tree.branches * causal_pairs(tree.branch, before)
    return forward_flops(config, tokens=before + tokens, pairs=with_attention * pairs, head_tokens=tokens)


def _reward_flops(experiment: Experiment, config: ModelConfig) -> float:
    """Return the FLOPs per prompt that the training reward takes beyond sampling, as `rewards.flops` counts them."""
    tree = rollout_tree(experiment)
    requirements = REWARDS[experiment.objective.reward].requirements
    prompt = forward_flops(config, tokens=tree.prefix, pairs=causal_pairs(tree.prefix), head_tokens=0)
    pairs = tree.branches * causal_pairs(tree.branch, tree.prefix)
    responses = forward_flops(config, tokens=tree.branches * tree.branch, pairs=pairs, head_tokens=0)
    return (requirements.prompt_passes - 1) * prompt + (requirements.response_passes - 1) * responses


def _document_flops(experiment: Experiment, config: ModelConfig) -> float:
    tokens = experiment.data.max_document_tokens if experiment.objective.document_weight else 0
    return training_flops(
        config,
        tokens=tokens,
        pairs=causal_pairs(tokens),
        head_tokens=tokens,
        frozen=lora_of(experiment) is not None,
    )


def _pretrain_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> PretrainSizes:
    pretrain = experiment.pretrain
    tree = pretrain_tree(experiment)
    pairs = causal_pairs(tree.prefix) + tree.branches * causal_pairs(tree.branch, tree.prefix)
    frozen = lora_of(experiment) is not None
    document = training_flops(config, tokens=tree.tokens, pairs=pairs, head_tokens=tree.tokens, frozen=frozen)
    return PretrainSizes(
        windows_per_step=pretrain.windows_per_step,
        windows_per_device=mesh.max_per_batch_shard(pretrain.windows_per_step),
        traces_per_step=pretrain.windows_per_step * pretrain.traces_per_window if pretrain.trace_weight else 0,
        tokens_per_step=pretrain.windows_per_step * tree.tokens,
        flops_per_step=pretrain.windows_per_step * document,
        total_steps=experiment.training.total_steps,
        memory=pretrain_memory(experiment, config, mesh),
    )


def _score_sizes(experiment: Experiment, config: ModelConfig, mesh: MeshSizes) -> ScoreSizes:
    window_tokens = experiment.data.max_document_tokens
    windows = experiment.data.score_batch_windows
    pairs = causal_pairs(window_tokens)
    window_flops = forward_flops(config, tokens=window_tokens, pairs=pairs, head_tokens=window_tokens)
    return ScoreSizes(
        windows_per_batch=windows,
        windows_per_device=mesh.max_per_batch_shard(windows),
        tokens_per_batch=windows * window_tokens,
        flops_per_batch=windows * window_flops,
        corpus_bytes_per_token=CORPUS_BYTES_PER_TOKEN,
        parameter_bytes=frozen_bytes(experiment, config, mesh)
        + FLOAT32_BYTES * trained_parameters(experiment, config) // mesh.weight_shards,
    )


def _budget_steps(
    experiment: Experiment, rpt: RptSizes | None, pretrain: PretrainSizes | None, cold_start: PretrainSizes | None
) -> int | None:
    """Return the steps that `training.flops_budget` allows at least; None without such a budget."""
    training = experiment.training
    if not training.flops_budget:
        return None
    largest_step = rpt.flops.largest_step if rpt else pretrain.flops_per_step if pretrain else 0.0
    left = training.flops_budget - (cold_start.run_flops if cold_start else 0.0)
    return min(training.total_steps, max(1, math.ceil(left / largest_step)))


def _run_sizes(experiment: Experiment, config: ModelConfig, budget_steps: int | None) -> RunSizes:
    steps = experiment.training.total_steps
    updates_per_step = experiment.training.minibatches_per_step if experiment.reinforces else 1
    schedule = make_schedule(experiment.optimizer, steps * updates_per_step)
    last = steps * updates_per_step - 1
    updates = sorted({0, min(experiment.optimizer.warmup_steps, last), last})
    has_average = experiment.reinforces and REWARDS[experiment.objective.reward].requirements.average
    # Parameters, two moments and, for some rewards, the moving average.
    trees = 4 if has_average else 3
    return RunSizes(
        total_steps=steps,
        budget_steps=budget_steps,
        seconds_budget=experiment.training.seconds_budget,
        learning_rates=tuple(
            (update // updates_per_step + 1, float(np.asarray(schedule(update)))) for update in updates
        ),
        checkpoint_bytes=trees * FLOAT32_BYTES * trained_parameters(experiment, config) * experiment.checkpoint.keep,
        kept_training_bytes=kept_training_bytes(experiment) if experiment.reinforces else 0,
        kept_evaluation_bytes=kept_evaluation_bytes(experiment) if experiment.reinforces else 0,
    )


def print_description(experiment: Experiment, devices: int | None = None) -> None:
    """Print the sizes of an experiment as a table, for `devices` devices or those of this machine.

    Raises:
      UserError: as `derive` does, or the mesh does not split the policy or the batches evenly.
    """
    derived = derive(experiment, jax.device_count() if devices is None else devices, device_memory())
    _check_split(experiment, derived.mesh)
    columns = tuple(_COLUMN_WIDTHS)
    table("Sizes derived from this config", columns, render(derived), max_widths=tuple(_COLUMN_WIDTHS.values()))
    runs_here = derived.mesh.devices == derived.mesh.available
    warnings = derived.plan.warnings if runs_here else ()
    config = model_config_of(experiment)[0]
    for warning in (*warnings, *short_response_warnings(experiment, config), *context_warnings(experiment, config)):
        logger.warning(warning)


def _check_split(experiment: Experiment, sizes: MeshSizes) -> None:
    """Check that a mesh splits the batches and the policy's parameters evenly. Raises: UserError."""
    mesh = make_abstract_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.rollout_tensor)
    check_split(experiment, mesh)
    policy = make_policy(experiment.policy, model_config_of(experiment)[0], lora=lora_of(experiment))
    parameter_shardings(policy, mesh)
    if experiment.samples:
        parameter_shardings(policy, mesh, DECODING)


def render(derived: Derived) -> list[Row]:
    """Return the lines of the description; bytes are formatted with binary units."""
    rows = _policy_rows(derived)
    rows += _plan_rows(derived)
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
_DOCUMENTS = "pretrain.windows_per_step"
_WEIGHTS = "policy, mesh.fsdp, mesh.tensor"


def _policy_rows(derived: Derived) -> list[Row]:
    policy = derived.policy
    mesh = derived.mesh
    note = "" if mesh.devices == mesh.available else f"; {mesh.available} available, so this will not run here"
    devices = f"{mesh.devices} device{'s' * (mesh.devices > 1)}{note}"
    has_adapters = policy.trained_parameters != policy.parameters
    trained = [Row("trained parameters, of adapters", policy.trained_parameters, "policy.lora")] if has_adapters else []
    experts = [Row("experts of a token, of a layer", f"{policy.experts_per_token} of {policy.experts}", "policy")]
    return [
        Row("policy: layers x width, vocabulary", f"{policy.layers} x {policy.width}, {policy.vocab}", policy.source),
        Row("parameters", policy.parameters, "policy"),
        *trained,
        *(experts if policy.experts else []),
        Row("matmul parameters (N)", policy.matmul_parameters, "policy"),
        Row("mesh: data x fsdp x tensor", f"{mesh.data} x {mesh.fsdp} x {mesh.tensor} = {devices}", "mesh"),
    ]


def _plan_rows(derived: Derived) -> list[Row]:
    """Return the memory fields that the config leaves open."""
    if not derived.plan.fields:
        return []
    planned = [Row(field, value, f"planned: {reason}") for field, value, reason in derived.plan.fields]
    if math.isinf(derived.memory):
        return planned
    return [_bytes_row("per device: memory to plan with", derived.memory, "nine tenths of a device's"), *planned]


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
        Row("tokens per prompt, shared: S + G*T", tokens.shared_tokens_per_prompt, lengths),
        Row("tokens per prompt, not shared: G*(S + T)", tokens.unshared_tokens_per_prompt, lengths),
        Row("tokens, shared / not shared", tokens.sharing_ratio, lengths),
    ]


def _flops_rows(flops: RptFlops) -> list[Row]:
    step = f"policy, prompt, rollout, {_PROMPTS}"
    update = f"{step}, training.minibatches_per_step, objective.kl"
    passes = f"FLOPs of the update, {flops.update_forward_passes} forward passes"
    rows = [
        Row("FLOPs of sampling", flops.sampling, step),
        Row("FLOPs of sampling, attention alone", flops.sampling_attention, step),
        Row(passes, flops.update, update),
        Row("FLOPs of the update, attention alone", flops.update_attention, update),
    ]
    if flops.reward:
        rows.append(Row("FLOPs of the reward's forward passes", flops.reward, f"{step}, objective.reward"))
    if flops.documents:
        fields = f"policy, {_PROMPTS}, data.max_document_tokens, objective.document_weight"
        rows.append(Row("FLOPs of the documents", flops.documents, fields))
    return [
        *rows,
        Row("FLOPs of a step, at most", flops.step, "all above"),
        Row("FLOPs of all steps, at most", flops.run, "training.total_steps"),
        Row("FLOPs of dynamic sampling, at most", flops.dynamic_sampling, "training.dynamic_sampling_*"),
    ]


def _memory_rows(memory: RptMemory) -> list[Row]:
    state = memory.state
    sampling = memory.sampling
    update = memory.update
    prompts = f"policy, mesh, {_PROMPTS}, prompt.max_tokens"
    minibatches = f"{_WEIGHTS}, training.minibatches_per_step"
    # Resident in the whole step.
    rows = [
        *_frozen_rows(state.frozen),
        _bytes_row("per device: parameters and reference", state.parameters_and_reference, _WEIGHTS),
        _bytes_row("per device: Adam moments", state.adam_moments, _WEIGHTS),
    ]
    if state.moving_average:
        rows.append(_bytes_row("per device: moving average", state.moving_average, "policy, objective.reward"))
    return [
        *rows,
        # Sampling.
        _bytes_row("per token: keys and values", sampling.kv_per_token, "policy"),
        _bytes_row("per device: keys and values of prompts", sampling.prompt_kv, prompts),
        _bytes_row(
            "per device: keys and values of responses", sampling.response_kv, f"policy, mesh, {_PROMPTS}, rollout"
        ),
        _bytes_row("per device: attention scores of prompts", sampling.prompt_attention_scores, prompts),
        _bytes_row(
            "per device: parameters for decoding",
            sampling.resharded_parameters,
            "policy, mesh.rollout_tensor",
        ),
        _bytes_row(
            "per device: sampling in total, at least",
            memory.sampling_total,
            "state, resharded parameters, prompts, the larger of responses and scores",
        ),
        # Update.
        _bytes_row("per device: gradients, sum and microbatch", update.gradients, _WEIGHTS),
        _bytes_row("per device: state before the step", update.state_before_step, minibatches),
        *_backward_rows(update.backward, _MICROBATCH),
        _bytes_row("per device: update in total, at least", memory.update_total, "state and the five above"),
    ]


def _frozen_rows(size: int) -> list[Row]:
    """Return the line of the parameters that are not trained, if there are any."""
    return [_bytes_row("per device: frozen parameters", size, f"{_WEIGHTS}, policy.dtype")] if size else []


def _backward_rows(backward: BackwardBytes, batch_field: str) -> list[Row]:
    fields = f"policy, mesh, {batch_field}"
    logits = "policy, mesh.tensor, training.logit_chunk_tokens"
    return [
        _bytes_row("per device: saved attention scores", backward.attention_scores, fields),
        _bytes_row("per device: other saved activations", backward.other_activations, fields),
        _bytes_row("per device: logits that exist at once", backward.logit_chunk, logits),
    ]


def _pretrain_rows(sizes: PretrainSizes) -> list[Row]:
    lengths = f"{_DOCUMENTS}, data.max_document_tokens, pretrain.rows_per_window, pretrain.row_tokens"
    memory = sizes.memory
    return [
        Row("windows per step", sizes.windows_per_step, _DOCUMENTS),
        Row("windows per device", sizes.windows_per_device, f"{_DOCUMENTS}, mesh.data, mesh.fsdp"),
        Row("traces per step, at most", sizes.traces_per_step, f"{_DOCUMENTS}, pretrain.traces_per_window"),
        Row("tokens per step, at most", sizes.tokens_per_step, lengths),
        Row("FLOPs of a step, at most", sizes.flops_per_step, f"policy, {lengths}"),
        Row("FLOPs of all steps, at most", sizes.run_flops, "training.total_steps"),
        *_frozen_rows(memory.frozen),
        _bytes_row("per device: parameters", memory.parameters, _WEIGHTS),
        _bytes_row("per device: Adam moments", memory.adam_moments, _WEIGHTS),
        _bytes_row("per device: gradients", memory.gradients, _WEIGHTS),
        *_backward_rows(memory.backward, _DOCUMENTS),
        _bytes_row("per device: total, at least", memory.total, "all above"),
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
    has_budget = sizes.budget_steps or sizes.seconds_budget
    rows = [Row("steps, at most" if has_budget else "steps", sizes.total_steps, "training.total_steps")]
    if sizes.budget_steps:
        fields = "training.flops_budget, FLOPs of a step with dynamic sampling; scoring takes a part"
        rows.append(Row("steps that the budget allows, at least", sizes.budget_steps, fields))
    if sizes.seconds_budget:
        fields = "training.seconds_budget; the run tells how many steps"
        rows.append(Row("seconds of training, at most", sizes.seconds_budget, fields))
    rows += [
        Row("learning rate", rates, "optimizer"),
        _bytes_row("on disk: checkpoints", sizes.checkpoint_bytes, "policy, checkpoint.keep, objective.reward"),
    ]
    for quantity, size, fields in (
        ("training", sizes.kept_training_bytes, "training.kept_prompts_per_step, rollout"),
        ("evaluations", sizes.kept_evaluation_bytes, "evaluation, rollout"),
    ):
        if size:
            rows.append(_bytes_row(f"on disk: kept rollouts of {quantity}, below", size, fields))
    return rows


def _bytes_row(quantity: str, size: float, derived_from: str) -> Row:
    return Row(quantity, _format_bytes(size), derived_from)


def _format_bytes(size: float) -> str:
    """Format a number of bytes with a binary unit: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
