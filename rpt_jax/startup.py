"""The start of a run: checks that cost little, before anything is scored or compiled, and the lines that say what will run."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from rpt_jax import __version__
from rpt_jax.config import Experiment
from rpt_jax.config.derived import cold_start_experiment
from rpt_jax.config.task_fields import unread_changes
from rpt_jax.corpus.prepared import open_prepared
from rpt_jax.describe import derive
from rpt_jax.errors import UserError, check_all
from rpt_jax.infra.devices import describe_devices, unused_accelerator
from rpt_jax.infra.disk import check_free_space, check_writable
from rpt_jax.infra.gpu_settings import describe_gpu_settings
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.source_commit import source_commit
from rpt_jax.infra.storage import RemoteCopy, checkpoint_directory, is_remote, with_urls
from rpt_jax.infra.trackers import check_installed
from rpt_jax.infra.workdir import COLD_START
from rpt_jax.model.context_length import context_warnings
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.pretrain import check_vocab_size
from rpt_jax.prompts.builder import PromptBuilder, read_template
from rpt_jax.prompts.targets import find_segments
from rpt_jax.prompts.traces import check_traces
from rpt_jax.registry import REWARDS
from rpt_jax.rewards.rewarder import check_end_of_thinking
from rpt_jax.rollout.memory import device_memory
from rpt_jax.setup import (
    check_split,
    check_top_k,
    dtype_of,
    head_precision_of,
    read_architecture,
    starts_with_pretraining,
)
from rpt_jax.sizes.memory import trained_parameters
from rpt_jax.sizes.policy import model_config_of
from rpt_jax.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_FLOAT32_BYTES = 4


def check_start(experiment: Experiment, workdir: Path, mesh: Mesh) -> None:
    """Check everything about a run that takes neither a forward pass nor a compilation, before its workdir is touched.

    These are the batch sizes, the policy's files and tokenizer, the prompt template, the prepared corpus, the disk and the
    packages of trackers. `setup.make_run_mesh` has checked that the files exist, and `sizes.plan.plan_run` checks the memory.

    Args:
      experiment: a validated config.
      workdir: directory of the run.
      mesh: the device mesh.

    Raises: UserError, which lists everything that is wrong.
    """
    if experiment.policy.path:
        model, tokenizer = read_architecture(experiment.policy)
        check_tokenizer = functools.partial(_check_tokenizer, experiment, tokenizer)
    else:
        # The tokenizer is trained in the run.
        model = model_config_of(experiment)[0]
        check_tokenizer = functools.partial(read_template, experiment.prompt.template)
    check_all(
        functools.partial(_check_sizes, experiment, model, mesh),
        check_tokenizer,
        functools.partial(_check_disk, experiment, model, workdir),
        functools.partial(_check_processes, experiment, workdir),
        functools.partial(check_installed, experiment.logging),
    )


def _check_sizes(experiment: Experiment, model: ModelConfig, mesh: Mesh) -> None:
    """Check that batches split evenly over the mesh, and sizes that the vocabulary limits. Raises: UserError."""
    check_split(experiment, mesh)
    if experiment.scores_corpus:
        check_top_k(experiment.data.entropy_top_k, model)
    if starts_with_pretraining(experiment):
        check_vocab_size(experiment)


def _check_tokenizer(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Check what depends on the tokenizer: prompts, the reward, sampled traces and a prepared corpus. Raises: UserError."""
    if experiment.task != "score":
        PromptBuilder(experiment.prompt, tokenizer, experiment.prompt_slot, find_segments(experiment, tokenizer))
        if experiment.reinforces:
            check_end_of_thinking(experiment.objective, tokenizer)
    if starts_with_pretraining(experiment):
        check_traces(experiment.pretrain, tokenizer)
    if experiment.data.prepared and (experiment.scores_corpus or experiment.task == "pretrain"):
        open_prepared(experiment.data, tokenizer, Path(experiment.data.prepared))


def _check_disk(experiment: Experiment, model: ModelConfig, workdir: Path) -> None:
    """Check that the policy can be written, and that the disk has room for it and the checkpoints. Raises: UserError."""
    if experiment.task in ("score", "difficulty", "traces"):
        return
    is_exported = experiment.task == "pretrain" and bool(experiment.pretrain.export)
    target = Path(experiment.pretrain.export) if is_exported else workdir / POLICY
    field = "pretrain.export" if is_exported else "--workdir"
    start = experiment.policy.path
    if start and with_urls(str(Path(start).resolve())) == with_urls(str(target.resolve())):
        raise UserError(
            f"policy.path={with_urls(start)} is where the run would write its own policy: choose another {field}.",
            field=field,
        )
    if is_exported:
        check_writable(target, field)
    needed = _missing_bytes(experiment, model, workdir)
    if experiment.task == "rpt" and experiment.cold_start.total_steps:
        # The checkpoints of the cold start are deleted before those of the run are written.
        cold_start = _missing_bytes(cold_start_experiment(experiment), model, workdir / COLD_START)
        policy = _FLOAT32_BYTES * model.parameters
        needed = max(cold_start, needed + policy)
    check_free_space(workdir, needed, "checkpoints and the policy", "lower checkpoint.keep")


def _check_processes(experiment: Experiment, workdir: Path) -> None:
    """Check that all processes can write to the checkpoints. Raises: UserError."""
    copy = RemoteCopy.of(workdir)
    if experiment.trains and copy and jax.process_count() > 1 and not is_remote(checkpoint_directory(workdir)):
        raise UserError(
            f"--workdir={copy.url}: the checkpoints of a run with several processes can be written to gs:// or to a directory "
            "that all of them share, and to no other object storage.",
            field="--workdir",
        )


def _missing_bytes(experiment: Experiment, model: ModelConfig, workdir: Path) -> int:
    """Return the bytes that a run will add to `workdir`, at most: checkpoints and the policy. Compression is not counted on."""
    if is_remote(checkpoint_directory(workdir)):
        return _FLOAT32_BYTES * model.parameters
    # Parameters, two moments and, for some rewards, the moving average.
    has_average = experiment.reinforces and REWARDS[experiment.objective.reward].requirements.average
    checkpoint = (4 if has_average else 3) * _FLOAT32_BYTES * trained_parameters(experiment, model)
    # A new checkpoint is complete before the oldest one is deleted.
    saves = -(-experiment.training.total_steps // experiment.checkpoint.every_steps)
    present = sum(path.name.isdecimal() for path in checkpoint_directory(workdir).glob("*"))
    missing = max(0, min(experiment.checkpoint.keep + 1, saves) - present)
    return missing * checkpoint + _FLOAT32_BYTES * model.parameters


def log_start(experiment: Experiment, workdir: Path) -> None:
    """Log what runs, on which devices, and where the results go; warn of an accelerator that is unused and of long sequences."""
    sizes = derive(experiment, jax.device_count(), device_memory())
    logger.info("Code: rpt_jax %s, commit %s", __version__, source_commit() or "unknown")
    logger.info("Devices: %s", describe_devices())
    if jax.default_backend() == "gpu":
        level = f"JAX_OPTIMIZATION_LEVEL={jax.config.values['jax_optimization_level']}"
        logger.info("Settings: %s %s", describe_gpu_settings(os.environ), level)
    policy = sizes.policy
    precision = f"{dtype_of(experiment.policy)}, head in {head_precision_of(experiment.policy)}"
    logger.info("Policy: %s parameters, %s, %s", f"{policy.parameters:,}", precision, policy.source)
    if policy.trained_parameters != policy.parameters:
        logger.info("Trained: %s parameters of adapters (policy.lora)", f"{policy.trained_parameters:,}")
    if sizes.rpt:
        batch = sizes.rpt.batch
        tokens = sizes.rpt.tokens
        logger.info(
            "Step: %s prompts x %s responses, at most %s tokens of prompts and %s of responses",
            f"{batch.prompts_per_step:,}",
            experiment.rollout.samples_per_prompt,
            f"{tokens.prompt_tokens_per_step:,}",
            f"{tokens.response_tokens_per_step:,}",
        )
    pretraining = sizes.pretrain or sizes.cold_start
    if pretraining:
        logger.info(
            "Step of %s: %s windows of documents, at most %s tokens with their traces",
            "the cold start" if sizes.cold_start else "pre-training",
            f"{pretraining.windows_per_step:,}",
            f"{pretraining.tokens_per_step:,}",
        )
    if unread := unread_changes(experiment):
        logger.info("Without effect in this run: %s", ", ".join(unread))
    logger.info("Results: %s", workdir)
    for warning in (unused_accelerator(), *context_warnings(experiment, model_config_of(experiment)[0])):
        if warning:
            logger.warning(warning)
