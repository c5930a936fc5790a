"""A model's own chat template, around the text of a prompt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.special_tokens import TOKENIZER_CONFIG_FILE, declared_names, parse_file
from rpt_jax.tokenizers.tokenizer import Tokenizer

_FIELD = "prompt.chat_template"
_FILE = "chat_template.jinja"
_TOKEN_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CONTEXT = "\ue000context\ue000"  # Stands for the context: private-use characters, which templates do not contain.


def render_chat(tokenizer: Tokenizer, before: str, after: str) -> tuple[str, str]:
    """Return the text of a whole prompt before and after the context, up to the start of the assistant's answer.

    Args:
      tokenizer: its files contain the chat template.
      before, after: text of the user's message before and after the context.

    Raises: UserError, if there is no chat template, if it fails, or if it does not render the context exactly once.
    """
    text = render_messages(tokenizer, [{"role": "user", "content": before + _CONTEXT + after}])
    opening, context, closing = text.partition(_CONTEXT)
    if not context or _CONTEXT in closing:
        raise UserError(
            f"{_FIELD}: the template of {tokenizer.source} must render the user's message exactly once.", field=_FIELD
        )
    return opening, closing


def render_messages(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """Return the text of a conversation.

    Args:
      tokenizer: its files contain the chat template.
      messages: each with "role" and "content".
      add_generation_prompt: whether the text ends with the start of the assistant's answer.

    Raises: UserError, if there is no chat template, or if it fails.
    """
    path = Path(tokenizer.source)
    files = read_tokenizer_files(path)
    template = _find_template(path, files)
    if template.startswith("\ufeff"):
        raise UserError(
            f"{_FIELD}: the template of {tokenizer.source} begins with a byte order mark, which would be part of every prompt. "
            "Save it as UTF-8 without one.",
            field=_FIELD,
        )
    variables: dict[str, Any] = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = _environment().from_string(template).render(variables | _token_names(tokenizer, path, files))
        text.encode("utf-8")  # Fails for half of a surrogate pair, which JSON can contain.
    except Exception as error:  # noqa: BLE001 - the template is a program, which can fail in any way.
        reason = f"{type(error).__name__}: {error}".rstrip(".: ")
        raise UserError(
            f"{_FIELD}=True: the template of {tokenizer.source} fails with {reason}. Set it to False, or save a template that "
            f"works as {_FILE} next to it.",
            field=_FIELD,
        ) from None
    return text


def _find_template(path: Path, files: Mapping[str, bytes]) -> str:
    """Return the template in chat_template.jinja or in tokenizer_config.json. Raises: UserError if there is none."""
    if _FILE in files:
        try:
            return files[_FILE].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{_FIELD}: {path.with_name(_FILE)} is not UTF-8 (byte {error.start}).", field=_FIELD
            ) from None

    # tokenizer_config.json may have several by name, of which "default" is for conversations without tools.
    template = parse_file(path, files, TOKENIZER_CONFIG_FILE).get("chat_template")
    kind = ""
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
        kind = f" named 'default' (only {', '.join(map(repr, by_name))})"
    if not isinstance(template, str):
        raise UserError(
            f"{_FIELD}=True: no chat template{kind} was found next to {path}; set it to False, or save one there as {_FILE}.",
            field=_FIELD,
        )
    return template


def _token_names(tokenizer: Tokenizer, path: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the names of special tokens by variable; as in `transformers`, a token that does not exist stays undefined."""
    declared = declared_names(path, files)
    names = {f"{kind}_token": declared.get(f"{kind}_token") for kind in _TOKEN_KINDS}
    names["eos_token"] = names["eos_token"] or tokenizer.special_names[tokenizer.eos_id]
    if tokenizer.bos_id != tokenizer.eos_id:
        names["bos_token"] = names["bos_token"] or tokenizer.special_names[tokenizer.bos_id]
    return {variable: name for variable, name in names.items() if name}


def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with what `transformers` offers to templates, sandboxed because a template may come from anyone."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words in a template: only its content is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON. Jinja's own filter has other options, and escapes the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
