"""The files of a tokenizer, from a directory or from the header of a GGUF file."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.weights.gguf_header import header_value, open_gguf
from rpt_jax.weights.model_files import GENERATION_CONFIG_FILE, MODEL_CONFIG_FILE, find_gguf, other_tokenizer_hint

logger = logging.getLogger(__name__)

# Files of a tokenizer in a Hugging Face directory, and the two others with ids of special tokens.
_FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG_FILE,
    MODEL_CONFIG_FILE,
)
_MORE_TEMPLATES = "additional_chat_templates"  # Folder of further templates by name.
# A line of a tiktoken vocabulary: a token in base64 and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# Token types in GGUF files.
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_NO_TOKEN = (-1, 2**32 - 1)  # As a signed and an unsigned number.

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
    "llama-bpe": _split_pre_tokenizer(r"\p{N}{1,3}"),
    "smaug-bpe": _split_pre_tokenizer(r"\p{N}{1,3}"),
}
# Other names of these -> name above, as llama.cpp reads them.
_PRE_TOKENIZER_ALIASES = (
    dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm")
    | dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "a.x-4.0", "mellum", "gigachat"), "gpt-2")
    | dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "stablelm2", "solar-open", "grok-2"), "qwen2")
    | dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe")
    | {"dbrx": "smaug-bpe"}
)
# Tokens that end a text or a turn, which a GGUF header need not list.
_END_NAMES = {
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
}


def read_tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files by name, and of those that declare special tokens.

    Args:
      source: a directory, any file in it, or a GGUF file, whose header is converted to the files of Hugging Face.

    Raises: UserError if the tokenizer of a GGUF file is not a byte-level BPE, or has an unknown pre-tokenizer.
    """
    source = Path(source)
    if gguf := find_gguf(source):
        return _files_of_gguf(gguf)
    directory = source if source.is_dir() else source.parent
    names = [*_FILE_NAMES, *(f"{_MORE_TEMPLATES}/{path.name}" for path in directory.glob(f"{_MORE_TEMPLATES}/*.jinja"))]
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}


def vocabulary_file(source: Path, files: dict[str, bytes]) -> str:
    """Return the name of the file with the vocabulary: tokenizer.model or, if it is not sentencepiece's, tokenizer.json.

    Args:
      source: where the files are from, for messages.
      files: content by name.

    Raises: UserError if there is none of these files, or only a vocabulary of tiktoken.
    """
    if "tokenizer.model" in files and not _TIKTOKEN_LINE.match(files["tokenizer.model"]):
        return "tokenizer.model"
    if "tokenizer.json" in files:
        return "tokenizer.json"
    raise UserError(
        f"'{source}' has no tokenizer: expected tokenizer.model (sentencepiece) or tokenizer.json. Copy it from the model's "
        f"repository.{other_tokenizer_hint(source)}",
        field=str(source),
    )


def _special_ids_of_gguf(path: Path, vocab: int) -> dict[str, int]:
    """Return the ids of special tokens in the header, by kind; warn of one that is not a token. Raises: UserError."""
    ids = {}
    for kind in ("bos", "eos", "padding", "eot", "eom"):
        key = f"tokenizer.ggml.{kind}_token_id"
        i = header_value(path, key, -1)
        if type(i) is not int:
            raise UserError(f"{path}: {key}={i!r} must be a token id.", field=str(path))
        if 0 <= i < vocab:
            ids[kind] = i
        elif i not in _NO_TOKEN:
            logger.warning("%s: %s=%s is not one of its %s tokens; it is not used.", path, key, i, f"{vocab:,}")
    return ids


def _files_of_gguf(path: Path) -> dict[str, bytes]:
    def value(key: str, default: Any = None) -> Any:
        return header_value(path, f"tokenizer.ggml.{key}", default)

    if (kind := value("model")) != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model='{kind}' is not supported; expected 'gpt2' (byte-level BPE). Use the model's "
            "directory with config.json, safetensors and its tokenizer instead.",
            field=str(path),
        )
    pre_tokenizer = value("pre", "")
    pre_tokenizer = _PRE_TOKENIZER_ALIASES.get(pre_tokenizer, pre_tokenizer)
    if pre_tokenizer not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre='{pre_tokenizer}' is not one of: "
            f"{', '.join(sorted({*_PRE_TOKENIZERS, *_PRE_TOKENIZER_ALIASES}))}. Use the model's directory with config.json, "
            "safetensors and its tokenizer instead.",
            field=str(path),
        )
    names, types, merges = value("tokens"), value("token_type"), value("merges")
    if not all(isinstance(values, list) for values in (names, types, merges)) or len(types) != len(names):
        raise UserError(
            f"{path}: tokenizer.ggml.tokens, token_type and merges must be lists, the first two of the same length. The file is "
            "damaged; get it again.",
            field=str(path),
        )

    # generation_config.json: ids of the special tokens, with all that end a response.
    ids = _special_ids_of_gguf(path, len(names))
    named_ends = [i for i, name in enumerate(names) if name in _END_NAMES and types[i] in (_CONTROL, _USER_DEFINED)]
    stop_ids = list(dict.fromkeys([*(ids[kind] for kind in ("eos", "eot", "eom") if kind in ids), *named_ends]))
    generation: dict[str, Any] = {"eos_token_id": stop_ids}
    generation |= {f"{key}_token_id": ids[kind] for kind, key in (("bos", "bos"), ("padding", "pad")) if kind in ids}

    # tokenizer_config.json: names of the special tokens, and the chat templates. Without a padding token, transformers would add
    # one to some tokenizers.
    keys = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
    config: dict[str, Any] = {token: names[ids[kind]] if kind in ids else None for kind, token in keys.items()}
    config["pad_token"] = config["pad_token"] or config["eos_token"]
    # llama.cpp's default: only the tokenizers of Llama 3 begin a text with the token.
    begins_texts = "bos" in ids and bool(value("add_bos_token", pre_tokenizer == "llama-bpe"))
    config |= {
        "unk_token": None,
        "add_bos_token": begins_texts,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if templates := _chat_templates(path):
        config["chat_template"] = templates

    contents = {
        "tokenizer.json": _tokenizer_json(
            names, types, merges, pre_tokenizer, _bos_processor(names, ids["bos"]) if begins_texts else None
        ),
        "tokenizer_config.json": config,
        GENERATION_CONFIG_FILE: generation,
    }
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def _bos_processor(names: list[str], bos_id: int) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that puts the begin-of-text token in front of every text."""
    name = names[bos_id]
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {name: {"id": name, "ids": [bos_id], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _chat_templates(path: Path) -> str | list[dict[str, str]]:
    """Return the chat template, or several with their names, as in tokenizer_config.json; "" for none."""
    prefix = "tokenizer.chat_template"
    default = header_value(path, prefix, "")
    others = [
        {"name": name.removeprefix(f"{prefix}."), "template": header_value(path, name)}
        for name in open_gguf(path).fields
        if name.startswith(f"{prefix}.")
    ]
    if not others:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *others]


def _tokenizer_json(
    names: list[str], types: list[int], merges: list[str], pre_tokenizer: str, post_processor: dict[str, Any] | None
) -> dict[str, Any]:
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
        "post_processor": post_processor,
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
