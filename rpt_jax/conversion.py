"""Conversion of policies from and to Hugging Face format; `rpt_jax.convert` is the command."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.config import Experiment, LoraConfig, PolicyConfig
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import open_parameters
from rpt_jax.infra.run_format import POLICY
from rpt_jax.infra.storage import LARGE_FOLDERS, fetch, with_urls
from rpt_jax.infra.workdir import CHECKPOINTS, COLD_START, RUN_CONFIG, is_run_directory, read_run_config
from rpt_jax.model.lora import Lora, lora_of
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.tokenizers.export import exported_files
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.adapters import GetAdapter, merged_tensors, write_adapters
from rpt_jax.weights.hf import load_model_config, open_weights, params_as_tensors, write_policy
from rpt_jax.weights.hf_config import FINGERPRINT_KEY, read_json_object, to_hf_config
from rpt_jax.weights.model_files import MODEL_CONFIG_FILE, find_gguf, missing_hint
from rpt_jax.weights.safetensors_io import Tensors


class Adapters(NamedTuple):
    """Adapters of a checkpoint.

    Attributes:
      base: path of the policy that they belong to.
      config: its architecture.
      lora: the adapters.
      get: returns their parameters.
    """

    base: Path
    config: ModelConfig
    lora: Lora
    get: GetAdapter


class SourcePolicy(NamedTuple):
    """A policy to convert.

    Attributes:
      description: what the source is, for the final message.
      is_import: True to write an rpt_jax policy, False to write a Hugging Face directory.
      hf_config: content of config.json.
      tensors: weights with Hugging Face's names, loaded on demand.
      tokenizer_files: content by file name.
      tokenizer: the tokenizer of these files.
      adapters: those of a checkpoint, which `tensors` has merged; None for none.
    """

    description: str
    is_import: bool
    hf_config: dict[str, Any]
    tensors: Tensors
    tokenizer_files: dict[str, bytes]
    tokenizer: Tokenizer
    adapters: Adapters | None = None


def fetch_source(location: str) -> Path:
    """Return a local path of what is converted; a checkpoint is in a copy of its run. Raises: UserError."""
    run, slash, step = location.rstrip("/").rpartition(f"/{CHECKPOINTS}/")
    if slash and step.isdecimal():
        return fetch(run, "--from") / CHECKPOINTS / step
    return fetch(location, "--from")


def open_source(source: Path) -> SourcePolicy:
    """Detect what `source` is and open it. Raises: UserError if it cannot be converted."""
    if find_gguf(source):
        config, _ = load_model_config(source)
        hf_config = to_hf_config(config) | {"torch_dtype": "float32"}
        return _open_policy(source, config, hf_config, description="a GGUF file", is_import=True)
    if source.parent.name == CHECKPOINTS and source.name.isdecimal():
        return _open_checkpoint(source.parents[1], int(source.name))
    if is_run_directory(source):
        final_policy = source / "policy"
        has_final_policy = (final_policy / MODEL_CONFIG_FILE).is_file()
        return open_source(final_policy) if has_final_policy else _open_checkpoint(source, None)
    try:
        hf_config = read_json_object(source / MODEL_CONFIG_FILE)
    except OSError:
        raise UserError(
            f"--from={source} is neither a .gguf file nor a directory with a {MODEL_CONFIG_FILE}. Expected a Hugging Face "
            "directory, a .gguf file, an rpt_jax policy, the --workdir of a run or one of its checkpoints."
            + missing_hint(source),
            field="--from",
        ) from None
    config, _ = load_model_config(source)
    is_import = FINGERPRINT_KEY not in hf_config
    description = "a Hugging Face directory" if is_import else "an rpt_jax policy"
    return _open_policy(source, config, hf_config, description=description, is_import=is_import)


def _open_policy(
    source: Path, config: ModelConfig, hf_config: dict[str, Any], *, description: str, is_import: bool
) -> SourcePolicy:
    """Open weights and tokenizer. Raises: UserError if they do not belong together."""
    tokenizer = load_tokenizer(source)
    fingerprint = hf_config.get(FINGERPRINT_KEY, tokenizer.fingerprint)
    if tokenizer.vocab_size > config.vocab or fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{tokenizer.source} is not the tokenizer of the policy in '{source}': it has {tokenizer.vocab_size} tokens and "
            f"SHA-256 {tokenizer.fingerprint[:12]}…; {MODEL_CONFIG_FILE} has {config.vocab} and {fingerprint[:12]}….",
            field=tokenizer.source,
        )
    return SourcePolicy(
        description=description,
        is_import=is_import,
        hf_config=hf_config,
        tensors=open_weights(source, config),
        tokenizer_files=exported_files(tokenizer),
        tokenizer=tokenizer,
    )


def _open_checkpoint(workdir: Path, step: int | None) -> SourcePolicy:
    """Open the parameters of a checkpoint; architecture and tokenizer are those in the config of the run.

    Args:
      workdir: of the run.
      step: of the checkpoint; None for the latest.

    Raises: UserError if `workdir` is not that of a run, or has no such checkpoint.
    """
    try:
        run_config = read_run_config(workdir)
    except OSError:
        raise UserError(
            f"{workdir} has no {RUN_CONFIG}, so it is not the --workdir of a run.", field="--from"
        ) from None
    has_cold_start = run_config["task"] == "rpt" and run_config["cold_start.total_steps"]
    initial_policy = str(run_config.get("policy.path", ""))
    if initial_policy:
        initial_policy = str(fetch(initial_policy, "policy.path", skip=LARGE_FOLDERS))
        # A relative path refers to the directory in which the run was started.
        tokenizer_source = Path(initial_policy)
        config, _ = load_model_config(tokenizer_source)
    else:
        tokenizer_source = workdir / COLD_START if has_cold_start else workdir
        config = preset(str(run_config.get("policy.preset")))
    tokenizer = load_tokenizer(tokenizer_source)
    step, get_param = open_parameters(workdir, step)
    adapters = None
    if lora := _lora_of_run(run_config):
        base = workdir / COLD_START / POLICY if has_cold_start else Path(initial_policy)
        adapters = Adapters(base=base, config=config, lora=lora, get=lambda name: get_param(("layers", name)))
        tensors = merged_tensors(open_weights(base, config), config, lora, adapters.get)
    else:
        tensors = params_as_tensors(config, get_param)
    return SourcePolicy(
        description=f"checkpoint {step} of a run",
        is_import=False,
        hf_config=to_hf_config(config) | {"torch_dtype": "float32"},
        tensors=tensors,
        tokenizer_files=exported_files(tokenizer),
        tokenizer=tokenizer,
        adapters=adapters,
    )


def _lora_of_run(run_config: dict[str, Any]) -> Lora | None:
    """Return the adapters that a run trains; its config may be older than section `policy.lora`."""
    prefix = "policy.lora."
    fields = {name.removeprefix(prefix): value for name, value in run_config.items() if name.startswith(prefix)}
    return lora_of(Experiment(task=run_config["task"], policy=PolicyConfig(lora=LoraConfig(**fields))))


def convert(source: Path, target: Path, *, adapters: bool = False) -> str:
    """Convert a policy.

    Args:
      source: a Hugging Face directory, a .gguf file, an rpt_jax policy, the workdir of a run or one of its checkpoints.
      target: directory to create; after an error, it does not exist.
      adapters: write the adapters of a checkpoint in PEFT's format, and not the weights that they are merged into.

    Returns: a message that says what was done, with notes about the tokenizer.

    Raises: UserError if the target exists or the source cannot be converted.
    """
    if target.exists():
        raise UserError(f"--to={target} already exists. Give a new directory.", field="--to")
    if adapters:
        return _convert_adapters(source, target)
    policy = open_source(source)
    hf_config = {name: value for name, value in policy.hf_config.items() if name != FINGERPRINT_KEY}
    if policy.is_import:
        hf_config[FINGERPRINT_KEY] = policy.tokenizer.fingerprint

    with _created(target) as directory:
        write_policy(directory, hf_config, policy.tensors, policy.tokenizer_files)
    result = "an rpt_jax policy" if policy.is_import else "a Hugging Face directory"
    message = f"Converted {source} ({policy.description}) to {target} ({result})."
    return " ".join([message, *_tokenizer_notes(policy)])


def _convert_adapters(source: Path, target: Path) -> str:
    """Write the adapters of a checkpoint, or of the latest one of a run, and return a message. Raises: UserError."""
    is_checkpoint = source.parent.name == CHECKPOINTS and source.name.isdecimal()
    workdir, step = (source.parents[1], int(source.name)) if is_checkpoint else (source, None)
    policy = _open_checkpoint(workdir, step)
    adapters = policy.adapters
    if adapters is None:
        raise UserError(
            f"--from={source} has no adapters: the run trained all parameters (policy.lora.rank=0). Leave --adapters out.",
            field="--adapters",
        )
    with _created(target) as directory:
        write_adapters(directory, with_urls(str(adapters.base.resolve())), adapters.config, adapters.lora, adapters.get)
    return f"Converted {source} ({policy.description}) to {target} (PEFT adapters of {adapters.base.resolve()})."


@contextlib.contextmanager
def _created(target: Path) -> Iterator[Path]:
    """Yield a temporary directory next to the target, which becomes the target: it never exists incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp creates directories that only their owner can read.
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _tokenizer_notes(policy: SourcePolicy) -> list[str]:
    """Return notes about the tokenizer: what ends a response, and what rpt_jax treats in its own way."""
    tokenizer = policy.tokenizer
    vocab_size = policy.hf_config["vocab_size"]
    notes = [tokenizer.describe_stop_ids()]
    if tokenizer.normalizer:
        notes.append(
            f"The tokenizer normalizes texts ({tokenizer.normalizer}); rpt_jax does not, and uses the exact bytes of a document."
        )
    if absent := len(tokenizer.absent_ids(vocab_size)):
        notes.append(f"{absent} of its {vocab_size} ids have no token; rpt_jax never samples them.")
    return notes
