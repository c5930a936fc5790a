from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import byte_level_alphabet, load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece

TEXTS = [
    f"{name} has {n} apples and buys {n * 3 % 17} more.\nNow {n} + {n * 3 % 17} = {n + n * 3 % 17}. 漢字 \U0001f600"
    for n, name in enumerate(["Ann", "Bob", "Zoe", "Eve"] * 20)
]
SPELLED = ["<think>", "</think>", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "<tool>", "\\boxed{", "}"]
MARKS = ["\u2581", "\u2585", "\x00", "\r\n", "\r", "\n", "  ", "\t", "e\u0301", "\ufb01", "\u212b", "\ufeff", "漢"]
any_text = st.lists(st.one_of(st.sampled_from(SPELLED + MARKS), st.text(max_size=6)), max_size=20).map("".join)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spm")
    train_sentencepiece(TEXTS, 350, directory / "tokenizer.model")
    return load_tokenizer(directory)


def byte_level_bpe(texts=TEXTS, **changes) -> dict:
    """A small tokenizer.json with everything in it that would change a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.add_tokens([tokenizers.AddedToken("<think>", lstrip=True), "</think>"])
    backend.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True)])
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    return json.loads(backend.to_str()) | changes


def write_hf(directory, spec: dict, **others):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    for name, content in others.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


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
def test_byte_vocab_is_the_pieces(kind, request):
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
def test_batch_equals_single(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids_T, sizes_D = tokenizer.encode_batch(TEXTS)
    assert ids_T.dtype == np.uint32 and sizes_D.sum() == len(ids_T)
    parts = [part.tolist() for part in np.split(ids_T, np.cumsum(sizes_D)[:-1])]
    assert parts == [tokenizer.encode(text) for text in TEXTS]
    assert [len(part) for part in tokenizer.encode_batch([])] == [0, 0] and tokenizer.encode("") == []


@pytest.mark.parametrize("wrong", ["dropped", "replaced", "given to the next text", "given to the text before"])
def test_a_batch_of_other_bytes_is_refused(spm, wrong):
    """The bytes of all texts together may be right where those of each are not."""
    first, second = spm.encode("one"), spm.encode("two ")
    batch = {
        "dropped": [first, second[:-1]],
        "replaced": [first, [*spm.encode("twa"), second[-1]]],
        "given to the next text": [first[:-1], [first[-1], *second]],
        "given to the text before": [[*first, second[0]], second[1:]],
    }[wrong]
    tokenizer = dataclasses.replace(spm, encode_ordinary=lambda texts: batch[: len(texts)])
    with pytest.raises(UserError, match="does not give back the bytes"):
        tokenizer.encode_batch(["one", "two "])


def test_ids_that_are_no_tokens(spm):
    for wrong in (-1, spm.vocab_size):
        with pytest.raises(IndexError):
            spm.token_bytes([wrong])


def test_half_a_character_decodes_to_the_replacement_character(spm):
    ids = spm.encode("\U0001f9ee")
    assert len(ids) == 4 and spm.token_bytes(np.array(ids)[:2]) == b"\xf0\x9f"
    assert spm.decode(ids[:2]) == "\ufffd"


# --- sentencepiece -----------------------------------------------------------------------------------


def test_trained_model_has_its_symbols(spm):
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


def test_training_reads_long_lines(tmp_path):
    train_sentencepiece(["wonderful " * 2000], 290, tmp_path / "tokenizer.model")
    assert len(load_tokenizer(tmp_path).encode(" wonderful")) == 1


def test_indentation_becomes_a_token(tmp_path):
    train_sentencepiece(["if so:\n        do this\n"] * 20, 285, tmp_path / "tokenizer.model")
    assert len(load_tokenizer(tmp_path).encode(" " * 8)) < 4


@pytest.mark.parametrize("size", [200, 100_000])
def test_vocabulary_that_does_not_fit(tmp_path, size):
    with pytest.raises(UserError, match=f"pretrain.vocab_size={size} does not fit"):
        train_sentencepiece(TEXTS, size, tmp_path / "tokenizer.model")


def foreign_sentencepiece(directory, **options):
    model = io.BytesIO()
    options = {"vocab_size": 330, "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", minloglevel=2, **options
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def test_foreign_model_that_normalizes_keeps_every_byte(tmp_path):
    foreign_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc_cf", user_defined_symbols=["<tool>"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.decode(processor.encode("  \ufb01  ")) == "fi", "this model should have changed the text"
    tokenizer = load_tokenizer(tmp_path)
    for text in ["  \ufb01  Ann \u2581 e\u0301\n\n", "<tool>", "ANN", *SPELLED, *MARKS]:
        assert_exact(tokenizer, text)
    assert (tokenizer.think_id, tokenizer.end_think_id, tokenizer.pad_id) == (-1, -1, tokenizer.eos_id)


def test_sentencepiece_models_that_cannot_be_used(tmp_path):
    foreign_sentencepiece(tmp_path, byte_fallback=False, vocab_size=60)
    with pytest.raises(UserError, match="no byte fallback"):
        load_tokenizer(tmp_path)
    foreign_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(UserError, match="no end-of-sentence"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="tokenizer.model is not a sentencepiece model"):
        load_tokenizer(tmp_path)


# --- byte-level BPE ----------------------------------------------------------------------------------


def test_alphabet_is_the_libraries():
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for byte in range(128):
        [(mapped, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))
        assert alphabet[mapped] == byte


def test_ids_are_those_of_the_library(bpe):
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level_bpe(truncation=None, padding=None)))
    for text in TEXTS[:5]:
        # The library puts a space in front, and here every text starts with one.
        assert bpe.encode(" " + text) == backend.encode(" " + text).ids
    assert any(len(bpe.pieces[i]) > 1 for i in bpe.encode("apples"))


def test_characters_may_be_cut_between_tokens(bpe):
    pieces = [bpe.pieces[i] for i in bpe.encode("鰯\U0001f9ee")]
    assert b"".join(pieces) == "鰯\U0001f9ee".encode() and len(pieces) > 2


def test_added_tokens(bpe):
    spec = byte_level_bpe()
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert bpe.vocab_size == max(added.values()) + 1
    assert (bpe.think_id, bpe.end_think_id) == (added["<think>"], added["</think>"])
    assert bpe.eos_id == bpe.bos_id == bpe.pad_id == added["<|endoftext|>"]
    assert bpe.special_ids == {i for content, i in added.items() if content != "<tool>"}
    assert bpe.encode("<tool>") == [added["<tool>"]] and bpe.pieces[added["<tool>"]] == b"<tool>"
    assert added["<think>"] not in bpe.encode(" <think>")


def test_end_of_text_is_the_one_the_model_names(tmp_path):
    spec = byte_level_bpe()
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    tokenizer = load_tokenizer(write_hf(tmp_path / "a", spec, tokenizer_config=named))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (added["<|im_end|>"], added["<|endoftext|>"])
    numbered = {"eos_token_id": [added["<|im_end|>"], added["<|endoftext|>"]], "bos_token_id": added["<|endoftext|>"]}
    tokenizer = load_tokenizer(write_hf(tmp_path / "b", spec, generation_config=numbered))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (added["<|im_end|>"], added["<|endoftext|>"])
    assert tokenizer.pad_id == tokenizer.eos_id
    plain = byte_level_bpe(added_tokens=[])
    with pytest.raises(UserError, match="No end-of-text token"):
        load_tokenizer(write_hf(tmp_path / "c", plain))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="expected tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    path = write_hf(tmp_path, {}) / "tokenizer.json"
    path.write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json is not JSON"):
        load_tokenizer(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        load_tokenizer(tmp_path)
    path.write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UserError, match="not a valid tokenizer.json"):
        load_tokenizer(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    spec = byte_level_bpe(pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(UserError, match="not a byte-level BPE"):
        load_tokenizer(write_hf(tmp_path, spec))
    spec = byte_level_bpe()
    del spec["model"]["vocab"]["Ā"]
    with pytest.raises(UserError, match="1 of the 256 bytes"):
        load_tokenizer(write_hf(tmp_path, spec))
    spec = byte_level_bpe()
    spec["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    )
    with pytest.raises(UserError, match="does not give back the bytes"):
        load_tokenizer(write_hf(tmp_path, spec))
