"""Chat templates of Hugging Face tokenizers around prompts."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.chat_template import render_chat
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizers import chatml_bpe, sentencepiece_model, write_hf, write_sentencepiece

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: Any) -> Tokenizer:
    """Write a tokenizer with a chat template in tokenizer_config.json, unless that is empty."""
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}}
    if template:
        config["chat_template"] = template
    return load_tokenizer(write_hf(folder, chatml_bpe(), tokenizer_config=config))


def make_builder(tokenizer: Tokenizer, **options: Any) -> PromptBuilder:
    return PromptBuilder(PromptConfig(chat_template=True, max_tokens=64, **options), tokenizer)


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
    [start] = tokenizer.encode_template("<|im_start|>", False)
    opening = [tokenizer.bos_id, start, *tokenizer.encode("user\n")]
    assert tokens == [*opening, *document[:5], tokenizer.eos_id, *tokenizer.encode("assistant\n"), *think]


def test_the_users_template_is_inside_of_the_chat_template(tmp_path: Path) -> None:
    """A chat template may trim the message, but never the context."""
    path = tmp_path / "template.txt"
    path.write_text("  Text: {context} \n")
    tokenizer = write_tokenizer(tmp_path / "model", "<|im_start|>{{ messages[0].content | trim }}<|im_end|>")
    builder = make_builder(tokenizer, template=str(path), prefill_think_token=False)
    assert tokenizer.decode(builder.before) == "Text: " and tokenizer.decode(builder.after) == ""
    assert (len(builder.after), builder.after[0]) == (1, tokenizer.eos_id)


def test_special_tokens_of_a_sentencepiece_model_are_single_ids(tmp_path: Path) -> None:
    """As in Mistral's models, of which [INST] is a control token; the template writes BOS, which must not be doubled."""
    model = sentencepiece_model(control_symbols=["[INST]", "[/INST]"])
    template = "{{ bos_token }}[INST]{{ messages[0].content }}[/INST]"
    config = {"add_bos_token": True, "chat_template": template}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model, tokenizer_config=config))
    builder = make_builder(tokenizer, prefill_think_token=False)
    assert (builder.before, builder.after) == ([1, 3], [4])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}", "MESSAGE"),
        ("{{ strftime_now('%Y') }}{{ messages[0].content }}", f"{datetime.date.today().year}MESSAGE"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}{{ messages[0].content }}", '{"b": "<é>", "a": 1}MESSAGE'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}{{ messages[0].content }}", None),
        ("{{ [1, 2] | tojson(indent=2, separators=(';', '=')) }}{{ messages[0].content }}", "[\n  1;\n  2\n]MESSAGE"),
        ("{{ tools is none }}{{ documents is none }}{{ messages[0].content }}", "TrueTrueMESSAGE"),
        ("{{ pad_token is defined }}{{ eos_token }}{{ messages[0].content }}", "False<|im_end|>MESSAGE"),
        (
            "{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ messages[0].content }}",
            "1MESSAGE",
        ),
    ],
    ids=["generation", "strftime_now", "tojson", "tojson in order", "tojson indented", "variables", "tokens", "break"],
)
def test_templates_have_what_transformers_offers(tmp_path: Path, template: str, text: str | None) -> None:
    text = '{"a": 1, "b": "\\u00e9"}MESSAGE' if text is None else text
    before, after = render_chat(write_tokenizer(tmp_path, template), "MESSAGE", "")
    assert before + after == text


def test_the_message_of_a_template_that_raises_is_shown(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "{{ raise_exception('A system message comes first.') }}")
    with pytest.raises(UserError, match=r"A system message comes first\b"):
        make_builder(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages",
        "no message",
        "{{ messages[0].content }} {{ messages[0].content }}",
        "{{ messages[0].content | upper }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].content }}{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include 'another' %}",
        "{{ messages[0].content }}{{ missing.field }}",
        "{{ messages[0].content }}{{ 'a' * -1 + 1 }}",
        "\ufeff{{ messages[0].content }}",
        "\ud83d{{ messages[0].content }}",
        [{"name": "tool_use", "template": "{{ messages[0].content }}"}],
        7,
    ],
    ids=[
        "missing",
        "syntax error",
        "drops the message",
        "repeats the message",
        "changes the message",
        "forbidden by the sandbox",
        "divides by zero",
        "recurses",
        "includes a file",
        "reads what is undefined",
        "adds a number to a text",
        "begins with a byte order mark",
        "half of a surrogate pair",
        "no default",
        "not a text",
    ],
)
def test_unusable_chat_templates_are_rejected(tmp_path: Path, template: Any) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    with pytest.raises(UserError) as raised:
        make_builder(tokenizer)
    assert raised.value.field == "prompt.chat_template"


@pytest.mark.parametrize("content", [b"caf\xe9 {{ messages[0].content }}", "\ufeff{{ messages[0].content }}".encode()])
def test_a_template_file_in_another_encoding_is_rejected(tmp_path: Path, content: bytes) -> None:
    tokenizer = write_tokenizer(tmp_path, "")
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(UserError) as raised:
        make_builder(tokenizer)
    assert raised.value.field == "prompt.chat_template"


@pytest.mark.parametrize("closing", ["<think>\n\n</think>\n\n", "</think>", "<think></think>Answer: "])
@pytest.mark.parametrize("has_token", [True, False])
def test_a_template_that_ends_the_reasoning_is_rejected(tmp_path: Path, closing: str, has_token: bool) -> None:
    """No prediction could count, because the end-of-thinking marker is expected in the response."""
    template = "{{ messages[0].content }}<|im_end|><|im_start|>assistant\n" + closing
    tokens = [token for token in chatml_bpe()["added_tokens"] if has_token or "think" not in token["content"]]
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    tokenizer = load_tokenizer(write_hf(tmp_path, chatml_bpe(added_tokens=tokens), tokenizer_config=config))
    with pytest.raises(UserError) as raised:
        make_builder(tokenizer, prefill_think_token=has_token)
    assert raised.value.field == "prompt.chat_template"


def test_an_instruction_may_mention_the_markers(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}\nReason in <think> and </think>.<|im_end|><|im_start|>assistant\n"
    builder = make_builder(tokenizer := write_tokenizer(tmp_path, template))
    assert builder.after[-1] == tokenizer.think_id

    (tmp_path / "template.txt").write_text("{context}\nReason in <think> and </think>.\n")
    config = PromptConfig(template=str(tmp_path / "template.txt"), max_tokens=64)
    assert PromptBuilder(config, tokenizer).after[-1] == tokenizer.think_id
    (tmp_path / "template.txt").write_text("{context}\n<think></think>\n")
    with pytest.raises(UserError) as raised:
        PromptBuilder(config, tokenizer)
    assert raised.value.field == "prompt.template"


def test_a_damaged_tokenizer_config_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"})[:-1])
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field == str(tmp_path / "tokenizer_config.json")
