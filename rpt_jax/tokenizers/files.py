"""The files that make up a tokenizer, from a directory or out of the header of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.weights.gguf_header import header_value, is_gguf

# Those that Hugging Face keeps beside the weights. generation_config.json is where several stop ids are.
_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # Kinds of tokens in a GGUF file.

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _BYTE_LEVEL]


# How a text is split before merging, by the name that a GGUF file has for it. Taken from the tokenizer.json of the models.
_PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    "gpt-2": [_BYTE_LEVEL | {"use_regex": True}],
    "qwen2": _split(r"\p{N}"),
    "deepseek-r1-qwen": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}


def read_tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """Return the tokenizer's files by name, as they are.

    Args:
      source: a directory, any file in it, or a GGUF file, whose header is written as such files.

    Raises: UserError, where a GGUF file has a tokenizer that is no byte-level BPE or splits texts in an unknown way.
    """
    source = Path(source)
    if is_gguf(source):
        return _from_gguf(source)
    directory = source if source.is_dir() else source.parent
    return {name: (directory / name).read_bytes() for name in _NAMES if (directory / name).is_file()}


def _from_gguf(path: Path) -> dict[str, bytes]:
    def value(key: str, default: Any = None) -> Any:
        return header_value(path, f"tokenizer.ggml.{key}", default)

    if (kind := value("model")) != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model='{kind}' is not supported; what is: 'gpt2', a byte-level BPE.")
    if (split := value("pre", "")) not in _PRE_TOKENIZERS:
        raise UserError(f"{path}: tokenizer.ggml.pre='{split}' is not one of: {', '.join(_PRE_TOKENIZERS)}.")
    names = value("tokens")
    ids = {kind: value(f"{kind}_token_id", -1) for kind in ("bos", "eos", "padding", "eot")}
    named = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
    config: dict[str, Any] = {token: names[i] for token, i in named.items() if i >= 0}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if template := header_value(path, "tokenizer.chat_template", ""):
        config["chat_template"] = template
    stops = [i for i in dict.fromkeys((ids["eos"], ids["eot"])) if i >= 0]
    generation: dict[str, Any] = {"eos_token_id": stops}
    generation |= {f"{kind}_token_id": i for kind, i in (("bos", ids["bos"]), ("pad", ids["padding"])) if i >= 0}
    contents = {
        "tokenizer.json": _tokenizer_json(names, value("token_type"), value("merges"), split),
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def _tokenizer_json(names: list[str], kinds: list[int], merges: list[str], split: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **plain, "special": kind == _CONTROL}
            for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[split]},
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
            # Llama 3's merges do not reach all of its tokens.
            "ignore_merges": split == "llama-bpe",
            # Unused names only fill the vocabulary up to the size of the embedding.
            "vocab": {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind != _UNUSED},
            "merges": merges,
        },
    }
