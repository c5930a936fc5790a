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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files, vocabulary_file
from rpt_jax.tokenizers.special_tokens import read_added_tokens, read_special_ids
from rpt_jax.tokenizers.template_encoding import (
    IDENTITY_NORMALIZER,
    TOKENIZER_JSON,
    TemplateEncoder,
    add_tokens,
    added_tokens,
    check_added_id,
    json_encoder,
    library_backend,
    prefix_ids,
    sentencepiece_encoder,
)
from rpt_jax.weights.model_files import find_gguf, parse_object, unreadable_hint

THINK, END_THINK = "<think>", "</think>"

Files = dict[str, bytes]  # Content by file name.

_SPACE_MARK = "\u2581"  # Stands for a space in the pieces of sentencepiece.
# Below this, sentencepiece takes longer to start its threads than to encode.
_MIN_CHARACTERS_FOR_THREADS = 4096
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
      prefix_ids: ids that the tokenizer itself puts in front of a text: usually BOS or nothing.
      eos_id: id of the end-of-text token.
      pad_id: id of the padding token; `eos_id` if the tokenizer has none.
      think_id: id of <think>; -1 if it is not a special token.
      end_think_id: id of </think>; -1 if it is not a special token.
      stop_ids: ids that end a response (`special_tokens.read_special_ids`).
      special_ids: ids of tokens without bytes; no text is encoded to them.
      special_names: name of each of them by id.
      unused_ids: ids below `vocab_size` that are not tokens.
      normalizer: name of the normalizer in tokenizer.json, such as "NFC", which is disabled here; "" for none.
      fingerprint: SHA-256 of tokenizer.model or tokenizer.json, in hexadecimal.
      source: path of that file, or of the GGUF file.
      encode_ordinary: function from texts to their token ids, without any check.
      encode_template: function from the text of a template, and whether a prompt begins with it, to its token ids
        (`template_encoding`).
    """

    pieces: tuple[bytes, ...] = dataclasses.field(repr=False)
    bos_id: int
    prefix_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    think_id: int
    end_think_id: int
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    special_names: Mapping[int, str] = dataclasses.field(repr=False)
    unused_ids: frozenset[int]
    normalizer: str
    fingerprint: str
    source: str
    encode_ordinary: Callable[[Sequence[str]], list[list[int]]] = dataclasses.field(repr=False)
    encode_template: TemplateEncoder = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including unused ones."""
        return len(self.pieces)

    def absent_ids(self, size: int) -> tuple[int, ...]:
        """Return the ids without a token in a policy's vocabulary of `size` ids: unused and padding ids."""
        return (*sorted(self.unused_ids), *range(self.vocab_size, size))

    @functools.cached_property
    def end_think_ids(self) -> tuple[int, ...]:
        """Token ids that write </think>: the special token or, without one, the bytes."""
        return (self.end_think_id,) if self.end_think_id >= 0 else tuple(self.encode(END_THINK))

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

    def response_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the raw bytes of a response, with its end-of-thinking tokens, which have no bytes, as they are spelled."""
        return b"".join(END_THINK.encode() if i == self.end_think_id else self.token_bytes([i]) for i in ids)

    def describe_stop_ids(self) -> str:
        """Return a sentence with the names (or the quoted texts) and ids of the tokens that end a response."""
        names = [f"{self.special_names.get(i) or repr(self.decode([i]))} ({i})" for i in self.stop_ids]
        return f"A response ends at {' or '.join(names)}."

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, with U+FFFD for invalid UTF-8 and without special tokens."""
        return self.token_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load `tokenizer.model` (sentencepiece) or, if there is none, `tokenizer.json` (Hugging Face byte-level BPE).

    Args:
      source: the directory of these files, or a GGUF file.

    Raises: UserError if neither file exists, or if it is damaged or cannot represent every text.
    """
    files = read_tokenizer_files(source)
    name = vocabulary_file(Path(source), files)
    path = find_gguf(source) or (Path(source) / name if Path(source).is_dir() else Path(source))
    load = _load_sentencepiece if name == "tokenizer.model" else _load_byte_level_bpe
    tokenizer = load(path, files[name], files)
    tokenizer.encode(_PROBE)
    return tokenizer


def _load_sentencepiece(path: Path, data: bytes, files: Files) -> Tokenizer:
    """Load a sentencepiece model with its normalizer disabled, and the tokens that other files add to it."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data + IDENTITY_NORMALIZER)
        size = processor.vocab_size()
        own_names = [processor.id_to_piece(i) for i in range(size)]
        byte_ids = {int(name[1:-1], 16): i for i, name in enumerate(own_names) if processor.is_byte(i)}
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is not a sentencepiece model, or it is damaged: {error}.{unreadable_hint(path)}", field=str(path)
        ) from error
    if len(byte_ids) < 256:
        raise UserError(
            f"{path} cannot represent every text, because it has only {len(byte_ids)} of 256 byte tokens. Train it with "
            "byte_fallback=True.",
            field=str(path),
        )

    # Collect all tokens. Those that other files add follow the model's own, or rename tokens that it reserves.
    added = read_added_tokens(path, files)
    backend = None
    if TOKENIZER_JSON in files:
        json_path = path.with_name(TOKENIZER_JSON)
        backend = library_backend(json_path, files)
        add_tokens(json_path, backend, added)
        added = added_tokens(backend)
    own_ids = {name: i for i, name in enumerate(own_names)}
    beside = {name: token for name, token in added.items() if own_ids.get(name) != token["id"]}
    names = _add_names(path, own_names, byte_ids.values(), beside)
    ids = {name: i for i, name in enumerate(names)}
    defaults = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    special = read_special_ids(path, files, ids, {kind: i for kind, i in defaults.items() if i >= 0})
    silent_ids = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    special_ids = silent_ids | {special.bos_id, special.eos_id}
    special_ids |= {token["id"] for token in added.values() if token["special"] or token["id"] in special.stop_ids}
    special_ids |= {ids[name] for name in (THINK, END_THINK) if name in ids}

    # Find the byte string of each id.
    byte_of = {i: bytes([byte]) for byte, i in byte_ids.items()}

    def piece(i: int) -> bytes:
        if i in special_ids:
            return b""
        if names[i] in beside:
            return names[i].encode("utf-8")
        return byte_of.get(i) or names[i].replace(_SPACE_MARK, " ").encode("utf-8")

    pieces = tuple(map(piece, range(len(names))))

    # Spell in bytes what the library would encode as a special token, or decode as a space. Added text tokens stay whole.
    spelled = [name for i, name in enumerate(own_names) if i in special_ids - silent_ids or name != names[i]]
    symbols = {name: [byte_ids[byte] for byte in name.encode("utf-8")] for name in [_SPACE_MARK, *spelled]}
    symbols |= {name: [token["id"]] for name, token in added.items() if pieces[token["id"]] == name.encode("utf-8")}
    longest_first = sorted(symbols, key=len, reverse=True)  # A symbol must not be cut short by one that is its prefix.
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    named = {names[i]: {"id": i} for i in special_ids} | added
    return Tokenizer(
        pieces=pieces,
        **special._asdict(),
        prefix_ids=prefix_ids(path, files, special.bos_id, backend),
        think_id=ids.get(THINK, -1),
        end_think_id=ids.get(END_THINK, -1),
        special_ids=frozenset(special_ids),
        special_names={i: names[i] for i in special_ids},
        unused_ids=frozenset(i for i, name in enumerate(own_names) if processor.is_unused(i) and name == names[i]),
        normalizer="",
        fingerprint=_fingerprint(data, beside),
        source=str(path),
        encode_ordinary=functools.partial(_encode_sentencepiece, processor, pattern, symbols),
        encode_template=sentencepiece_encoder(path, files, named, backend),
    )


def _add_names(
    path: Path, own_names: Sequence[str], fixed_ids: Iterable[int], beside: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the names of all tokens by id.

    Args:
      path: of the tokenizer's file, for messages.
      own_names: names of its own tokens by id.
      fixed_ids: ids of those that cannot be renamed.
      beside: the tokens that other files add or rename, by name, each with its `id`.

    Raises: UserError if an added token is one of the file under another id, or if the ids do not continue those of the file.
    """
    names = list(own_names)
    taken = set(fixed_ids)
    for name, token in sorted(beside.items(), key=lambda item: item[1]["id"]):
        i = token["id"]
        if name in own_names or i in taken or not 0 <= i < len(own_names):
            check_added_id(path, name, i, own_names.index(name) if name in own_names else len(names))
        names[i : i + 1] = [name]
        taken.add(i)
    return names


def _fingerprint(data: bytes, beside: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a tokenizer's file and, if there are any, of the tokens that other files add to it."""
    added = json.dumps([(token["id"], name) for name, token in beside.items()]).encode() if beside else b""
    return hashlib.sha256(data + added).hexdigest()


def _encode_sentencepiece(
    processor: sentencepiece.SentencePieceProcessor,
    pattern: re.Pattern[str],
    symbols: Mapping[str, list[int]],
    texts: Sequence[str],
) -> list[list[int]]:
    """Encode texts, with the ids of `symbols` for what `pattern` matches."""
    parts_of_texts = [pattern.split(text) for text in texts]
    plain = [part for parts in parts_of_texts for part in parts if part not in symbols]
    # One call for all texts, which starts threads: not for a little text, nor where there is a process for every core already.
    is_short = sum(map(len, plain)) < _MIN_CHARACTERS_FOR_THREADS
    num_threads = 1 if is_short or os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
    encoded = iter(processor.encode(plain, num_threads=num_threads))
    return [
        [i for part in parts for i in (symbols[part] if part in symbols else next(encoded))] for parts in parts_of_texts
    ]


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
    spec = parse_object(path, data)
    backend = library_backend(path, files)  # Validates the structure, which the code below relies on.
    alphabet = byte_level_alphabet()
    vocab = spec["model"]["vocab"]
    # Old files do not name the type of the model; only a BPE has merges.
    spec["model"].setdefault("type", "BPE" if "merges" in spec["model"] else None)
    if spec["model"]["type"] != "BPE" or not _has_byte_level(spec.get("pre_tokenizer")):
        raise UserError(
            f"{path} is not a byte-level BPE, the only kind of tokenizer.json supported. If its tokenizer is one of "
            "sentencepiece, copy tokenizer.model from the model's repository to the same directory.",
            field=str(path),
        )
    if missing := sum(character not in vocab for character, byte in alphabet.items() if byte not in _OPTIONAL_BYTES):
        raise UserError(
            f"{path} cannot represent every text: {missing} of the 256 bytes have no token.", field=str(path)
        )

    # Collect the ids of all tokens. Added tokens may be in the vocabulary, too, or in other files only.
    own = {token["content"]: token for token in spec.get("added_tokens", ())}
    for content, token in own.items():
        check_added_id(path, content, token["id"], backend.token_to_id(content))
    listed = read_added_tokens(path, files)
    add_tokens(path, backend, listed)
    beside = {name: token for name, token in listed.items() if name not in own}
    added = own | beside
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    ids = vocab | {content: token["id"] for content, token in added.items()}
    special = read_special_ids(path, files, ids)
    special_ids = frozenset(
        token["id"]
        for content, token in added.items()
        if token["special"] or token["id"] in special.stop_ids or content in (THINK, END_THINK)
    ) | {special.bos_id, special.eos_id}

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
    backend.add_special_tokens([content for content, i in ids.items() if i in special_ids and content not in added])
    return Tokenizer(
        pieces=tuple(pieces),
        **special._asdict(),
        prefix_ids=prefix_ids(path, files, special.bos_id, backend),
        unused_ids=frozenset(range(len(pieces))) - frozenset(ids.values()),
        normalizer=_normalizer_name(spec.get("normalizer")),
        think_id=added[THINK]["id"] if THINK in added else -1,
        end_think_id=added[END_THINK]["id"] if END_THINK in added else -1,
        special_ids=special_ids,
        special_names={i: content for content, i in ids.items() if i in special_ids},
        fingerprint=_fingerprint(data, beside),
        source=str(path),
        encode_ordinary=functools.partial(_encode_byte_level_bpe, _exact_backend(spec, special_ids)),
        encode_template=json_encoder(backend),
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
