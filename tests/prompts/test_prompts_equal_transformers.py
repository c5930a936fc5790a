"""Prompts equal those of `transformers`, token for token: begin-of-text tokens, chat templates and templates of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import TINY
from tests.helpers.prompts import assert_prompts_equal_transformers
from tests.helpers.tokenizers import chatml_bpe, sentencepiece_model, write_hf, write_sentencepiece

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


SPEC = chatml_bpe()
SIZE = len(SPEC["model"]["vocab"]) + len(SPEC["added_tokens"])


def bos_processor(name: str, i: int) -> dict[str, Any]:
    """Return a post-processor that puts a token in front of a text, as Llama 3 has it."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template]}


QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
BYTE_LEVEL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as Qwen3, without BOS": (SPEC, {**QWEN, "add_bos_token": False, "chat_template": CHATML}),
    "add_bos_token beside tokenizer.json": (
        SPEC,
        {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "add_bos_token": True, "chat_template": INST},
    ),
    "as Llama 3, with BOS": (
        chatml_bpe(post_processor=bos_processor("<|endoftext|>", SPEC["added_tokens"][0]["id"])),
        {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": INST},
    ),
    "tokens that absorb spaces": (
        chatml_bpe(
            added_tokens=[
                token | {"rstrip": token["content"] == "<|im_start|>", "lstrip": token["content"] == "<|im_end|>"}
                for token in SPEC["added_tokens"]
            ]
        ),
        {"eos_token": "<|im_end|>", "chat_template": CHATML},
    ),
    "tokens in tokenizer_config.json only": (
        SPEC,
        {
            "eos_token": "<|eot|>",
            "added_tokens_decoder": {str(SIZE): {"content": "<|eot|>", **FLAGS}},
            "chat_template": CHATML.replace("<|im_end|>", "<|eot|>"),
        },
    ),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_bpe(tmp_path: Path, name: str) -> None:
    spec, config = BYTE_LEVEL[name]
    assert_prompts_equal_transformers(write_hf(tmp_path, spec, tokenizer_config=config), tmp_path)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": INST}
DECODER = {"330": {"content": "<|im_end|>", **FLAGS}, "331": {"content": "<|im_start|>", **FLAGS, "rstrip": True}}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "nothing said": {"chat_template": INST},
    "BOS": {"add_bos_token": True, "bos_token": "<s>", "chat_template": INST},
    "no spaces inside": {"add_bos_token": True, "legacy": False, "chat_template": INST},
    "as Llama 2": LLAMA | {"legacy": False},
    "as Llama 1": LLAMA | {"legacy": True},
    "Llama without a space at the start": LLAMA | {"add_prefix_space": False},
    "added tokens": LLAMA | {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER, "chat_template": CHATML},
}


# As Llama's and Mistral's models: nothing is changed except for a space in front of a text.
MODEL = sentencepiece_model(
    control_symbols=["[INST]", "[/INST]"], normalization_rule_name="identity", remove_extra_whitespaces=False
)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(tmp_path: Path, name: str) -> None:
    write_sentencepiece(tmp_path, MODEL, tokenizer_config=SENTENCEPIECE[name], config={"model_type": "llama"})
    assert_prompts_equal_transformers(tmp_path, tmp_path)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_sentencepiece_with_a_tokenizer_json_beside_it(tmp_path: Path, tokenizer_class: str) -> None:
    """Its post-processor says whether BOS is added; `add_bos_token` does not count then."""
    source = write_sentencepiece(tmp_path / "a", MODEL, tokenizer_config={"add_bos_token": True})
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "b")
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "add_bos_token": False,
        "legacy": False,
        "chat_template": INST,
    }
    write_sentencepiece(tmp_path / "b", MODEL, tokenizer_config=config, config={"model_type": "llama"})
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path / "b").prefix_ids == (1,)
    assert_prompts_equal_transformers(tmp_path / "b", tmp_path)


def test_the_tiny_policy(tmp_path: Path) -> None:
    assert load_tokenizer(TINY).prefix_ids == (1,)
    assert_prompts_equal_transformers(TINY, tmp_path)


@pytest.mark.parametrize(
    ("pre_tokenizer", "declared", "has_bos"),
    [("qwen2", None, False), ("llama-bpe", None, True), ("qwen2", True, True), ("llama-bpe", False, False)],
)
def test_gguf(tmp_path: Path, pre_tokenizer: str, declared: bool | None, has_bos: bool) -> None:
    """`tokenizer.ggml.add_bos_token` or, without it, the default of llama.cpp; the converted files say the same."""
    special = [token["content"] for token in SPEC["added_tokens"]]
    names = [*SPEC["model"]["vocab"], *special]
    writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(names)
    writer.add_token_types([1] * len(SPEC["model"]["vocab"]) + [3] * len(special))
    writer.add_token_merges([" ".join(pair) for pair in SPEC["model"]["merges"]])
    writer.add_bos_token_id(names.index("<|endoftext|>"))
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_chat_template(CHATML)
    if declared is not None:
        writer.add_add_bos_token(declared)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.gguf")
    assert tokenizer.prefix_ids == ((names.index("<|endoftext|>"),) if has_bos else ())

    (tmp_path / "converted").mkdir()
    for name, data in read_tokenizer_files(tmp_path / "tokenizer.gguf").items():
        (tmp_path / "converted" / name).write_bytes(data)
    assert load_tokenizer(tmp_path / "converted").prefix_ids == tokenizer.prefix_ids
    assert_prompts_equal_transformers(tmp_path / "converted", tmp_path)
