"""Tokens that other files add to a tokenizer's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.tokenizers import any_text, chatml_bpe, sentencepiece_model, write_hf, write_sentencepiece

MODEL = sentencepiece_model(control_symbols=["[INST]"], user_defined_symbols=["<unused0>", "<unused1>"])
SIZE = 330
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
ADDED = {"<|im_end|>": SIZE, "<|im_start|>": SIZE + 1, "<think>": SIZE + 2, "</think>": SIZE + 3, "<tool>": SIZE + 4}


def decoder(ids: dict[str, int], special: tuple[str, ...]) -> dict[str, Any]:
    """Return `added_tokens_decoder` of a tokenizer_config.json."""
    return {str(i): {"content": name, "special": name in special, **FLAGS} for name, i in ids.items()}


def write(directory: Path, form: str) -> Path:
    """Write the sentencepiece model with the tokens of ADDED in one of the forms that Hugging Face uses."""
    special = ("<|im_end|>", "<|im_start|>")
    if form == "added_tokens_decoder":
        config = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder(ADDED, special)}
        return write_sentencepiece(directory, MODEL, tokenizer_config=config)
    token_map = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
    return write_sentencepiece(directory, MODEL, added_tokens=ADDED, special_tokens_map=token_map)


@pytest.fixture(scope="module", params=["added_tokens_decoder", "added_tokens.json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(tmp_path_factory.mktemp("added"), request.param))


def test_tokens_beside_a_sentencepiece_model_are_found(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE + len(ADDED)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, ADDED["<|im_end|>"])
    assert (tokenizer.think_id, tokenizer.end_think_id) == (ADDED["<think>"], ADDED["</think>"])
    assert tokenizer.stop_ids == (ADDED["<|im_end|>"],)
    special = {i for name, i in ADDED.items() if name != "<tool>"}
    assert special < tokenizer.special_ids and ADDED["<tool>"] not in tokenizer.special_ids
    assert {tokenizer.special_names[i]: i for i in special}.items() <= ADDED.items()
    assert not tokenizer.unused_ids


@given(st.lists(st.one_of(any_text, st.sampled_from([*ADDED, "[INST]", "<unused0>"])), max_size=8).map("".join))
@settings(deadline=None, max_examples=200)
def test_a_text_with_added_tokens_keeps_every_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes(ids) == text.encode()
    assert not tokenizer.special_ids & set(ids)
    assert ids.count(ADDED["<tool>"]) == text.count("<tool>"), "an added token with text is one token"


def test_a_template_has_added_tokens_as_single_ids(tokenizer: Tokenizer) -> None:
    start, end = ADDED["<|im_start|>"], ADDED["<|im_end|>"]
    ids = tokenizer.encode_template("<|im_start|>user\n<|im_end|><tool>[INST]", False)
    assert (ids[0], ids[-3:]) == (start, [end, ADDED["<tool>"], 3]) and tokenizer.pieces[3] == b""
    assert tokenizer.decode(ids[1:-3]).strip() == "user"


def test_a_reserved_token_is_renamed(tmp_path: Path) -> None:
    """Many models reserve tokens for later, and name them in tokenizer_config.json."""
    reserved = load_tokenizer(write_sentencepiece(tmp_path, MODEL)).encode("<unused0>")
    assert len(reserved) == 1, "the model should have the reserved token"
    config = {"added_tokens_decoder": decoder({"<|im_start|>": reserved[0]}, ("<|im_start|>",))}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, MODEL, tokenizer_config=config))
    assert tokenizer.vocab_size == SIZE and tokenizer.special_names[reserved[0]] == "<|im_start|>"
    assert tokenizer.encode_template("<|im_start|>", False) == reserved
    for text in ("<unused0>", "<unused1>", "<|im_start|>"):
        assert tokenizer.token_bytes(tokenizer.encode(text)) == text.encode()


def test_a_user_defined_think_token_is_special(tmp_path: Path) -> None:
    model = sentencepiece_model(user_defined_symbols=["<think>", "</think>"])
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model))
    assert (tokenizer.think_id, tokenizer.end_think_id) == (3, 4)
    assert tokenizer.encode_template("</think>", False) == [4]
    assert tokenizer.token_bytes(tokenizer.encode("a </think> b")) == b"a </think> b"


@pytest.mark.parametrize(
    "ids", [{"<a>": SIZE + 1}, {"<a>": -1}, {"<a>": 10**12}, {"</s>": SIZE}, {"<a>": 4, "<b>": 4}, {"<a>": 9}]
)
@pytest.mark.parametrize("form", ["sentencepiece", "byte-level BPE"])
def test_added_tokens_without_a_place_in_the_vocabulary_are_refused(
    tmp_path: Path, ids: dict[str, int], form: str
) -> None:
    """Their ids leave a gap, or contradict the vocabulary or each other. 9 is a byte or a letter, 4 is reserved or a letter."""
    if form == "sentencepiece":
        write_sentencepiece(tmp_path, MODEL, added_tokens=ids)
    else:
        named = {"</s>": "<|im_end|>"}
        write_hf(tmp_path, chatml_bpe(), added_tokens={named.get(name, name): i for name, i in ids.items()})
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field.startswith(str(tmp_path))


def test_tokens_beside_a_tokenizer_json_are_found(tmp_path: Path) -> None:
    size = load_tokenizer(write_hf(tmp_path / "without", chatml_bpe())).vocab_size
    added = {"<|eot|>": size, "<tool>": size + 1}
    config = {"eos_token": "<|eot|>", "added_tokens_decoder": decoder(added, ("<|eot|>",))}
    tokenizer = load_tokenizer(write_hf(tmp_path / "with", chatml_bpe(), tokenizer_config=config))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 2, size)
    assert tokenizer.encode("<tool>") == [size + 1] and tokenizer.encode_template("<|eot|><tool>", True) == [
        *added.values()
    ]
    assert tokenizer.token_bytes(tokenizer.encode("<|eot|>")) == b"<|eot|>"


def test_added_tokens_change_the_fingerprint(tmp_path: Path) -> None:
    plain = load_tokenizer(write_sentencepiece(tmp_path / "plain", MODEL)).fingerprint
    restated = {"added_tokens_decoder": decoder({"<s>": 1, "</s>": 2}, ("<s>", "</s>"))}
    same = load_tokenizer(write_sentencepiece(tmp_path / "same", MODEL, tokenizer_config=restated)).fingerprint
    changed = load_tokenizer(write(tmp_path / "changed", "added_tokens.json")).fingerprint
    assert plain == same != changed
