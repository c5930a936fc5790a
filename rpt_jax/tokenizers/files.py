"""The files of a tokenizer, from a directory or from the header of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.weights.gguf_header import header_value, is_gguf

# Files of a tokenizer in a Hugging Face directory. generation_config.json contains the stop ids if there are several.
_FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
# Token types in GGUF files.
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5

# Parts of the regular expressions with which tokenizers split a text, and pre-tokenizers in the form of tokenizer.json.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _split_pre_tokenizer(digits: str) -> list[dict[str, Any]]:
    """Return a pre-tokenizer that splits off words, numbers (runs that match `digits`), punctuation and space."""
    pattern = {"Regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _BYTE_LEVEL]


# `tokenizer.ggml.pre` in a GGUF file -> pre-tokenizer of the tokenizer.json of these models.
_PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    "gpt-2": [_BYTE_LEVEL | {"use_regex": True}],
    "qwen2": _split_pre_tokenizer(r"\p{N}"),
    "deepseek-r1-qwen": _split_pre_tokenizer(r"\p{N}"),
    "llama-bpe": _split_pre_tokenizer(r"\p{N}{1,3}"),
}


def read_tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files by name.

    Args:
      source: a directory, any file in it, or a GGUF file, whose header is converted to the files of Hugging Face.

    Raises: UserError if the tokenizer of a GGUF file is not a byte-level BPE, or has an unknown pre-tokenizer.
    """
    source = Path(source)
    if is_gguf(source):
        return _files_of_gguf(source)
    directory = source if source.is_dir() else source.parent
    return {name: (directory / name).read_bytes() for name in _FILE_NAMES if (directory / name).is_file()}


def _files_of_gguf(path: Path) -> dict[str, bytes]:
    def value(key: str, default: Any = None) -> Any:
        return header_value(path, f"tokenizer.ggml.{key}", default)

    if (kind := value("model")) != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model='{kind}' is not supported; expected 'gpt2' (byte-level BPE).",
            field=str(path),
        )
    if (pre_tokenizer := value("pre", "")) not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre='{pre_tokenizer}' is not one of: {', '.join(_PRE_TOKENIZERS)}.",
            field=str(path),
        )
    names = value("tokens")
    ids = {kind: value(f"{kind}_token_id", -1) for kind in ("bos", "eos", "padding", "eot")}

    # tokenizer_config.json: names of the special tokens, and the chat template.
    named = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
    config: dict[str, Any] = {token: names[i] for token, i in named.items() if i >= 0}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if template := header_value(path, "tokenizer.chat_template", ""):
        config["chat_template"] = template

    # generation_config.json: ids of the special tokens, with several that end a response.
    stop_ids = [i for i in dict.fromkeys((ids["eos"], ids["eot"])) if i >= 0]
    generation: dict[str, Any] = {"eos_token_id": stop_ids}
    generation |= {f"{kind}_token_id": i for kind, i in (("bos", ids["bos"]), ("pad", ids["padding"])) if i >= 0}

    contents = {
        "tokenizer.json": _tokenizer_json(names, value("token_type"), value("merges"), pre_tokenizer),
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def _tokenizer_json(names: list[str], types: list[int], merges: list[str], pre_tokenizer: str) -> dict[str, Any]:
    """Return the content of an equivalent tokenizer.json."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **plain, "special": token_type == _CONTROL}
            for i, (name, token_type) in enumerate(zip(names, types, strict=True))
            if token_type in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre_tokenizer]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Some tokens of Llama 3 cannot be produced by its merges.
            "ignore_merges": pre_tokenizer == "llama-bpe",
            # Unused tokens only pad the vocabulary to the size of the embedding.
            "vocab": {
                name: i for i, (name, token_type) in enumerate(zip(names, types, strict=True)) if token_type != _UNUSED
            },
            "merges": merges,
        },
    }
