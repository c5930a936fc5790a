"""The files of a tokenizer in an exported policy, complete with the special tokens that were found for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.special_tokens import TOKENIZER_CONFIG_FILE, parse_file
from rpt_jax.tokenizers.tokenizer import Tokenizer
from rpt_jax.weights.model_files import GENERATION_CONFIG_FILE, MODEL_CONFIG_FILE


def exported_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files to write beside the weights of a policy, content by name.

    They are those that the tokenizer was loaded from. generation_config.json is changed, or added, if `transformers.generate`
    would otherwise end a response at other tokens than this tokenizer's `stop_ids`. tokenizer_config.json is added if there is
    none.

    Args:
      tokenizer: of the policy.
    """
    files = read_tokenizer_files(tokenizer.source)
    files.pop(MODEL_CONFIG_FILE, None)  # It belongs to the weights.
    path = Path(tokenizer.source)

    # Ids that end a response. A missing begin-of-text or padding token is represented by `eos_id`.
    generation = parse_file(path, files, GENERATION_CONFIG_FILE)
    declared = generation.get("eos_token_id")
    changes: dict[str, Any] = {}
    if set(declared if isinstance(declared, list) else [declared]) != set(tokenizer.stop_ids):
        changes["eos_token_id"] = list(tokenizer.stop_ids) if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id
    for key, i in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
        if i != tokenizer.eos_id and generation.get(key) is None:
            changes[key] = i
    if changes:
        files[GENERATION_CONFIG_FILE] = _to_json(generation | changes)

    # Names of the special tokens, and whether a text begins with BOS.
    if TOKENIZER_CONFIG_FILE not in files:
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        names: dict[str, Any] = {
            key: tokenizer.special_names[i] for key, i in ids.items() if key == "eos_token" or i != tokenizer.eos_id
        }
        names["add_bos_token"] = bool(tokenizer.prefix_ids)
        files[TOKENIZER_CONFIG_FILE] = _to_json(names)
    return files


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
