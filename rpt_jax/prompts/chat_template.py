"""A model's own chat template, as the token ids before and after the user's message."""

from __future__ import annotations

import json
import re
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import Tokenizer

_FIELD = "prompt.chat_template"
_MESSAGE = "\ue000message\ue000"  # Placeholder in private-use characters, which templates do not contain.


def chat_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the token ids before and after a user's message, up to the start of the assistant's answer.

    Special tokens that the template spells out are encoded as those tokens.

    Raises: UserError, if the tokenizer's files have no chat template, or if it does not render the message exactly once.
    """
    files = read_tokenizer_files(tokenizer.source)
    settings = _parse_object(files.get("tokenizer_config.json"))
    template = _find_template(files, settings)
    if template is None:
        raise UserError(
            f"{_FIELD}=True: no chat template was found next to {tokenizer.source}; set it to False.", field=_FIELD
        )
    before, message, after = _render(template, settings, tokenizer.source).partition(_MESSAGE)
    if not message or _MESSAGE in after:
        raise UserError(
            f"{_FIELD}: the template of {tokenizer.source} must render the user's message exactly once.", field=_FIELD
        )
    added_tokens = _parse_object(files.get("tokenizer.json")).get("added_tokens", ())
    special = {token["content"]: token["id"] for token in added_tokens if token["id"] in tokenizer.special_ids}
    return _encode(before, tokenizer, special), _encode(after, tokenizer, special)


def _parse_object(data: bytes | None) -> dict[str, Any]:
    return json.loads(data) if data else {}


def _find_template(files: dict[str, bytes], settings: dict[str, Any]) -> str | None:
    """Return the template in chat_template.jinja or in tokenizer_config.json, which may hold several by name."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = settings.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _render(template: str, settings: dict[str, Any], source: str) -> str:
    # Sandboxed, because the template is a program from an untrusted source.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def token(name: str) -> str:
        value = settings.get(name) or ""
        return value.get("content", "") if isinstance(value, dict) else value

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    tokens = {name: token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    messages = [{"role": "user", "content": _MESSAGE}]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, **tokens
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{_FIELD}: the template of {source} cannot be rendered: {error}.", field=_FIELD) from None


def _encode(text: str, tokenizer: Tokenizer, special: dict[str, int]) -> list[int]:
    """Encode `text`, with the special tokens in it as single ids."""
    # Longest first, so that a token is not cut short by one that is its prefix.
    names = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        ids += [special[part]] if part in special else tokenizer.encode(part)
    return ids
