"""Special tokens of a model: begin and end of text, padding, and the ids that end a response.

A model's files name them in several places, which need not agree. The rules are those of `transformers`:

  - The tokenizer's own tokens are the names in tokenizer_config.json. special_tokens_map.json replaces them, unless
    tokenizer_config.json has `added_tokens_decoder`; then it only adds what is missing.
  - The ids that end a response are `eos_token_id` of generation_config.json or, without one, of config.json.

Here, the tokenizer's end-of-text token ends a response, too, because it ends every text that a policy is trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rpt_jax.errors import UserError
from rpt_jax.weights.model_files import GENERATION_CONFIG_FILE, MODEL_CONFIG_FILE, parse_object

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TOKENS_MAP_FILE = "special_tokens_map.json"
_ADDED_TOKENS_FILE = "added_tokens.json"
# Names of the end-of-text token, for tokenizers whose files do not specify it.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<｜end▁of▁sentence｜>")

logger = logging.getLogger(__name__)


class SpecialIds(NamedTuple):
    """Ids of special tokens.

    Attributes:
      bos_id: begin-of-text token; `eos_id` if the tokenizer has none.
      eos_id: end-of-text token.
      pad_id: padding token; `eos_id` if the tokenizer has none.
      stop_ids: all ids that end a response; `eos_id` is the first.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]


def read_special_ids(
    path: Path, files: Mapping[str, bytes], ids: Mapping[str, int], defaults: Mapping[str, int] | None = None
) -> SpecialIds:
    """Find the special tokens that a model's files declare.

    Args:
      path: file of the tokenizer, for messages.
      files: content of the model's files by name (`files.read_tokenizer_files`).
      ids: id of each token by its name, added tokens included.
      defaults: ids of "bos", "eos" and "pad" in the vocabulary's own file, for those that no other file names.

    Raises: UserError if no file names an end-of-text token, or if a value has the wrong type.
    """
    names = declared_names(path, files)
    numbers = {kind: _declared_ids(path, files, f"{kind}_token_id", ids) for kind in ("bos", "eos", "pad")}

    def find(kind: str) -> int | None:
        name = names.get(f"{kind}_token")
        if name and name in ids:
            return ids[name]
        if name:
            logger.warning("%s: %s_token='%s' is not a token of this tokenizer; it is not used.", path, kind, name)
        elif f"{kind}_token" in names and kind != "eos":
            return None  # The files say that there is no such token.
        if defaults and kind in defaults:
            return defaults[kind]
        return next(iter(numbers[kind]), None)

    eos_id = find("eos")
    if eos_id is None:
        eos_id = next((ids[name] for name in _EOS_NAMES if name in ids), None)
    if eos_id is None:
        raise UserError(
            f"{path} has no end-of-text token. Set eos_token in {TOKENIZER_CONFIG_FILE} in the same directory, or train a "
            "sentencepiece model with an eos_id.",
            field=str(path),
        )
    bos_id = find("bos")
    pad_id = find("pad")
    return SpecialIds(
        bos_id=eos_id if bos_id is None else bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        stop_ids=tuple(dict.fromkeys([eos_id, *numbers["eos"]])),
    )


def declared_names(path: Path, files: Mapping[str, bytes]) -> dict[str, str | None]:
    """Return the names of special tokens, such as "eos_token"; None for one that the files say does not exist."""
    config = parse_file(path, files, TOKENIZER_CONFIG_FILE)
    token_map = parse_file(path, files, _TOKENS_MAP_FILE)
    merged = token_map | config if "added_tokens_decoder" in config else config | token_map
    return {key: _token_name(value) for key, value in merged.items() if key.endswith("_token")}


def _listed_names(path: Path, files: Mapping[str, bytes]) -> set[str]:
    """Return the names of special tokens that the tokenizer's files list without a purpose such as end of text."""
    contents = [parse_file(path, files, name) for name in (TOKENIZER_CONFIG_FILE, _TOKENS_MAP_FILE)]
    lists = [content.get(key) for content in contents for key in ("additional_special_tokens", "extra_special_tokens")]
    names = [_token_name(entry) for entries in lists if isinstance(entries, list) for entry in entries]
    return {name for name in names if name}


def _token_name(value: Any) -> str | None:
    """Return the name of a token that a file gives as such or with its properties; None if there is none."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) and name else None


def _declared_ids(path: Path, files: Mapping[str, bytes], key: str, ids: Mapping[str, int]) -> list[int]:
    """Return the ids under `key` in generation_config.json or, without any there, in config.json."""
    for name in (GENERATION_CONFIG_FILE, MODEL_CONFIG_FILE):
        value = parse_file(path, files, name).get(key)
        if value is not None:
            break
    else:
        return []
    values = value if isinstance(value, list) else [value]
    file = path.with_name(name)
    if not all(type(i) is int for i in values):
        raise UserError(f"{file}: {key}={value!r} must be a token id or a list of token ids.", field=str(file))
    known = set(ids.values())
    if absent := [i for i in values if i >= 0 and i not in known]:
        logger.warning("%s: %s=%s has no token in %s, so it is never sampled.", file, key, absent, path.name)
    return [i for i in values if i in known]


def read_added_tokens(path: Path, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return the tokens in `added_tokens_decoder` of tokenizer_config.json or, without it, in added_tokens.json, by name.

    Args:
      path: file of the tokenizer, for messages.
      files: content of the model's files by name.

    Returns: an entry as in `added_tokens` of tokenizer.json for each token.

    Raises: UserError for an entry of another form.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    decoder = parse_file(path, files, TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
    named = {name for name in declared_names(path, files).values() if name} | _listed_names(path, files)
    tokens: list[dict[str, Any]]
    try:
        if decoder is not None:
            tokens = [plain | {"special": False} | token | {"id": int(i)} for i, token in decoder.items()]
        else:
            added = parse_file(path, files, _ADDED_TOKENS_FILE)
            tokens = [plain | {"content": c, "id": int(i), "special": c in named} for c, i in added.items()]
        if not all(
            _token_name(token) and all(type(token[flag]) is bool for flag in (*plain, "special")) for token in tokens
        ):
            raise ValueError("a token needs a name, and its properties are true or false")
        return {token["content"]: token for token in tokens}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        file = path.with_name(TOKENIZER_CONFIG_FILE if decoder is not None else _ADDED_TOKENS_FILE)
        raise UserError(f"{file}: the list of added tokens is damaged ({error}).", field=str(file)) from None


def parse_file(path: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the JSON object in the file `name`, or an empty one if there is no such file.

    Args:
      path: a file in the same directory, for messages.
      files: content by file name.
      name: name of the file.

    Raises: UserError if the file contains something else.
    """
    return parse_object(path.with_name(name), files[name]) if name in files else {}
