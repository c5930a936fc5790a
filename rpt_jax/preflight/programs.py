"""The programs that a step of a run is made of, with abstract arguments: lowered as training lowers them, and never run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import score_batch
from rpt_jax.describe import model_config_of
from rpt_jax.distributed.sharding import (
    DECODING,
    abstract_optimizer,
    abstract_parameters,
    abstract_prompts,
    make_reshard_fn,
    num_batch_shards,
    parameter_shardings,
)
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.model.transformer import in_compute_dtype
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.rewards.rewarder import RewardedRollouts, is_prefix_match, reward_layout, training_reward
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.rollouts import Decoding, Rollouts
from rpt_jax.rollout.sampler import find_shared_prefixes, max_tail_tokens, plan_decoding
from rpt_jax.setup import Setup, make_policy
from rpt_jax.tokenizers.tokenizer import ByteVocab, Tokenizer, load_tokenizer
from rpt_jax.train import update_limits

# Bytes of the longest token of the tokenizer that stands in for one that is not here: Qwen's has spaces of so many.
_LONGEST = 128
_SPECIAL = 4  # Its first ids: beginning, end, <think>, </think>.


class Program(NamedTuple):
    """A program of a step.

    Attributes:
      name: as tables have it.
      lower: traces it for its mesh, under `use_mesh`.
      beside: bytes a device of what lives while it runs and is none of its arguments.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside: int


class Step(NamedTuple):
    """A step of a run on a mesh: its programs in their order, and what the config decided on.

    Attributes:
      decoding: how rollouts are sampled, None for the task "score".
    """

    programs: tuple[Program, ...]
    setup: Setup
    decoding: Decoding | None


def make_step(experiment: Experiment, mesh: Mesh, memory: int) -> Step:
    """The programs of a step, in the mesh's context; `memory` is bytes a device to plan decode slots with.

    Raises: UserError, where the config does not fit the mesh, or the slots that it asks for the memory.
    """
    shape, _ = model_config_of(experiment)
    path = experiment.policy.path
    if path and Path(path).exists():
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = stand_in_tokenizer(shape.vocab)
        # Its tokens are bytes: a template would take several times the room that it takes in truth.
        prompt = dataclasses.replace(experiment.prompt, template="plain", chat_template=False)
        experiment = dataclasses.replace(experiment, prompt=prompt)
    policy = make_policy(experiment.policy, shape, tokenizer)
    params = abstract_parameters(policy, mesh)
    setup = Setup(policy, params, mesh, tokenizer, (), (), (), None)
    if experiment.task == "score":
        return Step((_scoring(experiment, setup),), setup, None)
    decoding = plan_decoding(experiment, setup.policy, setup.tokenizer, setup.mesh, memory)
    return Step(tuple(_rpt_programs(experiment, setup, decoding)), setup, decoding)


def bytes_a_device(tree: Any) -> int:
    """Bytes of abstract arrays on each device; those without a place are on all of them."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def stand_in_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer of the right size, whose tokens are the bytes, for a policy whose own is not on this machine."""
    pieces = [b""] * _SPECIAL + [bytes([b]) for b in range(256)]
    pieces += [b" " * _LONGEST] * (vocab - len(pieces))
    return Tokenizer(
        pieces=tuple(pieces),
        bos_id=0,
        eos_id=1,
        pad_id=1,
        think_id=2,
        end_think_id=3,
        stop_ids=(1,),
        special_ids=frozenset(range(_SPECIAL)),
        unused_ids=frozenset(),
        normalizer="",
        fingerprint="",
        source="a tokenizer that stands in",
        encode_ordinary=lambda texts: [[_SPECIAL + b for b in text.encode()] for text in texts],
    )


def _rpt_programs(experiment: Experiment, setup: Setup, decoding: Decoding) -> list[Program]:
    """What runs in a step of the task "rpt": `train.train` says in which order, and what lives how long."""
    t, o, mesh, params = experiment.training, experiment.objective, setup.mesh, setup.params
    optimizer = make_optimizer(experiment.optimizer, t.total_steps * t.minibatches_per_step)
    average = params if REWARDS[o.reward].requirements.average else None
    state = TrainState(params, abstract_optimizer(optimizer, params, mesh), average)
    layout = make_reshard_fn(setup.policy, mesh, lambda p: in_compute_dtype(setup.policy, p))
    weights = _decoding_weights(setup, layout) if layout else params
    sampled = _sampled(experiment, mesh)
    kept, laid_out, drawn = (
        bytes_a_device((state, params)),
        bytes_a_device(weights) if layout else 0,
        bytes_a_device(sampled),
    )
    vocab = ByteVocab(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in setup.tokenizer.byte_vocab))
    builder = PromptBuilder(experiment.prompt, setup.tokenizer)

    def sampling() -> jax.stages.Lowered:
        roots = find_shared_prefixes(_blank(sampled.prompts), max_tail_tokens(experiment, builder))
        roots = abstract_prompts(roots, mesh, DECODING)
        box_vocab = vocab if experiment.rollout.stop_at_box else None
        return sample_rollouts.lower(setup.policy, weights, roots, _key(), decoding, box_vocab)

    def rewarding() -> jax.stages.Lowered:
        r, p = sampled.rollouts, sampled.prompts
        finished = jax.ShapeDtypeStruct(r.ended_PxG.shape, bool, sharding=r.ended_PxG.sharding)
        arguments = r.tokens_PxGxT, r.lengths_PxG, finished, p.reference_PxR, p.boundaries_PxRp1
        return prefix_match_reward.lower(*arguments, *vocab, setup.tokenizer.end_think_id)

    def training_rewarding() -> jax.stages.Lowered:
        layout = reward_layout(experiment, setup.tokenizer, mesh, builder)
        return training_reward.lower(setup.policy, o, layout, params, average, sampled, vocab, _ids())

    def updating() -> jax.stages.Lowered:
        reference = params if o.kl != "none" else None
        limits, batch = update_limits(experiment, num_batch_shards(mesh)), _update_batch(experiment, sampled)
        return update_policy.lower(setup.policy, optimizer, o, limits, state, batch, reference)

    programs = [_scoring(experiment, setup)]
    if layout:
        programs.append(Program("reshard", lambda: layout.lower(params), kept - bytes_a_device(params)))
    own = 0 if layout else bytes_a_device(params)
    programs.append(Program("sample", sampling, kept - own))
    programs.append(Program("reward", rewarding, kept + laid_out))
    if not is_prefix_match(o):
        programs.append(
            Program("training reward", training_rewarding, kept + laid_out - bytes_a_device((params, average)))
        )
    reference = bytes_a_device(params) if o.kl != "none" else 0
    programs.append(Program("update", updating, kept - bytes_a_device(state) - reference + drawn))
    return programs


def _scoring(experiment: Experiment, setup: Setup) -> Program:
    documents, size = experiment.data.score_batch_windows, experiment.data.max_document_tokens

    def lower() -> jax.stages.Lowered:
        tokens, lengths = _ids(documents, size), _ids(documents)
        rows = abstract_prompts((tokens, tokens, lengths), setup.mesh)
        sizes = {"top_k": experiment.data.entropy_top_k, "chunk": experiment.training.logit_chunk_tokens}
        return score_batch.lower(setup.policy, setup.params, *rows, **sizes)

    return Program("score", lower, beside=0)


def _decoding_weights(setup: Setup, layout: Any) -> Any:
    places = parameter_shardings(setup.policy, setup.mesh, DECODING)
    shapes = jax.eval_shape(layout, setup.params)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _sampled(experiment: Experiment, mesh: Mesh) -> RewardedRollouts:
    """Prompts and rollouts of a step, as they lie on the mesh."""
    p, g = experiment.training.prompts_per_step, experiment.rollout.samples_per_prompt
    t, r = experiment.rollout.max_new_tokens, experiment.prompt.reference_bytes
    prompts = PromptBatch(
        tokens_PxS=_ids(p, experiment.prompt.max_tokens),
        lengths_P=_ids(p),
        ids_P=_ids(p),
        reference_PxR=jax.ShapeDtypeStruct((p, r), jnp.uint8),
        boundaries_PxRp1=jax.ShapeDtypeStruct((p, r + 1), bool),
        reference_ids_PxR=_ids(p, r),
        window_P=_ids(p),
        position_P=_ids(p),
        entropy_P=_floats(p),
    )
    rollouts = Rollouts(_ids(p, g, t), _ids(p, g), _floats(p, g, t), _ids(p, g))
    prompts, rollouts, reward, status = abstract_prompts((prompts, rollouts, _floats(p, g), _ids(p, g)), mesh)
    return RewardedRollouts(prompts=prompts, rollouts=rollouts, reward_PxG=reward, status_PxG=status)


def _update_batch(experiment: Experiment, sampled: RewardedRollouts) -> UpdateBatch:
    prompts, rollouts = sampled.prompts, sampled.rollouts

    def truths(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, bool, sharding=x.sharding)

    documents = None
    if experiment.objective.document_weight:
        ids = _ids(*prompts.lengths_P.shape, experiment.data.max_document_tokens)
        documents = abstract_prompts(
            NextTokenBatch(ids, ids, jax.ShapeDtypeStruct(ids.shape, bool)), prompts.lengths_P.sharding.mesh
        )
    return UpdateBatch(
        prompts_PxS=prompts.tokens_PxS,
        lengths_P=prompts.lengths_P,
        window_P=prompts.window_P,
        tokens_PxGxT=rollouts.tokens_PxGxT,
        mask_PxGxT=truths(rollouts.tokens_PxGxT),
        sampler_logprobs_PxGxT=rollouts.logprobs_PxGxT,
        advantages_PxG=sampled.reward_PxG,
        counted_P=truths(prompts.lengths_P),
        documents=documents,
    )


def _blank(prompts: PromptBatch) -> PromptBatch:
    """Prompts of one token each, on the host: what finds out what they have in common reads them."""
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), prompts)
    return blank._replace(lengths_P=np.ones_like(blank.lengths_P))


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _ids(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def _floats(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)
