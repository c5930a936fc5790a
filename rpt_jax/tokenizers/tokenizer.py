"""Tokenizers as raw bytes: whatever a tokenizer does inside, here it is a table of what every token stands for.

The reward compares bytes, so one property carries everything: the bytes of the tokens of a text, joined, are the
UTF-8 bytes of the text, for any text. Two formats reduce to it, sentencepiece with byte fallback and Hugging Face
byte-level BPE. What either would change in a text (normalization, an added or removed space, a special token that the
text merely spells) is switched off on loading, and every encoding is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files

THINK, END_THINK = "<think>", "</think>"

Files = dict[str, bytes]  # By name.

_SPACE_MARK = "\u2581"  # What sentencepiece writes for a space in its pieces.
# Bytes that a byte-level BPE may lack, as SmolLM2's does: those that no UTF-8 has, the first bytes of planes without
# characters, and control characters. A text that holds one all the same is refused as it is encoded.
_DISPENSABLE = {*range(0x01, 0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<｜end▁of▁sentence｜>")
_PROBE = f"  a\u00e9\ufb01e\u0301 {_SPACE_MARK}\r\n\t\x00 {THINK}</s>\U0001f9ee 12.50 "


class ByteVocab(NamedTuple):
    """The raw bytes of every token: row v holds `lengths_V[v]` bytes and then zeros; special tokens have length 0."""

    bytes_VxX: np.ndarray  # uint8
    lengths_V: np.ndarray  # int32


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Made by `load_tokenizer`.

    `pieces` are the bytes of every token. `bos_id` and `pad_id` fall back to `eos_id` where the model has none;
    `think_id` and `end_think_id` are then -1. `stop_ids` end a response: `eos_id`, and others that
    generation_config.json names. `special_ids` have no bytes, and no text encodes to them. `unused_ids` are no tokens at
    all. `normalizer` names what the file would do to a text before splitting it, such as NFC, and is not done here.
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
    fingerprint: str  # SHA-256 of tokenizer.model or tokenizer.json, in hexadecimal.
    source: str  # That file, or the GGUF file that has it in its header.
    encode_ordinary: Callable[[Sequence[str]], list[list[int]]] = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def absent_ids(self, size: int) -> tuple[int, ...]:
        """Ids of a policy's vocabulary of `size` that stand for no token: `unused_ids`, and what it is padded with."""
        return *sorted(self.unused_ids), *range(self.vocab_size, size)

    @functools.cached_property
    def byte_vocab(self) -> ByteVocab:
        lengths_V = np.array([len(piece) for piece in self.pieces], np.int32)
        bytes_VxX = np.zeros((len(self.pieces), max(1, int(lengths_V.max()))), np.uint8)
        filled_VxX = np.arange(bytes_VxX.shape[1]) < lengths_V[:, None]
        bytes_VxX[filled_VxX] = np.frombuffer(b"".join(self.pieces), np.uint8)
        return ByteVocab(bytes_VxX, lengths_V)

    def encode(self, text: str) -> list[int]:
        """Return token ids whose bytes are exactly those of `text`; nothing is added, and nothing in it is special."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` for many texts at once: all their ids in a row, uint32 [T], and how many are of each text, int64 [D].

        Raises: UserError, where the tokenizer cannot express a text exactly.
        """
        batch = self.encode_ordinary(texts)
        sizes_D = np.fromiter(map(len, batch), np.int64, len(batch))
        ids_T = np.fromiter(itertools.chain.from_iterable(batch), np.uint32, sizes_D.sum())
        # As many bytes as each text has, and together the same ones: so each has its own.
        ends_T = np.concatenate([[0], np.cumsum(self.byte_vocab.lengths_V[ids_T])])
        ends_D = ends_T[np.cumsum(sizes_D)]
        wanted = [text.encode("utf-8") for text in texts]
        if ends_D.tolist() != list(itertools.accumulate(map(len, wanted))) or self._joined(ids_T) != b"".join(wanted):
            for text, data, ids in zip(texts, wanted, batch, strict=True):
                if self.token_bytes(ids) != data:
                    raise UserError(
                        f"{self.source} does not give back the bytes of the text that it encodes, here of {text[:60]!r}: it "
                        "drops, adds or replaces something. Use a byte-level BPE, or sentencepiece with byte fallback."
                    )
        return ids_T, sizes_D

    @functools.cached_property
    def _all_pieces(self) -> tuple[np.ndarray, np.ndarray]:
        lengths_V = self.byte_vocab.lengths_V
        return np.frombuffer(b"".join(self.pieces), np.uint8), np.cumsum(lengths_V) - lengths_V

    def _joined(self, ids_T: np.ndarray) -> bytes:
        """`token_bytes` of very many: a tenth of the time."""
        pieces, starts_V = self._all_pieces
        lengths_T = self.byte_vocab.lengths_V[ids_T]
        shifts_T = starts_V[ids_T] - np.cumsum(lengths_T) + lengths_T
        places = np.repeat(shifts_T, lengths_T)
        places += np.arange(len(places))
        return pieces[places].tobytes()

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens, joined. Raises `IndexError` for an id outside of the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise IndexError(f"{min(ids)} is not a token id")
        return b"".join(map(self.pieces.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the tokens, with U+FFFD for bytes that are not UTF-8 and nothing for special tokens."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load `tokenizer.model` (sentencepiece) or, where there is none, `tokenizer.json` (Hugging Face byte-level BPE).

    `source` is their directory, or a GGUF file. Raises `UserError` where neither is there, where the file is damaged, and
    where it cannot express every byte.
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
        f"No tokenizer in '{source}': expected {' or '.join(loaders)}. Give the directory of an exported model."
    )


# --- sentencepiece --------------------------------------------------------------------------------


def _load_sentencepiece(path: Path, data: bytes, files: Files) -> Tokenizer:
    # Appending one serialised protocol buffer to another merges them field by field, and the later value wins. This
    # sets field 3, the normalizer, to: no character map, no space put in front, none removed, all marked. A model
    # that was trained with other settings would change the text.
    identity = b"\x1a\x08" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data + identity)
        size = processor.vocab_size()
        names = [processor.id_to_piece(i) for i in range(size)]
        byte_ids = {int(name[1:-1], 16): i for i, name in enumerate(names) if processor.is_byte(i)}
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a sentencepiece model, or damaged: {error}.") from error
    if len(byte_ids) < 256:
        raise UserError(
            f"{path} has no byte fallback ({len(byte_ids)} of 256 byte tokens), so it cannot express every text. "
            "Train it with byte_fallback=True."
        )
    eos_id = processor.eos_id()
    if eos_id < 0:
        raise UserError(f"{path} has no end-of-sentence token. Train it with an eos_id.")
    special_ids = frozenset(i for i in range(size) if processor.is_control(i) or processor.is_unknown(i))
    byte_of = {i: bytes([byte]) for byte, i in byte_ids.items()}

    def control_id(name: str) -> int:
        found = processor.piece_to_id(name)  # The unknown token for a name that is not there.
        return found if processor.is_control(found) else -1

    def piece(i: int) -> bytes:
        return b"" if i in special_ids else byte_of.get(i) or names[i].replace(_SPACE_MARK, " ").encode("utf-8")

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
    # A space mark that a text itself contains would come back as a space: it is kept from sentencepiece, and its bytes
    # are put in its place.
    batch = []
    for text in texts:
        first, *others = text.split(_SPACE_MARK)
        ids = processor.encode(first)
        for part in others:
            ids += space_mark_ids + processor.encode(part)
        batch.append(ids)
    return batch


# --- Hugging Face byte-level BPE ------------------------------------------------------------------


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level BPE vocabulary stands for (the convention of GPT-2).

    The printable characters of Latin-1 stand for themselves; the other 68 bytes are, in order, U+0100 to U+0143.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _load_byte_level_bpe(path: Path, data: bytes, files: Files) -> Tokenizer:
    """Load a `tokenizer.json` without its normalizer: Qwen3's is NFC, which would change the bytes of a text."""
    spec = _parse_json(path, data)
    try:
        tokenizers.Tokenizer.from_str(data.decode("utf-8"))  # Checks the form that everything below relies on.
    except Exception as error:  # noqa: BLE001 - the library raises this very class, whatever is wrong.
        raise UserError(f"{path} is not a valid tokenizer.json: {error}. Download or export it again.") from error
    alphabet, vocab = byte_level_alphabet(), spec["model"]["vocab"]
    if spec["model"].get("type") != "BPE" or not _has_byte_level(spec.get("pre_tokenizer")):
        raise UserError(f"{path} is not a byte-level BPE, the kind of tokenizer.json that keeps every byte of a text.")
    if missing := sum(character not in vocab for character, byte in alphabet.items() if byte not in _DISPENSABLE):
        raise UserError(f"{path} cannot express every text: {missing} of the 256 bytes have no token of their own.")
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
    """Build the library's tokenizer from `spec`, less everything that would change or reinterpret a text."""
    # Only tokens that are marked special can be kept from matching a text that spells them, and R1's <think> is not.
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
    """Return the pre-tokenizer with no part of it putting a space before the text."""
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
    """Return `bos_id`, `eos_id` and `pad_id` as the files beside `path` say; the end also by its usual names."""
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
        raise UserError(f"No end-of-text token for {path}: name it as eos_token in tokenizer_config.json beside it.")
    bos_id, pad_id = find("bos"), find("pad")
    return {
        "bos_id": eos_id if bos_id is None else bos_id,
        "eos_id": eos_id,
        "pad_id": eos_id if pad_id is None else pad_id,
    }


def _stop_ids(path: Path, files: Files, eos_id: int, size: int) -> tuple[int, ...]:
    """Return `eos_id` and what else generation_config.json ends a response with."""
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
        raise UserError(f"{path} is not JSON: {error}. Download or export it again.") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds a JSON {type(parsed).__name__}, expected an object.")
    return parsed
