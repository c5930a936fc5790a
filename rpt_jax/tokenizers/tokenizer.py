"""Lossless tokenizers: each token is a byte string, and the tokens of a text concatenate to its UTF-8 bytes.

Rewards compare bytes and rely on this property for every text. Two formats have it: sentencepiece with byte fallback, and Hugging
Face byte-level BPE. On loading, every option that would change a text is disabled (normalization, adding and removing spaces,
parsing special tokens in a text), and each encoding is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files

THINK, END_THINK = "<think>", "</think>"

Files = dict[str, bytes]  # Content by file name.

_SPACE_MARK = "\u2581"  # Stands for a space in the pieces of sentencepiece.
# Bytes that a byte-level BPE need not have (SmolLM2's does not): those that never occur in UTF-8, first bytes of unassigned
# planes, and control characters. Encoding a text with such a byte raises an error.
_OPTIONAL_BYTES = {
    *range(0x01, 0x09),
    0x0B,
    0x0C,
    *range(0x0E, 0x20),
    0x7F,
    0xC0,
    0xC1,
    0xF1,
    0xF2,
    *range(0xF5, 0x100),
}
# Names of the end-of-text token, for tokenizers whose files do not specify it.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<｜end▁of▁sentence｜>")
# Encoded when a tokenizer is loaded, as a test that it is lossless.
_PROBE = f"  a\u00e9\ufb01e\u0301 {_SPACE_MARK}\r\n\t\x00 {THINK}</s>\U0001f9ee 12.50 "


class ByteVocab(NamedTuple):
    """The byte strings of all tokens as arrays.

    Attributes:
      bytes_VxX: uint8; row v has the bytes of token v, padded with zeros.
      lengths_V: int32, number of bytes; 0 for special tokens.
    """

    bytes_VxX: np.ndarray
    lengths_V: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A lossless tokenizer; use `load_tokenizer` to create one.

    Attributes:
      pieces: byte string of each token; empty for special tokens.
      bos_id: id of the begin-of-text token; `eos_id` if the tokenizer has none.
      eos_id: id of the end-of-text token.
      pad_id: id of the padding token; `eos_id` if the tokenizer has none.
      think_id: id of <think>; -1 if it is not a special token.
      end_think_id: id of </think>; -1 if it is not a special token.
      stop_ids: ids that end a response: `eos_id`, and those in generation_config.json.
      special_ids: ids of tokens without bytes; no text is encoded to them.
      unused_ids: ids below `vocab_size` that are not tokens.
      normalizer: name of the normalizer in tokenizer.json, such as "NFC", which is disabled here; "" for none.
      fingerprint: SHA-256 of tokenizer.model or tokenizer.json, in hexadecimal.
      source: path of that file, or of the GGUF file.
      encode_ordinary: function from texts to their token ids, without any check.
    """

    pieces: tuple[bytes, ...] = dataclasses.field(repr=False)
    bos_id: int
    eos_id: int
    pad_id: int
    think_id: int
    end_think_id: int
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    unused_ids: frozenset[int]
    normalizer: str
    fingerprint: str
    source: str
    encode_ordinary: Callable[[Sequence[str]], list[list[int]]] = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including unused ones."""
        return len(self.pieces)

    def absent_ids(self, size: int) -> tuple[int, ...]:
        """Return the ids without a token in a policy's vocabulary of `size` ids: unused and padding ids."""
        return (*sorted(self.unused_ids), *range(self.vocab_size, size))

    @functools.cached_property
    def byte_vocab(self) -> ByteVocab:
        """The byte strings of all tokens as arrays."""
        lengths_V = np.array([len(piece) for piece in self.pieces], np.int32)
        bytes_VxX = np.zeros((len(self.pieces), max(1, int(lengths_V.max()))), np.uint8)
        filled_VxX = np.arange(bytes_VxX.shape[1]) < lengths_V[:, None]
        bytes_VxX[filled_VxX] = np.frombuffer(b"".join(self.pieces), np.uint8)
        return ByteVocab(bytes_VxX=bytes_VxX, lengths_V=lengths_V)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text: without added tokens, and with the names of special tokens as ordinary text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode D texts.

        Returns: the concatenated token ids of all texts, uint32 [T], and the number of tokens of each text, int64 [D].

        Raises: UserError if the tokens of a text do not have exactly its bytes.
        """
        batch = self.encode_ordinary(texts)
        sizes_D = np.fromiter(map(len, batch), np.int64, len(batch))
        ids_T = np.fromiter(itertools.chain.from_iterable(batch), np.uint32, sizes_D.sum())

        # The encoding is exact if the concatenated bytes are right and each text has the right number of them.
        ends_T = np.concatenate([[0], np.cumsum(self.byte_vocab.lengths_V[ids_T])])
        ends_D = ends_T[np.cumsum(sizes_D)]
        expected = [text.encode("utf-8") for text in texts]
        same_lengths = ends_D.tolist() == list(itertools.accumulate(map(len, expected)))
        if not same_lengths or self._concatenated_bytes(ids_T) != b"".join(expected):
            # Find the text, for the message.
            for text, data, ids in zip(texts, expected, batch, strict=True):
                if self.token_bytes(ids) != data:
                    raise UserError(
                        f"{self.source} is not lossless: decoding the tokens of {text[:60]!r} gives other bytes. Use a "
                        "byte-level BPE, or sentencepiece with byte fallback.",
                        field=self.source,
                    )
        return ids_T, sizes_D

    @functools.cached_property
    def _concatenated_pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated bytes of all tokens of the vocabulary, and where each token begins."""
        lengths_V = self.byte_vocab.lengths_V
        return np.frombuffer(b"".join(self.pieces), np.uint8), np.cumsum(lengths_V) - lengths_V

    def _concatenated_bytes(self, ids_T: np.ndarray) -> bytes:
        """Return the same as `token_bytes`, ten times as fast for many ids."""
        pieces, starts_V = self._concatenated_pieces
        lengths_T = self.byte_vocab.lengths_V[ids_T]
        shifts_T = starts_V[ids_T] - np.cumsum(lengths_T) + lengths_T
        indices = np.repeat(shifts_T, lengths_T)
        indices += np.arange(len(indices))
        return pieces[indices].tobytes()

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the concatenated bytes of tokens. Raises: IndexError for an id outside of the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise IndexError(f"{min(ids)} is not a token id")
        return b"".join(map(self.pieces.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, with U+FFFD for invalid UTF-8 and without special tokens."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load `tokenizer.model` (sentencepiece) or, if it does not exist, `tokenizer.json` (Hugging Face byte-level BPE).

    Args:
      source: the directory of these files, or a GGUF file.

    Raises: UserError if neither file exists, or if it is damaged or cannot represent every text.
    """
    files = read_tokenizer_files(source)
    loaders = {"tokenizer.model": _load_sentencepiece, "tokenizer.json": _load_byte_level_bpe}
    for name, loader in loaders.items():
        if name in files:
            path = Path(source) / name if Path(source).is_dir() else Path(source)
            tokenizer = loader(path, files[name], files)
            tokenizer.encode(_PROBE)
            return tokenizer
    raise UserError(
        f"'{source}' has no tokenizer: expected {' or '.join(loaders)}. Copy it from the model's repository.",
        field=str(source),
    )


def _load_sentencepiece(path: Path, data: bytes, files: Files) -> Tokenizer:
    """Load a sentencepiece model with its normalizer disabled."""
    # Concatenated protocol buffers are merged field by field, and the last value of a field wins. This overrides the normalizer
    # (field 3) with: no character map, no dummy prefix, no removal of whitespace, and escaped spaces.
    identity = b"\x1a\x08" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data + identity)
        size = processor.vocab_size()
        names = [processor.id_to_piece(i) for i in range(size)]
        byte_ids = {int(name[1:-1], 16): i for i, name in enumerate(names) if processor.is_byte(i)}
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a sentencepiece model, or it is damaged: {error}.", field=str(path)) from error
    if len(byte_ids) < 256:
        raise UserError(
            f"{path} cannot represent every text, because it has only {len(byte_ids)} of 256 byte tokens. Train it with "
            "byte_fallback=True.",
            field=str(path),
        )
    eos_id = processor.eos_id()
    if eos_id < 0:
        raise UserError(f"{path} has no end-of-sentence token. Train it with an eos_id.", field=str(path))
    special_ids = frozenset(i for i in range(size) if processor.is_control(i) or processor.is_unknown(i))
    byte_of = {i: bytes([byte]) for byte, i in byte_ids.items()}

    def control_id(name: str) -> int:
        i = processor.piece_to_id(name)  # The id of the unknown token if there is no such piece.
        return i if processor.is_control(i) else -1

    def piece(i: int) -> bytes:
        if i in special_ids:
            return b""
        return byte_of.get(i) or names[i].replace(_SPACE_MARK, " ").encode("utf-8")

    return Tokenizer(
        pieces=tuple(piece(i) for i in range(size)),
        bos_id=processor.bos_id() if processor.bos_id() >= 0 else eos_id,
        eos_id=eos_id,
        pad_id=processor.pad_id() if processor.pad_id() >= 0 else eos_id,
        think_id=control_id(THINK),
        end_think_id=control_id(END_THINK),
        stop_ids=_stop_ids(path, files, eos_id, size),
        special_ids=special_ids,
        unused_ids=frozenset(i for i in range(size) if processor.is_unused(i)),
        normalizer="",
        fingerprint=hashlib.sha256(data).hexdigest(),
        source=str(path),
        encode_ordinary=functools.partial(
            _encode_sentencepiece, processor, [byte_ids[byte] for byte in _SPACE_MARK.encode("utf-8")]
        ),
    )


def _encode_sentencepiece(
    processor: sentencepiece.SentencePieceProcessor, space_mark_ids: list[int], texts: Sequence[str]
) -> list[list[int]]:
    # Sentencepiece would decode a space mark in the text itself as a space: encode such a mark as bytes instead.
    parts_of_texts = [text.split(_SPACE_MARK) for text in texts]
    # One call for all texts, which runs in several threads unless there is a process for every core already.
    num_threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
    encoded = iter(processor.encode(list(itertools.chain.from_iterable(parts_of_texts)), num_threads=num_threads))
    batch = []
    for parts in parts_of_texts:
        ids = next(encoded)
        for _ in parts[1:]:
            ids += space_mark_ids + next(encoded)
        batch.append(ids)
    return batch


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte for each character in the vocabulary of a byte-level BPE (as in GPT-2).

    Printable Latin-1 characters stand for their own byte; U+0100 to U+0143 stand for the other 68 bytes, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _load_byte_level_bpe(path: Path, data: bytes, files: Files) -> Tokenizer:
    """Load a tokenizer.json with its normalizer disabled: that of Qwen models is NFC, which would change texts."""
    # Parse the file, and check that it is a byte-level BPE with a token for every byte.
    spec = _parse_json(path, data)
    try:
        tokenizers.Tokenizer.from_str(data.decode("utf-8"))  # Validates the structure, which the code below relies on.
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself.
        raise UserError(
            f"{path} is not a valid tokenizer.json: {error}. Download or export it again.", field=str(path)
        ) from error
    alphabet = byte_level_alphabet()
    vocab = spec["model"]["vocab"]
    if spec["model"].get("type") != "BPE" or not _has_byte_level(spec.get("pre_tokenizer")):
        raise UserError(f"{path} is not a byte-level BPE, the only kind of tokenizer.json supported.", field=str(path))
    if missing := sum(character not in vocab for character, byte in alphabet.items() if byte not in _OPTIONAL_BYTES):
        raise UserError(
            f"{path} cannot represent every text: {missing} of the 256 bytes have no token.", field=str(path)
        )

    # Collect the ids of all tokens. Added tokens may be in the vocabulary, too.
    added = {token["content"]: token for token in spec.get("added_tokens", ())}
    ids = vocab | {content: token["id"] for content, token in added.items()}
    special = _special_ids(path, files, ids)
    special_ids = frozenset(
        [*special.values(), *(token["id"] for token in added.values() if token["special"])]
        + [added[name]["id"] for name in (THINK, END_THINK) if name in added]
    )

    def piece(content: str) -> bytes:
        if ids[content] in special_ids:
            return b""
        if content in added or any(character not in alphabet for character in content):
            return content.encode("utf-8")
        return bytes(alphabet[character] for character in content)

    # Find the byte string of each id; ids without a token stay empty.
    pieces = [b""] * (max(ids.values()) + 1)
    for content, i in ids.items():
        pieces[i] = piece(content)
    return Tokenizer(
        pieces=tuple(pieces),
        **special,
        stop_ids=_stop_ids(path, files, special["eos_id"], len(pieces)),
        unused_ids=frozenset(range(len(pieces))) - frozenset(ids.values()),
        normalizer=_normalizer_name(spec.get("normalizer")),
        think_id=added[THINK]["id"] if THINK in added else -1,
        end_think_id=added[END_THINK]["id"] if END_THINK in added else -1,
        special_ids=special_ids,
        fingerprint=hashlib.sha256(data).hexdigest(),
        source=str(path),
        encode_ordinary=functools.partial(_encode_byte_level_bpe, _exact_backend(spec, special_ids)),
    )


def _exact_backend(spec: dict[str, Any], special_ids: frozenset[int]) -> tokenizers.Tokenizer:
    """Build the library's tokenizer without anything that would change a text or parse special tokens in it."""
    # `encode_special_tokens` below applies only to tokens that are marked as special; <think> of DeepSeek-R1 is not.
    added = [
        token | {"lstrip": False, "rstrip": False, "special": token["id"] in special_ids}
        for token in spec.get("added_tokens", ())
    ]
    exact = spec | {
        "added_tokens": added,
        "normalizer": None,
        "truncation": None,
        "padding": None,
        "pre_tokenizer": _without_prefix_space(spec["pre_tokenizer"]),
        "model": spec["model"] | {"dropout": None},
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(exact))
    backend.encode_special_tokens = True
    return backend


def _encode_byte_level_bpe(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _has_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if not pre_tokenizer:
        return False
    return pre_tokenizer["type"] == "ByteLevel" or any(map(_has_byte_level, pre_tokenizer.get("pretokenizers", ())))


def _without_prefix_space(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the pre-tokenizer with `add_prefix_space` turned off in all of its parts."""
    changed = dict(pre_tokenizer)
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "pretokenizers" in changed:
        changed["pretokenizers"] = [_without_prefix_space(part) for part in changed["pretokenizers"]]
    return changed


def _normalizer_name(normalizer: dict[str, Any] | None) -> str:
    if not normalizer:
        return ""
    parts = normalizer.get("normalizers")
    return normalizer["type"] if parts is None else "+".join(filter(None, map(_normalizer_name, parts)))


def _special_ids(path: Path, files: Files, ids: dict[str, int]) -> dict[str, int]:
    """Return `bos_id`, `eos_id` and `pad_id`.

    They are read from tokenizer_config.json or generation_config.json; `eos_id` is also found by its usual names.

    Args:
      path: of tokenizer.json, for messages.
      files: content of the tokenizer's files by name.
      ids: token -> id.
    """
    names = _parse_optional(path, files, "tokenizer_config.json")
    numbers = _parse_optional(path, files, "generation_config.json")

    def find(kind: str) -> int | None:
        name = names.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str) and name in ids:
            return ids[name]
        number = numbers.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if type(number) is int and number in ids.values() else None

    eos_id = find("eos")
    if eos_id is None:
        eos_id = next((ids[name] for name in _EOS_NAMES if name in ids), None)
    if eos_id is None:
        raise UserError(
            f"{path} has no end-of-text token. Set eos_token in tokenizer_config.json in the same directory.",
            field=str(path),
        )
    bos_id = find("bos")
    pad_id = find("pad")
    return {
        "bos_id": eos_id if bos_id is None else bos_id,
        "eos_id": eos_id,
        "pad_id": eos_id if pad_id is None else pad_id,
    }


def _stop_ids(path: Path, files: Files, eos_id: int, size: int) -> tuple[int, ...]:
    """Return `eos_id` and the other ids that end a response according to generation_config.json."""
    others = _parse_optional(path, files, "generation_config.json").get("eos_token_id")
    others = others if isinstance(others, list) else [others]
    known = [i for i in others if type(i) is int and 0 <= i < size]
    return tuple(dict.fromkeys([eos_id, *known]))


def _parse_optional(path: Path, files: Files, name: str) -> dict[str, Any]:
    return _parse_json(path.with_name(name), files[name]) if name in files else {}


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download or export it again.", field=str(path)) from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must contain a JSON object, not a {type(parsed).__name__}.", field=str(path))
    return parsed
