"""Comparison of prompts with those of `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax.config import PromptConfig
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position
from rpt_jax.tokenizers.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

# No token crosses the ends of this context in the template below, so that a text has the same tokens as a whole and in parts.
CONTEXT = "Ann has 3 apples"
TEMPLATE = ("Complete the text of café 漢字:\n", "\nWhat comes next?")


def assert_prompts_equal_transformers(directory: Path, folder: Path) -> None:
    """Compare the prompts for a context with and, if there is one, without the model's chat template.

    Args:
      directory: of the model.
      folder: where the template of the user is written.
    """
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    path = folder / "template.txt"
    path.write_text("{context}".join(TEMPLATE))
    ids = ours.encode(CONTEXT)
    for chat in (False, True) if theirs.chat_template else (False,):
        config = PromptConfig(template=str(path), chat_template=chat, max_tokens=1000, prefill_think_token=False)
        prompt = PromptBuilder(config, ours).build(0, [*ids, *ids], Position(0, len(ids), 1.0))
        text = CONTEXT.join(TEMPLATE)
        messages = [{"role": "user", "content": text}]
        expected = (
            theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            if chat
            else theirs(text)["input_ids"]
        )
        assert prompt.tokens_PxS[: prompt.lengths_P].tolist() == expected, f"chat_template={chat}"
