"""Token ids of a prompt template, exactly as `transformers` encodes its text.

A document is encoded without loss and without special tokens (`tokenizers.tokenizer`). A template is the opposite: it is part of
what a model was trained on, so its special tokens are single ids, and the tokenizer's own normalizer and prefix space apply.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.special_tokens import TOKENIZER_CONFIG_FILE, parse_file
from rpt_jax.weights.model_files import MODEL_CONFIG_FILE

TOKENIZER_JSON = "tokenizer.json"

# Function from a text, and whether a prompt begins with it, to its token ids.
TemplateEncoder = Callable[[str, bool], list[int]]

# Concatenated protocol buffers are merged field by field, and the last value of a field wins. This overrides the normalizer of a
# sentencepiece model (field 3) with: no character map, no dummy prefix, no removal of whitespace, and escaped spaces.
IDENTITY_NORMALIZER = b"\x1a\x08" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
_DUMMY_PREFIX = b"\x1a\x02" + b"\x18\x01"  # Turns the dummy prefix on again.


def library_backend(path: Path, files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of tokenizer.json, without truncation and padding.

    Args:
      path: the file, for messages.
      files: content of the model's files by name.

    Raises: UserError if the library cannot read the file.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(files[TOKENIZER_JSON].decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself.
        raise UserError(
            f"{path} is not a valid tokenizer.json: {error}. Download or export it again.", field=str(path)
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def add_tokens(path: Path, backend: tokenizers.Tokenizer, added: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the tokens that other files list beside tokenizer.json.

    Args:
      path: of tokenizer.json, for messages.
      backend: the library's tokenizer, which is changed.
      added: an entry as in `added_tokens` of tokenizer.json for each token, by name.

    Raises: UserError if a token gets another id, because the ids do not continue those of tokenizer.json.
    """
    known = added_tokens(backend)
    for name, entry in sorted(added.items(), key=lambda item: item[1]["id"]):
        if name not in known:
            flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([tokenizers.AddedToken(name, **flags)])
        check_added_id(path, name, entry["id"], backend.token_to_id(name))


def added_tokens(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the added tokens of the library's tokenizer by name, each with `id`, `special`, `lstrip` and `rstrip`."""
    return {
        token.content: {"id": i, "special": token.special, "lstrip": token.lstrip, "rstrip": token.rstrip}
        for i, token in backend.get_added_tokens_decoder().items()
    }


def check_added_id(path: Path, name: str, listed: int, expected: int | None) -> None:
    """Check the id that a file lists for an added token. Raises: UserError if it is not `expected`."""
    if listed != expected:
        raise UserError(
            f"{path.parent}: the added token '{name}' is listed with the id {listed}, but beside {path.name} it has the id "
            f"{expected}. Added tokens must have the ids of that file, or continue them without a gap.",
            field=str(path),
        )


def json_encoder(backend: tokenizers.Tokenizer) -> TemplateEncoder:
    """Return the encoder of a tokenizer.json."""
    return lambda text, is_start: backend.encode(text, add_special_tokens=False).ids


def _continuing_encoder(backend: tokenizers.Tokenizer) -> TemplateEncoder:
    """Return the encoder of a tokenizer.json that puts a space in front of every text, which must not be inside of a prompt."""
    newline = backend.encode("\n", add_special_tokens=False).ids  # Ends with a token that merges with nothing.

    def encode(text: str, is_start: bool) -> list[int]:
        ids = backend.encode(text if is_start else f"\n{text}", add_special_tokens=False).ids
        return ids if is_start else ids[len(newline) :]

    return encode


def sentencepiece_encoder(
    path: Path,
    files: Mapping[str, bytes],
    tokens: Mapping[str, Mapping[str, Any]],
    backend: tokenizers.Tokenizer | None,
) -> TemplateEncoder:
    """Return the encoder of a sentencepiece model.

    `transformers` splits a text at special and added tokens. What is in between gets a prefix space: all parts with
    `legacy=true`, else only the start of the text. Its class LlamaTokenizer does so even if the model says otherwise.

    Args:
      path: of the model, for messages.
      files: content of the model's files by name.
      tokens: special and added tokens by name, with `id` and, where they absorb spaces, `lstrip` and `rstrip`.
      backend: the library's tokenizer, if there is a tokenizer.json.
    """
    config = parse_file(path, files, TOKENIZER_CONFIG_FILE)
    model_type = parse_file(path, files, MODEL_CONFIG_FILE).get("model_type", "llama")
    is_llama = str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer" and model_type == "llama"
    if backend and not is_llama:
        return _continuing_encoder(backend)

    model = files[path.name]
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    has_prefix = config.get("add_prefix_space") is not False if is_llama else own.normalize("a").startswith("\u2581")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model + IDENTITY_NORMALIZER)
    prefixed = sentencepiece.SentencePieceProcessor(model_proto=model + IDENTITY_NORMALIZER + _DUMMY_PREFIX)
    legacy = bool(config.get("legacy", not is_llama))
    names = sorted(tokens, key=len, reverse=True)  # A token must not be cut short by one that is its prefix.
    pattern = re.compile("|".join(_pattern(name, tokens[name]) for name in names))

    def encode_part(part: str, *, is_start: bool, after_token: bool) -> list[int]:
        gets_prefix = has_prefix and (is_start or (legacy and after_token))
        # Only the old behavior of the other classes adds a space in front of a space.
        gets_prefix &= not part.startswith(" ") or (legacy and not is_llama)
        return (prefixed if gets_prefix else plain).encode(part) if part else []

    def encode(text: str, is_start: bool) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in pattern.finditer(text):
            ids += encode_part(text[end : match.start()], is_start=is_start and end == 0, after_token=end > 0)
            ids.append(tokens[names[(match.lastindex or 0) - 1]]["id"])
            end = match.end()
        return ids + encode_part(text[end:], is_start=is_start and end == 0, after_token=end > 0)

    return encode


def _pattern(name: str, token: Mapping[str, Any]) -> str:
    """Return a regular expression for a token, with the spaces that it absorbs outside of its group."""
    left, right = (r"\s*" if token.get(key) else "" for key in ("lstrip", "rstrip"))
    return f"{left}({re.escape(name)}){right}"


def prefix_ids(
    path: Path, files: Mapping[str, bytes], bos_id: int, backend: tokenizers.Tokenizer | None
) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts in front of a text, usually BOS or nothing.

    The post-processor of a tokenizer.json says so; without that file, `add_bos_token` in tokenizer_config.json.

    Args:
      path: of the tokenizer, for messages.
      files: content of the model's files by name.
      bos_id: id of the begin-of-text token.
      backend: the library's tokenizer, if there is a tokenizer.json.
    """
    if backend is None:
        return (bos_id,) if parse_file(path, files, TOKENIZER_CONFIG_FILE).get("add_bos_token") else ()
    encoding = backend.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], marked))
