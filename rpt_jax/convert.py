"""python -m rpt_jax.convert --from=SOURCE --to=DIR

Brings a policy in, or out again. What SOURCE is decides what is written to the new directory DIR:

    a Hugging Face directory, or a .gguf file   our policy: for policy.path, checked, tied to its tokenizer
    our policy                                  a Hugging Face directory
    the --workdir of a run                      a Hugging Face directory: the finished policy, else the newest checkpoint
    one checkpoint, WORKDIR/checkpoints/STEP    a Hugging Face directory

Ours is a Hugging Face directory too, with the fingerprint of its tokenizer in config.json: `transformers` loads both, and
policy.path takes all but runs as they are. Tensors keep their dtype; those of GGUF files and of checkpoints are float32.

Exit codes: 0 converted, 2 something to mend (a sentence says what). Nothing is ever overwritten.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import open_parameters
from rpt_jax.infra.workdir import CHECKPOINTS, RUN_CONFIG, is_run_directory, read_run_config
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.gguf_header import is_gguf
from rpt_jax.weights.hf import load_model_config, open_weights, params_as_tensors, write_policy
from rpt_jax.weights.hf_config import CONFIG, FINGERPRINT, read_config, to_config
from rpt_jax.weights.safetensors_io import Tensors

_FROM = flags.DEFINE_string(
    "from", None, "A Hugging Face directory, a .gguf file, our policy, a run or its checkpoint."
)
_TO = flags.DEFINE_string("to", None, "The directory to make; it must not exist.")


class Policy(NamedTuple):
    """A policy on its way: nothing of `tensors` is in memory."""

    kind: str
    config: dict[str, Any]  # As config.json.
    tensors: Tensors
    files: dict[str, bytes]  # Of the tokenizer.
    tokenizer: Tokenizer


def open_policy(source: Path) -> Policy:
    """Recognize what `source` is and open it. Raises: UserError, where it is nothing that can be converted, or damaged."""
    if is_gguf(source):
        shape, _ = load_model_config(source)
        return _checked("a GGUF file", source, to_config(shape) | {"torch_dtype": "float32"}, shape)
    if source.parent.name == CHECKPOINTS and source.name.isdecimal():
        return _open_checkpoint(source.parents[1], int(source.name))
    if is_run_directory(source):
        finished = source / "policy"
        return open_policy(finished) if (finished / CONFIG).is_file() else _open_checkpoint(source, None)
    try:
        config = read_config(source / CONFIG)
    except OSError:
        raise UserError(
            f"--from={source} is neither a .gguf file nor a directory with a config.json: give a Hugging Face directory, "
            "one of our policies, the --workdir of a run or one of its checkpoints."
        ) from None
    kind = "our policy" if FINGERPRINT in config else "a Hugging Face directory"
    return _checked(kind, source, config, load_model_config(source)[0])


def _checked(kind: str, source: Path, config: dict[str, Any], shape: ModelConfig) -> Policy:
    """Open a policy's weights and its tokenizer, and check that they are each other's."""
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > shape.vocab or config.get(FINGERPRINT, tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{tokenizer.source} is not the tokenizer of the policy in '{source}': it has {tokenizer.vocab_size} tokens and "
            f"SHA-256 {tokenizer.fingerprint[:12]}…, config.json says {shape.vocab} and "
            f"{config.get(FINGERPRINT, 'nothing')[:12]}…."
        )
    return Policy(kind, config, open_weights(source, shape), read_tokenizer_files(source), tokenizer)


def _open_checkpoint(workdir: Path, step: int | None) -> Policy:
    """Open the parameters of a run's checkpoint; shape and tokenizer are those that its config names."""
    try:
        run = read_run_config(workdir)
    except OSError:
        raise UserError(
            f"{workdir} has no {RUN_CONFIG}, so it is not the --workdir of a run.", field="--from"
        ) from None
    start = Path(str(run.get("policy.path", "")))
    if start.name:
        # As the run read it: from the directory that it was started in.
        shape, _ = load_model_config(start)
        tokenizer_of = start
    else:
        shape, tokenizer_of = preset(str(run.get("policy.preset"))), workdir
    tokenizer = load_tokenizer(tokenizer_of)
    step, leaf = open_parameters(workdir, step)
    config = to_config(shape) | {"torch_dtype": "float32"}
    tensors = params_as_tensors(shape, leaf)
    return Policy(f"checkpoint {step} of a run", config, tensors, read_tokenizer_files(tokenizer_of), tokenizer)


def convert(source: Path, target: Path) -> str:
    """Convert `source` to the new directory `target`, which appears whole or not at all; return what was done.

    Raises: UserError.
    """
    if target.exists():
        raise UserError(f"--to={target} exists, and nothing is overwritten: give a new directory.")
    policy = open_policy(source)
    ours = policy.kind in ("a GGUF file", "a Hugging Face directory")
    config = {name: value for name, value in policy.config.items() if name != FINGERPRINT}
    if ours:
        config[FINGERPRINT] = policy.tokenizer.fingerprint
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_policy(partial, config, policy.tensors, policy.files)
        partial.chmod(0o755)  # mkdtemp's are the owner's alone.
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    done = f"{source} is {policy.kind}: it is now {'our policy' if ours else 'a Hugging Face directory'} in {target}."
    return " ".join([done, *_remarks(policy)])


def _remarks(policy: Policy) -> list[str]:
    """What one should know of a tokenizer, in sentences."""
    tokenizer, ids, said = policy.tokenizer, policy.config["vocab_size"], []
    if tokenizer.normalizer:
        said.append(
            f"Its tokenizer normalizes texts ({tokenizer.normalizer}): rpt_jax does not, and tokenizes, predicts and rewards "
            "the very bytes of a document."
        )
    if spare := len(tokenizer.absent_ids(ids)):
        said.append(f"{spare} of its {ids} ids stand for no token; rpt_jax never samples them.")
    return said


def main(argv: list[str]) -> int:
    """Return the exit code."""
    try:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            raise UserError(str(error)) from None
        if len(rest) > 1 or not _FROM.value or not _TO.value:
            raise UserError("give --from=SOURCE and --to=DIR, and nothing else.")
        print(convert(Path(_FROM.value), Path(_TO.value)))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Nothing was left in its place.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv))
