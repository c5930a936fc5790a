"""Small tokenizers, and texts that are hard to tokenize without loss."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

TEXTS = [
    f"{name} has {n} apples and buys {n * 3 % 17} more.\nNow {n} + {n * 3 % 17} = {n + n * 3 % 17}. 漢字 \U0001f600"
    for n, name in enumerate(["Ann", "Bob", "Zoe", "Eve"] * 20)
]
# Names of tokens as ordinary text, and characters that normalizers or decoders of tokenizers change.
TOKEN_NAMES = ["<think>", "</think>", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "<tool>", "\\boxed{", "}"]
FRAGILE = ["\u2581", "\u2585", "\x00", "\r\n", "\r", "\n", "  ", "\t", "e\u0301", "\ufb01", "\u212b", "\ufeff", "漢"]
any_text = st.lists(st.one_of(st.sampled_from(TOKEN_NAMES + FRAGILE), st.text(max_size=6)), max_size=20).map("".join)


def byte_level_bpe(texts: Iterable[str] = TEXTS, **changes: Any) -> dict[str, Any]:
    """Return the content of a small tokenizer.json with every option that changes texts turned on.

    Args:
      texts: what it is trained on.
      changes: values of the file's top-level keys that are replaced.
    """
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


def write_hf(directory: Path, spec: dict[str, Any], **others: Any) -> Path:
    """Write `spec` as tokenizer.json, and other JSON files by name without extension; return the directory."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    for name, content in others.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def sentencepiece_model(**options: Any) -> bytes:
    """Return a small sentencepiece model with the defaults of the library, which change texts.

    Args:
      options: of the trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 330, "byte_fallback": True} | options,
    )
    return model.getvalue()


def write_sentencepiece(directory: Path, model: bytes, **others: Any) -> Path:
    """Write `model` as tokenizer.model, and other JSON files by name without extension; return the directory."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    for name, content in others.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def chatml_bpe(**changes: Any) -> dict[str, Any]:
    """Return the content of a small tokenizer.json as Qwen's: the tokens of ChatML, NFC, and no begin-of-text token.

    Args:
      changes: values of the file's top-level keys that are replaced.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    return json.loads(backend.to_str()) | changes
