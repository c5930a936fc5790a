"""Tokenizers: losslessness, training, and the two file formats."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from tokenizers import pre_tokenizers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import byte_level_alphabet, load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers.tokenizers import (
    FRAGILE,
    TEXTS,
    TOKEN_NAMES,
    any_text,
    byte_level_bpe,
    sentencepiece_model,
    write_hf,
    write_sentencepiece,
)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spm")
    train_sentencepiece(TEXTS, 350, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load_tokenizer(write_hf(tmp_path_factory.mktemp("bpe"), byte_level_bpe()))


def assert_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)


@given(any_text)
@settings(deadline=None, max_examples=400)
def test_sentencepiece_keeps_every_byte(spm, text):
    assert_exact(spm, text)


@given(any_text)
@settings(deadline=None, max_examples=400)
def test_byte_level_bpe_keeps_every_byte(bpe, text):
    assert_exact(bpe, text)


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_byte_vocab_has_the_bytes_of_all_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    bytes_VxX, lengths_V = tokenizer.byte_vocab
    assert (bytes_VxX.dtype, lengths_V.dtype) == (np.uint8, np.int32)
    assert bytes_VxX.shape == (tokenizer.vocab_size, lengths_V.max()) and lengths_V.shape == (tokenizer.vocab_size,)
    for i, piece in enumerate(tokenizer.pieces):
        assert bytes_VxX[i, : lengths_V[i]].tobytes() == piece and not bytes_VxX[i, lengths_V[i] :].any()
    assert {i for i, length in enumerate(lengths_V) if length == 0} == tokenizer.special_ids
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} <= tokenizer.special_ids
    assert {tokenizer.think_id, tokenizer.end_think_id} <= tokenizer.special_ids


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_encoding_a_batch_equals_encoding_each_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids_T, sizes_D = tokenizer.encode_batch(TEXTS)
    assert ids_T.dtype == np.uint32 and sizes_D.sum() == len(ids_T)
    parts = [part.tolist() for part in np.split(ids_T, np.cumsum(sizes_D)[:-1])]
    assert parts == [tokenizer.encode(text) for text in TEXTS]
    assert [len(part) for part in tokenizer.encode_batch([])] == [0, 0] and tokenizer.encode("") == []


@pytest.mark.parametrize("wrong", ["dropped", "replaced", "moved to the next text", "moved to the previous text"])
def test_an_encoding_with_wrong_bytes_is_refused(spm, wrong):
    """Also if the concatenated bytes of all texts are right, but not those of each text."""
    first, second = spm.encode("one"), spm.encode("two ")
    batch = {
        "dropped": [first, second[:-1]],
        "replaced": [first, [*spm.encode("twa"), second[-1]]],
        "moved to the next text": [first[:-1], [first[-1], *second]],
        "moved to the previous text": [[*first, second[0]], second[1:]],
    }[wrong]
    tokenizer = dataclasses.replace(spm, encode_ordinary=lambda texts: batch[: len(texts)])
    with pytest.raises(UserError) as raised:
        tokenizer.encode_batch(["one", "two "])
    assert raised.value.field == tokenizer.source


def test_an_id_outside_of_the_vocabulary_is_refused(spm):
    for wrong in (-1, spm.vocab_size):
        with pytest.raises(IndexError):
            spm.token_bytes([wrong])


def test_a_partial_character_decodes_to_the_replacement_character(spm):
    ids = spm.encode("\U0001f9ee")
    assert len(ids) == 4 and spm.token_bytes(np.array(ids)[:2]) == b"\xf0\x9f"
    assert spm.decode(ids[:2]) == "\ufffd"


# --- sentencepiece ---


def test_a_trained_model_has_separate_tokens_for_symbols_and_digits(spm):
    assert spm.vocab_size == 350
    assert (spm.pad_id, spm.bos_id, spm.eos_id, spm.think_id, spm.end_think_id) == (0, 1, 2, 4, 5)
    pieces = [spm.pieces[i] for i in spm.encode("\\boxed{12}\n")]
    assert pieces == [b"\\boxed{", b"1", b"2", b"}", b"\n"]
    assert len(spm.encode(" apples")) < 3, "frequent words should have been merged"
    assert all(sum(character in b"0123456789" for character in piece) <= 1 for piece in spm.pieces)


def test_training_is_deterministic(tmp_path, spm):
    train_sentencepiece(iter(TEXTS), 350, tmp_path / "new" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "new").fingerprint == spm.fingerprint
    train_sentencepiece(TEXTS, 349, tmp_path / "new" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "new").fingerprint != spm.fingerprint


def test_training_uses_long_lines(tmp_path):
    train_sentencepiece(["wonderful " * 2000], 290, tmp_path / "tokenizer.model")
    assert len(load_tokenizer(tmp_path).encode(" wonderful")) == 1


def test_training_merges_indentation(tmp_path):
    train_sentencepiece(["if so:\n        do this\n"] * 20, 285, tmp_path / "tokenizer.model")
    assert len(load_tokenizer(tmp_path).encode(" " * 8)) < 4


@pytest.mark.parametrize("size", [200, 100_000])
def test_an_unsuitable_vocabulary_size_is_refused(tmp_path, size):
    with pytest.raises(UserError) as raised:
        train_sentencepiece(TEXTS, size, tmp_path / "tokenizer.model")
    assert raised.value.field == "pretrain.vocab_size"
    # The message tells a size that works, and no option of sentencepiece.
    assert "--" not in str(raised.value)
    [possible] = re.findall(r"at (?:least|most) (\d+)", str(raised.value))
    train_sentencepiece(TEXTS, int(possible), tmp_path / "tokenizer.model")


def test_a_model_trained_with_normalization_keeps_every_byte(tmp_path):
    model = sentencepiece_model(normalization_rule_name="nmt_nfkc_cf", user_defined_symbols=["<tool>"])
    write_sentencepiece(tmp_path, model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.decode(processor.encode("  \ufb01  ")) == "fi", "the library itself should change this text"
    tokenizer = load_tokenizer(tmp_path)
    for text in ["  \ufb01  Ann \u2581 e\u0301\n\n", "<tool>", "ANN", *TOKEN_NAMES, *FRAGILE]:
        assert_exact(tokenizer, text)
    assert (tokenizer.think_id, tokenizer.end_think_id, tokenizer.pad_id) == (-1, -1, tokenizer.eos_id)


def assert_tokenizer_is_refused(path, message: str | None = None) -> None:
    """Assert that loading the tokenizer of a directory raises an error about the file at `path`."""
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(path.parent)
    assert raised.value.field == str(path)


def test_a_sentencepiece_model_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_sentencepiece(tmp_path, sentencepiece_model(byte_fallback=False, vocab_size=60))
    assert_tokenizer_is_refused(path, "byte_fallback")
    write_sentencepiece(tmp_path, sentencepiece_model(eos_id=-1))
    assert_tokenizer_is_refused(path, "eos_id")
    path.write_bytes(b"not a model")
    assert_tokenizer_is_refused(path)


# --- byte-level BPE ---


def test_the_byte_alphabet_equals_that_of_the_library():
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for byte in range(128):
        [(mapped, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))
        assert alphabet[mapped] == byte


def test_token_ids_equal_those_of_the_library(bpe):
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level_bpe(truncation=None, padding=None)))
    for text in TEXTS[:5]:
        # The library adds a space in front of a text unless it begins with one.
        assert bpe.encode(" " + text) == backend.encode(" " + text).ids
    assert any(len(bpe.pieces[i]) > 1 for i in bpe.encode("apples"))


def test_a_character_may_be_split_over_several_tokens(bpe):
    pieces = [bpe.pieces[i] for i in bpe.encode("鰯\U0001f9ee")]
    assert b"".join(pieces) == "鰯\U0001f9ee".encode() and len(pieces) > 2


def test_added_tokens_are_special_except_those_with_text(bpe):
    spec = byte_level_bpe()
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert bpe.vocab_size == max(added.values()) + 1
    assert (bpe.think_id, bpe.end_think_id) == (added["<think>"], added["</think>"])
    assert bpe.eos_id == bpe.bos_id == bpe.pad_id == added["<|endoftext|>"]
    assert bpe.special_ids == {i for content, i in added.items() if content != "<tool>"}
    assert bpe.encode("<tool>") == [added["<tool>"]] and bpe.pieces[added["<tool>"]] == b"<tool>"
    assert added["<think>"] not in bpe.encode(" <think>")


def test_special_tokens_are_read_from_the_config_files(tmp_path):
    spec = byte_level_bpe()
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    tokenizer = load_tokenizer(write_hf(tmp_path / "a", spec, tokenizer_config=named))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (added["<|im_end|>"], added["<|endoftext|>"])
    numbered = {"eos_token_id": [added["<|im_end|>"], added["<|endoftext|>"]], "bos_token_id": added["<|endoftext|>"]}
    tokenizer = load_tokenizer(write_hf(tmp_path / "b", spec, generation_config=numbered))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (added["<|im_end|>"], added["<|endoftext|>"])
    assert tokenizer.pad_id == tokenizer.eos_id


def test_a_tokenizer_without_end_of_text_token_is_refused(tmp_path):
    write_hf(tmp_path, byte_level_bpe(added_tokens=[]))
    assert_tokenizer_is_refused(tmp_path / "tokenizer.json", "eos_token")


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field == str(tmp_path)


@pytest.mark.parametrize("text", ['{"model": ', "[]", '{"model": {"type": "BPE"}}'])
def test_an_invalid_tokenizer_json_is_refused(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    assert_tokenizer_is_refused(path)


def test_a_tokenizer_that_is_not_a_byte_level_bpe_is_refused(tmp_path):
    write_hf(tmp_path, byte_level_bpe(pre_tokenizer={"type": "Whitespace"}))
    assert_tokenizer_is_refused(tmp_path / "tokenizer.json", "byte-level BPE")


def test_a_byte_level_bpe_without_a_byte_is_refused(tmp_path):
    spec = byte_level_bpe()
    del spec["model"]["vocab"]["Ā"]
    write_hf(tmp_path, spec)
    assert_tokenizer_is_refused(tmp_path / "tokenizer.json", "1 of the 256 bytes")


def test_a_byte_level_bpe_that_drops_spaces_is_refused(tmp_path):
    spec = byte_level_bpe()
    spec["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    )
    write_hf(tmp_path, spec)
    assert_tokenizer_is_refused(tmp_path / "tokenizer.json", "lossless")
