"""A model's own chat template, as the token ids before and after what the user says."""

from __future__ import annotations

import json
import re
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import Tokenizer

_MESSAGE = "\ue000message\ue000"  # Characters for private use, which no template has.


def chat_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that stand before and after a user's message, up to where the assistant's answer begins.

    Special tokens that the template spells are those tokens. Raises: UserError, where the tokenizer's files have no chat
    template, or one that does not give the message back.
    """
    files = read_tokenizer_files(tokenizer.source)
    settings = _object(files.get("tokenizer_config.json"))
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    if isinstance(template, list):  # Several, by name.
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if not isinstance(template, str):
        raise UserError(
            f"prompt.chat_template=True: there is no chat template beside {tokenizer.source}; set it to False."
        )
    before, message, after = _render(template, settings, tokenizer.source).partition(_MESSAGE)
    if not message or _MESSAGE in after:
        raise UserError(
            f"prompt.chat_template: the template of {tokenizer.source} does not give a user's message once."
        )
    added = _object(files.get("tokenizer.json")).get("added_tokens", ())
    special = {token["content"]: token["id"] for token in added if token["id"] in tokenizer.special_ids}
    return _encode(before, tokenizer, special), _encode(after, tokenizer, special)


def _object(data: bytes | None) -> dict[str, Any]:
    return json.loads(data) if data else {}


def _render(template: str, settings: dict[str, Any], source: str) -> str:
    # In a sandbox, because it is a program that came with the weights.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def token(name: str) -> str:
        value = settings.get(name) or ""
        return value.get("content", "") if isinstance(value, dict) else value

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    names = {name: token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        messages = [{"role": "user", "content": _MESSAGE}]
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, **names
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"prompt.chat_template: the template of {source} cannot be rendered: {error}.") from None


def _encode(text: str, tokenizer: Tokenizer, special: dict[str, int]) -> list[int]:
    names = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [i for part in parts for i in ([special[part]] if part in special else tokenizer.encode(part))]
