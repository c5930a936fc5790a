"""The programs of a step, lowered with abstract arguments as training lowers them, without running anything."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpt_jax.config import Experiment
from rpt_jax.corpus.entropy import score_batch
from rpt_jax.distributed.mesh import DECODING, num_batch_shards
from rpt_jax.distributed.sharding import (
    abstract_optimizer,
    abstract_parameters,
    abstract_prompts,
    make_reshard_fn,
    parameter_shardings,
)
from rpt_jax.infra.optimizer import make_optimizer
from rpt_jax.model.lora import lora_of, split_adapters
from rpt_jax.model.transformer import Transformer, in_compute_dtype
from rpt_jax.objective.batch import NextTokenBatch, UpdateBatch
from rpt_jax.objective.update import TrainState, update_policy
from rpt_jax.prompts.builder import PromptBatch, PromptBuilder
from rpt_jax.prompts.targets import find_segments
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.rewards.rewarder import RewardedRollouts, is_prefix_match, reward_layout, training_reward
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.rollouts import Decoding, Rollouts
from rpt_jax.rollout.sampler import find_shared_prefixes, make_decoding, max_tail_tokens
from rpt_jax.setup import make_policy
from rpt_jax.sizes.policy import model_config_of
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.train import update_limits

# The stand-in tokenizer: its longest token has as many bytes as Qwen's longest, a run of spaces, and its first ids are
# special: beginning, end, <think> and </think>.
_LONGEST_TOKEN_BYTES = 128
_SPECIAL_TOKENS = 4


class ProgramName(enum.StrEnum):
    """Names of the programs in tables and JSON, in execution order."""

    SCORE = "score"
    RESHARD = "reshard"
    SAMPLE = "sample"
    REWARD = "reward"
    TRAINING_REWARD = "training reward"
    UPDATE = "update"


class Program(NamedTuple):
    """A program of a step.

    Attributes:
      name: one of `ProgramName`.
      lower: traces the program; call it in the context of its mesh.
      resident_bytes: bytes per device of arrays that live while it runs but are not among its arguments.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident_bytes: int


class Step(NamedTuple):
    """The programs of a step on a mesh, in execution order.

    Attributes:
      programs: the programs.
      policy: the policy.
      params: its abstract parameters, sharded for training.
      mesh: the mesh.
      decoding: how rollouts are sampled, None for task "score".
    """

    programs: tuple[Program, ...]
    policy: Transformer
    params: Any
    mesh: Mesh
    decoding: Decoding | None


def make_step(experiment: Experiment, mesh: Mesh) -> Step:
    """Return the programs of a step; call it in the context of the mesh.

    Args:
      experiment: a config whose memory fields are planned or set.
      mesh: devices that the programs are compiled for.

    Raises:
      UserError: the config does not fit the mesh.
    """
    config, _ = model_config_of(experiment)
    path = experiment.policy.path
    if path and Path(path).exists():
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = stand_in_tokenizer(config.vocab)
        # The stand-in encodes one byte per token, so a real template would take several times its tokens.
        template = "question" if experiment.asks_questions else "plain"
        prompt = dataclasses.replace(experiment.prompt, template=template, chat_template=False)
        experiment = dataclasses.replace(experiment, prompt=prompt)
    policy = make_policy(experiment.policy, config, tokenizer, lora_of(experiment))
    params = abstract_parameters(policy, mesh)
    score = () if experiment.asks_questions else (_score_program(experiment, policy, params, mesh),)
    if experiment.task == "score":
        return Step(programs=score, policy=policy, params=params, mesh=mesh, decoding=None)
    decoding = make_decoding(experiment, tokenizer)
    programs = (*score, *_rl_programs(experiment, policy, params, tokenizer, mesh, decoding))
    return Step(programs=programs, policy=policy, params=params, mesh=mesh, decoding=decoding)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of abstract arrays on each device; arrays without a sharding are replicated."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def stand_in_tokenizer(vocab: int) -> Tokenizer:
    """Return a byte-level tokenizer of `vocab` tokens, for a policy whose tokenizer does not exist here."""
    pieces = [b""] * _SPECIAL_TOKENS + [bytes([byte]) for byte in range(256)]
    pieces += [b" " * _LONGEST_TOKEN_BYTES] * (vocab - len(pieces))
    return Tokenizer(
        pieces=tuple(pieces),
        bos_id=0,
        prefix_ids=(0,),
        eos_id=1,
        pad_id=1,
        think_id=2,
        end_think_id=3,
        stop_ids=(1,),
        special_ids=frozenset(range(_SPECIAL_TOKENS)),
        special_names={},
        unused_ids=frozenset(),
        normalizer="",
        fingerprint="",
        source="a stand-in tokenizer",
        encode_ordinary=lambda texts: [[_SPECIAL_TOKENS + byte for byte in text.encode()] for text in texts],
        encode_template=lambda text, is_start: [_SPECIAL_TOKENS + byte for byte in text.encode()],
    )


def _rl_programs(
    experiment: Experiment, policy: Transformer, params: Any, tokenizer: Tokenizer, mesh: Mesh, decoding: Decoding
) -> list[Program]:
    """Return the programs of a step of task "rpt" or "rft", in the order and with the array lifetimes of `train.train`."""
    training = experiment.training
    objective = experiment.objective

    # Abstract arrays of the run.
    optimizer = make_optimizer(experiment.optimizer, training.total_steps * training.minibatches_per_step)
    frozen, trained = split_adapters(params)
    average = trained if REWARDS[objective.reward].requirements.average else None
    state = TrainState(params=trained, optimizer=abstract_optimizer(optimizer, trained, mesh), average=average)
    reshard = make_reshard_fn(policy, mesh, lambda p: in_compute_dtype(policy, p))
    rollout_params = _resharded_params(policy, params, mesh, reshard) if reshard else params
    # Parameters that nothing changes are not copied.
    changed = [
        (old, new)
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(rollout_params), strict=True)
        if old != new
    ]
    scored = state.with_frozen(frozen)
    sampled = _abstract_rollouts(experiment, mesh)
    vocab: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokenizer.byte_vocab)
    segments = find_segments(experiment, tokenizer)
    builder = PromptBuilder(experiment.prompt, tokenizer, experiment.prompt_slot, segments)

    def lower_sample() -> jax.stages.Lowered:
        prompts = find_shared_prefixes(_one_token_prompts(sampled.prompts), max_tail_tokens(experiment, builder))
        prompts = abstract_prompts(prompts, mesh, DECODING)
        box_vocab = vocab if experiment.rollout.stop_at_box else None
        return sample_rollouts.lower(policy, rollout_params, prompts, _key(), decoding, box_vocab)

    def lower_reward() -> jax.stages.Lowered:
        rollouts = sampled.rollouts
        prompts = sampled.prompts
        ended = rollouts.ended_PxG
        return prefix_match_reward.lower(
            rollouts.tokens_PxGxT,
            rollouts.lengths_PxG,
            jax.ShapeDtypeStruct(ended.shape, bool, sharding=ended.sharding),
            prompts.reference_PxR,
            prompts.boundaries_PxRp1,
            vocab.bytes_VxX,
            vocab.lengths_V,
            tokenizer.end_think_id,
            reading=experiment.prompt.box_reading,
        )

    def lower_training_reward() -> jax.stages.Lowered:
        layout = reward_layout(experiment, tokenizer, mesh, builder)
        return training_reward.lower(policy, objective, layout, scored.params, scored.average, sampled, vocab, _ids())

    def lower_update() -> jax.stages.Lowered:
        reference = params if objective.kl != "none" else None
        limits = update_limits(experiment, num_batch_shards(mesh))
        batch = _update_batch(experiment, sampled)
        return update_policy.lower(policy, optimizer, objective, limits, state, batch, reference, frozen)

    # The state and the reference parameters live through the whole step. A program's resident bytes are those of all live
    # arrays less those of its arguments.
    run_bytes = bytes_per_device((state, params))
    resharded_bytes = bytes_per_device([new for _, new in changed])
    programs = []
    if reshard:
        resident = run_bytes - bytes_per_device([old for old, _ in changed])
        programs.append(Program(name=ProgramName.RESHARD, lower=lambda: reshard.lower(params), resident_bytes=resident))
    resident = run_bytes + resharded_bytes - bytes_per_device(rollout_params)
    programs.append(Program(name=ProgramName.SAMPLE, lower=lower_sample, resident_bytes=resident))
    if not experiment.asks_questions:  # Verifiers run on the host.
        resident = run_bytes + resharded_bytes
        programs.append(Program(name=ProgramName.REWARD, lower=lower_reward, resident_bytes=resident))
    if not is_prefix_match(objective):
        resident = run_bytes + resharded_bytes - bytes_per_device((scored.params, scored.average))
        programs.append(Program(name=ProgramName.TRAINING_REWARD, lower=lower_training_reward, resident_bytes=resident))
    # The frozen parameters may be arguments twice, as the policy's and as the reference's, although they exist once.
    reference_bytes = bytes_per_device(params) if objective.kl != "none" else 0
    resident = run_bytes - bytes_per_device((state, frozen)) - reference_bytes + bytes_per_device(sampled)
    programs.append(Program(name=ProgramName.UPDATE, lower=lower_update, resident_bytes=resident))
    return programs


def _score_program(experiment: Experiment, policy: Transformer, params: Any, mesh: Mesh) -> Program:
    """Return the program that scores a batch of windows of full length."""
    windows = experiment.data.score_batch_windows
    size = experiment.data.max_document_tokens

    def lower() -> jax.stages.Lowered:
        tokens = _ids(windows, size)
        inputs_NxS, targets_NxS, lengths_N = abstract_prompts((tokens, tokens, _ids(windows)), mesh)
        return score_batch.lower(
            policy,
            params,
            inputs_NxS=inputs_NxS,
            targets_NxS=targets_NxS,
            lengths_N=lengths_N,
            top_k=experiment.data.entropy_top_k,
            logit_chunk_tokens=experiment.training.logit_chunk_tokens,
        )

    return Program(name=ProgramName.SCORE, lower=lower, resident_bytes=0)


def _resharded_params(policy: Transformer, params: Any, mesh: Mesh, reshard: Any) -> Any:
    """Return the abstract parameters in the sharding and dtype of decoding."""
    shardings = parameter_shardings(policy, mesh, DECODING)
    shapes = jax.eval_shape(reshard, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def _abstract_rollouts(experiment: Experiment, mesh: Mesh) -> RewardedRollouts:
    """Return the abstract prompts, rollouts and rewards of a step, sharded over the mesh."""
    p = experiment.training.prompts_per_step
    g = experiment.rollout.samples_per_prompt
    t = experiment.rollout.max_new_tokens
    r = experiment.prompt.reference_bytes
    prompts = PromptBatch(
        tokens_PxS=_ids(p, experiment.prompt.max_tokens),
        lengths_P=_ids(p),
        ids_P=_ids(p),
        reference_PxR=_abstract((p, r), jnp.uint8),
        boundaries_PxRp1=_abstract((p, r + 1), bool),
        reference_ids_PxR=_ids(p, r),
        window_P=_ids(p),
        position_P=_ids(p),
        entropy_P=_floats(p),
    )
    rollouts = Rollouts(
        tokens_PxGxT=_ids(p, g, t),
        lengths_PxG=_ids(p, g),
        logprobs_PxGxT=_floats(p, g, t),
        ended_PxG=_ids(p, g),
    )
    prompts, rollouts, reward, status = abstract_prompts((prompts, rollouts, _floats(p, g), _ids(p, g)), mesh)
    return RewardedRollouts(prompts=prompts, rollouts=rollouts, reward_PxG=reward, status_PxG=status)


def _update_batch(experiment: Experiment, sampled: Any) -> UpdateBatch:
    """Return the abstract batch of an update on abstract rollouts."""
    prompts = sampled.prompts
    rollouts = sampled.rollouts
    documents = None
    if experiment.objective.document_weight:
        ids = _ids(*prompts.lengths_P.shape, experiment.data.max_document_tokens)
        batch = NextTokenBatch(inputs_NxS=ids, targets_NxS=ids, mask_NxS=_as_bool(ids))
        documents = abstract_prompts(batch, prompts.lengths_P.sharding.mesh)
    return UpdateBatch(
        prompts_PxS=prompts.tokens_PxS,
        lengths_P=prompts.lengths_P,
        window_P=prompts.window_P,
        tokens_PxGxT=rollouts.tokens_PxGxT,
        mask_PxGxT=_as_bool(rollouts.tokens_PxGxT),
        sampler_logprobs_PxGxT=rollouts.logprobs_PxGxT,
        advantages_PxG=sampled.reward_PxG,
        counted_P=_as_bool(prompts.lengths_P),
        documents=documents,
    )


def _one_token_prompts(prompts: PromptBatch) -> PromptBatch:
    """Return host arrays of one-token prompts: prefix sharing reads concrete values, of which only the shapes matter here."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), prompts)
    return zeros._replace(lengths_P=np.ones_like(zeros.lengths_P))


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


# Any, because abstract arrays stand in for arrays of the host or of devices.
def _ids(*dims: int) -> Any:
    return _abstract(dims, jnp.int32)


def _floats(*dims: int) -> Any:
    return _abstract(dims, jnp.float32)


def _as_bool(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, bool, sharding=x.sharding)


def _abstract(dims: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)
