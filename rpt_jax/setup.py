"""Setup of a run: load device mesh, policy, tokenizer and corpus, and check that they match."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from rpt_jax.config import Experiment, MeshConfig, PolicyConfig
from rpt_jax.corpus.entropy import Scorer
from rpt_jax.corpus.prepared import (
    PreparedCorpus,
    check_prepared,
    corpus_directory,
    open_prepared,
    plot_entropies,
    prepare,
)
from rpt_jax.corpus.sources import check_source
from rpt_jax.corpus.tokenization import plan_shards
from rpt_jax.corpus.tokenized import Windows
from rpt_jax.distributed.mesh import DECODING, TRAINING, check_batches, make_mesh, mesh_fields, num_batch_shards
from rpt_jax.distributed.sharding import abstract_parameters, init_parameters
from rpt_jax.errors import UserError, check_all
from rpt_jax.infra.chips import chip_of
from rpt_jax.infra.plots import PLOTS
from rpt_jax.infra.run_context import RunContext
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.storage import with_urls
from rpt_jax.infra.workdir import is_run_directory
from rpt_jax.model.attention.dispatch import choose_attention
from rpt_jax.model.attention.platform import target_device_kind, target_platform
from rpt_jax.model.lora import Lora, join_adapters, lora_of, split_adapters
from rpt_jax.model.model_config import ModelConfig, check_preset
from rpt_jax.model.precision import choose_dtype, choose_head_precision
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.prompts.targets import Segments, find_segments
from rpt_jax.questions.loading import check_question_source
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.hf import check_files, load_model_config, load_policy

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a run of task "rpt" starts from.

    Attributes:
      policy: the model.
      params: its starting parameters, sharded for training.
      mesh: the devices.
      tokenizer: the policy's tokenizer.
      train, held_out, unseen: windows of token ids of each split; a long document has several windows.
      prepared: the corpus that the windows are read from, with the proxy's entropies.
      boxable_V: bool, the tokens that a box can hold; positions before other tokens are left out.
      segments: finds the segments of a window, if they are the targets (`data.targets`).
    """

    policy: Transformer
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer
    train: Windows
    held_out: Windows
    unseen: Windows
    prepared: PreparedCorpus
    boxable_V: np.ndarray
    segments: Segments | None


def mesh_from_config(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a config.

    Args:
      config: sizes of the mesh axes.
      devices: JAX devices, or descriptions of them; None = all devices of the run.

    Raises: UserError, if the mesh does not fit the devices.
    """
    return make_mesh(config.data, config.fsdp, config.tensor, devices, config.rollout_tensor)


def make_run_mesh(experiment: Experiment) -> Mesh:
    """Check that the devices, the policy and the data of a run are available, and return its mesh.

    Raises: UserError, which lists everything that is missing.
    """
    policy = experiment.policy
    make = functools.partial(mesh_from_config, experiment.mesh)

    def check_attention() -> None:
        chosen = attention_of(policy)
        kernels = choose_attention(policy.attention, target_platform())
        if chosen != kernels:
            logger.warning(
                "policy.attention='auto' is '%s' on %s, on which '%s' was never tried. Set policy.attention='%s' to try it.",
                chosen,
                target_device_kind(),
                kernels,
                kernels,
            )

    def check_policy() -> None:
        check_random_weights(experiment)
        if policy.path:
            check_files(policy.path)

    check_all(make, check_attention, check_policy, functools.partial(check_data, experiment))
    return make()


def check_data(experiment: Experiment) -> None:
    """Check that the corpus or the questions of a run are available, without reading them. Raises: UserError."""
    if experiment.asks_questions:
        check_question_source(experiment.questions)
    elif experiment.data.prepared:
        check_prepared(Path(experiment.data.prepared))
    else:
        check_source(experiment.data)


def check_random_weights(experiment: Experiment) -> None:
    """Raise UserError if a run would begin with random weights and not pre-train them."""
    if not experiment.policy.path and not starts_with_pretraining(experiment):
        raise UserError(
            "policy.path is empty, but random weights can only be pre-trained: give the directory of a policy, set "
            "cold_start.total_steps, or choose task 'pretrain'.",
            field="policy.path",
        )


def starts_with_pretraining(experiment: Experiment) -> bool:
    """Return whether the first steps of a run are next-token pre-training: task "pretrain", or a cold start."""
    return experiment.task == "pretrain" or (experiment.task == "rpt" and experiment.cold_start.total_steps > 0)


def check_top_k(top_k: int, model: ModelConfig) -> None:
    """Raise UserError if `data.entropy_top_k` exceeds the policy's vocabulary."""
    if top_k > model.vocab:
        raise UserError(
            f"data.entropy_top_k={top_k} must be at most the policy's vocabulary size, {model.vocab}.",
            field="data.entropy_top_k",
        )


def check_split(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError if the batches of a run do not split evenly over the mesh."""
    if experiment.scores_corpus:
        check_batches(mesh, {"data.score_batch_windows": experiment.data.score_batch_windows})
    if experiment.samples:
        check_sampling(experiment, mesh)
    if starts_with_pretraining(experiment):
        check_batches(mesh, {"pretrain.windows_per_step": experiment.pretrain.windows_per_step})


def check_sampling(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError if the batches of rollouts, or the rows of the update, do not split evenly over the mesh."""
    training = experiment.training
    tensor = mesh_fields(mesh)["tensor"]
    # One number of shards divides the other: a batch that splits into the larger one splits into both.
    phase = max((TRAINING, DECODING), key=lambda table: num_batch_shards(mesh, table))
    check_batches(mesh, {"training.prompts_per_step": training.prompts_per_step}, phase)
    if experiment.evaluation.prompts_per_batch:
        check_batches(mesh, {"evaluation.prompts_per_batch": experiment.evaluation.prompts_per_batch}, DECODING)
    if experiment.reinforces and experiment.mesh.split_rows and training.microbatch_tokens % tensor:
        raise UserError(
            f"training.microbatch_tokens={training.microbatch_tokens} must be a multiple of mesh.tensor={tensor} with "
            f"mesh.split_rows=True; the next one is {-(-training.microbatch_tokens // tensor) * tensor}.",
            field="training.microbatch_tokens",
        )


def make_policy(
    config: PolicyConfig, model: ModelConfig, tokenizer: Tokenizer | None = None, lora: Lora | None = None
) -> Transformer:
    """Return the transformer of a model config, computed as `config` says.

    Args:
      config: dtype, precision, rematerialization and attention implementation.
      model: layers and sizes.
      tokenizer: if given, ids of the vocabulary that it does not have get probability zero.
      lora: adapters to train in place of the policy's own parameters. `config.lora` is not read: most policies are not trained.

    Raises: UserError, if the attention implementation does not run on this platform.
    """
    absent_ids = tokenizer.absent_ids(model.vocab) if tokenizer else ()
    return Transformer(
        config=model,
        dtype=jnp.dtype(dtype_of(config)),
        remat="none" if config.remat == "auto" else config.remat,  # A run that differentiates has planned it.
        attention=attention_of(config),
        absent_ids=absent_ids,
        precision=config.precision,
        head_precision=head_precision_of(config),
        lora=lora,
    )


def attention_of(config: PolicyConfig) -> str:
    """Return the attention implementation of a policy on the target devices.

    Raises: UserError, if it does not run on this platform.
    """
    is_known_chip = chip_of(target_device_kind()) is not None
    return choose_attention(config.attention, target_platform(), is_known_chip)


def dtype_of(config: PolicyConfig) -> str:
    """Return the dtype of a policy's layers on the target devices: "float32" or "bfloat16"."""
    return choose_dtype(config.dtype, target_platform())


def head_precision_of(config: PolicyConfig) -> str:
    """Return the precision of a policy's head on the target devices."""
    return choose_head_precision(config.head_precision, target_platform())


def read_architecture(config: PolicyConfig, field: str = "policy.path") -> tuple[ModelConfig, Tokenizer]:
    """Read the architecture of the policy of `policy.path` and its tokenizer, without its parameters.

    Args:
      config: section `policy`.
      field: the config field or flag that gives the path, for errors.

    Raises: UserError, if a file is missing or damaged, the architecture is not that of the preset, or the tokenizer is not the
      policy's.
    """
    model, expected_fingerprint = load_model_config(config.path, field)
    check_preset(config.path, config.preset, model)
    tokenizer = load_tokenizer(config.path)
    other_tokenizer = expected_fingerprint and expected_fingerprint != tokenizer.fingerprint
    if other_tokenizer or tokenizer.vocab_size > model.vocab:
        raise UserError(
            f"{tokenizer.source} is not the tokenizer of the policy in {field}='{config.path}': it has "
            f"{tokenizer.vocab_size} tokens and SHA-256 {tokenizer.fingerprint[:12]}…, but the policy was trained with "
            f"{model.vocab} tokens and {(expected_fingerprint or 'unknown')[:12]}…. Put the policy's own tokenizer there.",
            field=field,
        )
    return model, tokenizer


def find_policy(path: str, field: str) -> str:
    """Return the path of a policy; for the directory of a run, that of the policy which the run has trained.

    Args:
      path: a Hugging Face directory, a GGUF file, or the directory of a run.
      field: the config field or flag that gives the path, for errors.

    Raises: UserError, if there is no policy.
    """
    if is_run_directory(Path(path)):
        if not (Path(path) / POLICY).is_dir():
            raise UserError(
                f"{field}='{path}' is a run that has no {POLICY}/ yet: a run writes its policy at its end.", field=field
            )
        path = str(Path(path) / POLICY)
    check_files(path, field)
    return path


def load_starting_policy(
    config: PolicyConfig, mesh: Mesh, field: str = "policy.path", lora: Lora | None = None
) -> tuple[Transformer, Params, Tokenizer]:
    """Load the policy of `policy.path`, with its parameters sharded for training, and its tokenizer.

    Args:
      config: section `policy`.
      mesh: the device mesh.
      field: the config field or flag that gives the path, for errors.
      lora: adapters that the policy is to have; they are not among the returned parameters.

    Raises: UserError, as `read_architecture` does.
    """
    model, tokenizer = read_architecture(config, field)
    policy = make_policy(config, model, tokenizer, lora)
    _, params, _ = load_policy(config.path, abstract_parameters(policy, mesh), field)
    return policy, params, tokenizer


def load_policy_to_train(experiment: Experiment, mesh: Mesh) -> tuple[Transformer, Params, Tokenizer]:
    """Load the starting policy of a run, with the adapters of `policy.lora` among its parameters, and its tokenizer.

    Raises: UserError, as `read_architecture` does.
    """
    lora = lora_of(experiment)
    policy, params, tokenizer = load_starting_policy(experiment.policy, mesh, lora=lora)
    if lora:
        adapters = init_parameters(policy, mesh, experiment.seed, select=lambda params: split_adapters(params)[1])
        params = join_adapters(params, adapters)
    return policy, params, tokenizer


def open_or_prepare_corpus(
    experiment: Experiment,
    policy: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    workdir: Path,
    context: RunContext,
) -> PreparedCorpus:
    """Open the corpus of `data.prepared` or, without one, tokenize and score the corpus in `workdir/corpus`.

    Preparing a corpus takes a forward pass over all its tokens, with `policy` as the proxy. Shards that an earlier, interrupted
    run completed are not prepared again.

    Args:
      experiment: the config.
      policy, params, tokenizer: the proxy.
      mesh: the device mesh.
      workdir: directory of the run.
      context: signals and heartbeats.

    Raises: UserError, as `open_prepared` and `prepare` do.
    """
    data = experiment.data
    if data.prepared:
        return open_prepared(data, tokenizer, Path(data.prepared))
    plan = plan_shards(data)
    directory = corpus_directory(workdir, data, plan, tokenizer, data.entropy_top_k, with_urls(experiment.policy.path))
    scorer = Scorer(policy=policy, params=params, tokenizer=tokenizer, mesh=mesh, config=experiment)
    prepared = prepare(scorer, plan, directory, context)
    assert prepared is not None, "all shards were prepared, so none is missing"
    return prepared


def set_up(experiment: Experiment, mesh: Mesh, workdir: Path, context: RunContext) -> Setup:
    """Load the starting policy, then open its corpus, or tokenize and score it if `data.prepared` is not set.

    Raises: UserError, as `load_policy_to_train` and `open_or_prepare_corpus` do.
    """
    policy, params, tokenizer = load_policy_to_train(experiment, mesh)
    logger.info(tokenizer.describe_stop_ids())
    prepared = open_or_prepare_corpus(experiment, policy, params, tokenizer, mesh, workdir, context)
    plot_entropies(prepared, workdir / PLOTS)
    return Setup(
        policy=policy,
        params=params,
        mesh=mesh,
        tokenizer=tokenizer,
        train=prepared.corpus.windows("train"),
        held_out=prepared.corpus.windows("held_out"),
        unseen=prepared.corpus.windows("unseen"),
        prepared=prepared,
        boxable_V=boxable_tokens(tokenizer.byte_vocab, experiment.prompt),
        segments=find_segments(experiment, tokenizer),
    )
