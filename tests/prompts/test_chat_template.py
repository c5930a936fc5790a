"""Chat templates of Hugging Face tokenizers around prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizers import byte_level_bpe, write_hf

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_end|>' + message['role'] + '\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: Any) -> Tokenizer:
    """Write a tokenizer with a chat template in tokenizer_config.json, unless that is empty."""
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}}
    if template:
        config["chat_template"] = template
    return load_tokenizer(write_hf(folder, byte_level_bpe(), tokenizer_config=config))


def make_builder(tokenizer: Tokenizer) -> PromptBuilder:
    return PromptBuilder(PromptConfig(chat_template=True, max_tokens=64), tokenizer)


@pytest.mark.parametrize("form", ["text", "list", "prefilled", "file"])
def test_a_chat_template_surrounds_the_prompt(tmp_path: Path, form: str) -> None:
    """Special tokens spelled in the template are single ids; bos and <think> appear once, wherever they come from."""
    text = CHAT + "{{ '<think>\\n' }}" * (form == "prefilled")
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT)
    tokenizer = write_tokenizer(tmp_path, [{"name": "default", "template": text}] if form == "list" else text)
    document = tokenizer.encode("Ann has <|im_end|> apples")
    prompt = make_builder(tokenizer).build(0, document, Position(0, 5, 1.0))
    tokens = prompt.tokens_PxS[: prompt.lengths_P].tolist()
    think = [tokenizer.think_id, *tokenizer.encode("\n")] if form == "prefilled" else [tokenizer.think_id]
    end = tokenizer.eos_id
    opening = [tokenizer.bos_id, end, *tokenizer.encode("user\n")]
    assert tokens == [*opening, *document[:5], end, *tokenizer.encode("assistant\n"), *think]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages",
        "no message",
        "{{ messages[0].content }} {{ messages[0].content }}",
        "{{ messages.__class__.__mro__ }}",
    ],
    ids=["missing", "syntax error", "drops the message", "repeats the message", "forbidden by the sandbox"],
)
def test_unusable_chat_templates_are_rejected(tmp_path: Path, template: str) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    with pytest.raises(UserError) as raised:
        make_builder(tokenizer)
    assert raised.value.field == "prompt.chat_template"
