"""What a task starts from: the policy, its tokenizer and the documents, checked against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rpt_jax.config import Experiment, MeshConfig, PolicyConfig
from rpt_jax.corpus.prepared import Prepared, corpus_directory, open_prepared, prepare
from rpt_jax.corpus.sources import SPLITS, check_source
from rpt_jax.distributed.mesh import DECODING, check_batches, make_mesh, mesh_fields
from rpt_jax.distributed.sharding import parameter_shardings
from rpt_jax.errors import UserError, check_all
from rpt_jax.infra.run_context import RunContext
from rpt_jax.model.attention.dispatch import choose_attention
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.model.model_config import ModelConfig, check_preset
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.hf import check_files, load_model_config, load_policy

Windows = Sequence[Sequence[int]]  # Token ids: of each document its one tokenization, in windows of bounded length.


class Setup(NamedTuple):
    policy: Transformer
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer
    train: Windows
    held_out: Windows
    unseen_templates: Windows
    prepared: Prepared  # What the documents were read from, and what the proxy makes of them.


def cold_start_of(experiment: Experiment) -> Experiment:
    """The pre-training that an experiment of task "rpt" begins with, as an experiment of its own."""
    return dataclasses.replace(
        experiment,
        task="pretrain",
        training=dataclasses.replace(experiment.training, total_steps=experiment.cold_start.total_steps),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=experiment.cold_start.learning_rate),
        pretrain=dataclasses.replace(experiment.pretrain, export=""),
    )


def make_policy(config: PolicyConfig, shape: ModelConfig, tokenizer: Tokenizer | None = None) -> Transformer:
    """The decoder of `shape` as the config computes it; ids that `tokenizer` does not have get no probability.

    Raises: UserError, where its attention does not run here.
    """
    attention = choose_attention(config.attention, target_platform(), config.dtype)
    absent_ids = tokenizer.absent_ids(shape.vocab) if tokenizer else ()
    return Transformer(shape, jnp.dtype(config.dtype), config.remat, attention, absent_ids)


def load_start(config: PolicyConfig, mesh: Mesh) -> tuple[Transformer, Params, Tokenizer]:
    """Load the policy of `policy.path` onto the mesh, with its tokenizer.

    Raises: UserError, where a file is missing or damaged, the shape is not the preset's or the tokenizer not the policy's.
    """
    shape, fingerprint = load_model_config(config.path)
    check_preset(config.path, config.preset, shape)
    tokenizer = load_tokenizer(config.path)
    if tokenizer.vocab_size > shape.vocab or (fingerprint and fingerprint != tokenizer.fingerprint):
        raise UserError(
            f"{tokenizer.source} is not the tokenizer of the policy in '{config.path}' ({tokenizer.vocab_size} tokens, "
            f"SHA-256 {tokenizer.fingerprint[:12]}…; the policy was trained with {shape.vocab} and "
            f"{(fingerprint or 'unknown')[:12]}…). Put the policy's own tokenizer there."
        )
    policy = make_policy(config, shape, tokenizer)
    _, params, _ = load_policy(config.path, parameter_shardings(policy, mesh))
    return policy, params, tokenizer


def check_top_k(top_k: int, policy: Transformer) -> None:
    """Raises: UserError, where the policy has fewer tokens."""
    if top_k > policy.config.vocab:
        raise UserError(f"data.entropy_top_k={top_k} must be at most the policy's vocabulary, {policy.config.vocab}.")


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config, of all devices or those given. Raises: UserError, where it does not fit them."""
    return make_mesh(config.data, config.fsdp, config.tensor, devices, config.rollout_tensor)


def check_sampling(experiment: Experiment, mesh: Mesh) -> None:
    """Raises: UserError, where what is sampled, or what is learned from it, does not split evenly over the mesh."""
    t, ways = experiment.training, mesh_fields(mesh)["tensor"]
    check_batches(mesh, {"training.prompts_per_step": t.prompts_per_step})
    check_batches(mesh, {"training.prompts_per_step": t.prompts_per_step}, DECODING)
    if experiment.mesh.split_rows and t.microbatch_tokens % ways:
        raise UserError(
            f"mesh.split_rows: training.microbatch_tokens={t.microbatch_tokens} must be a multiple of mesh.tensor={ways}."
        )


def start_mesh(experiment: Experiment) -> Mesh:
    """Return the mesh of a run, where devices and files for it are here. Raises: UserError, with all that is missing."""
    mesh, policy = experiment.mesh, experiment.policy

    def check_policy() -> None:
        if policy.path:
            check_files(policy.path)
        elif experiment.task != "pretrain":
            raise UserError(
                "policy.path is empty: give the directory of a policy, such as one that task 'pretrain' exports."
            )

    arrange = functools.partial(mesh_of, mesh)
    attention = functools.partial(choose_attention, policy.attention, target_platform(), policy.dtype)

    def check_data() -> None:
        if not experiment.data.prepared:
            check_source(experiment.data)

    check_all(arrange, attention, check_policy, check_data)
    return arrange()


def set_up(experiment: Experiment, mesh: Mesh, workdir: Path, context: RunContext) -> Setup:
    """Load the starting policy and the prepared corpus, or prepare it in `workdir/corpus` with that policy as the proxy.

    Raises: UserError, as `load_start`, `prepare` and `open_prepared` do.
    """
    policy, params, tokenizer = load_start(experiment.policy, mesh)
    data = experiment.data
    check_top_k(data.entropy_top_k, policy)
    if data.prepared:
        prepared = open_prepared(data, tokenizer, Path(data.prepared))
    else:
        whole = dataclasses.replace(experiment, data=dataclasses.replace(data, shard=""))
        directory = corpus_directory(workdir, data, tokenizer, data.entropy_top_k, experiment.policy.path)
        prepared = prepare(whole, policy, params, tokenizer, mesh, directory, context)
    return Setup(policy, params, mesh, tokenizer, *map(prepared.corpus.windows, SPLITS), prepared)
