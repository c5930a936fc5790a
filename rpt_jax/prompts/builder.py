"""Prompts: a context of token ids between the template's ids, and the bytes that a right prediction begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rpt_jax.config import PromptConfig
from rpt_jax.errors import UserError, nearest
from rpt_jax.prompts.chat_template import chat_ids
from rpt_jax.prompts.positions import Position
from rpt_jax.registry import PROMPT_TEMPLATES
from rpt_jax.tokenizers.tokenizer import Tokenizer


class PromptBatch(NamedTuple):
    """P prompts as arrays.

    Attributes:
      tokens_PxS: int32 ids, zeros after `lengths`.
      lengths_P: int32.
      ids_P: int32, the number of the prompt in the stream; fixes the noise of its samples.
      reference_PxR: uint8, how the document truly goes on; zeros after its last whole token.
      boundaries_PxRp1: bool, True at l where the first l reference bytes are whole tokens; False at 0.
      reference_ids_PxR: int32, those tokens; zeros after the last.
      window_P, position_P, entropy_P: where the prompt is from.
    """

    tokens_PxS: np.ndarray
    lengths_P: np.ndarray
    ids_P: np.ndarray
    reference_PxR: np.ndarray
    boundaries_PxRp1: np.ndarray
    reference_ids_PxR: np.ndarray
    window_P: np.ndarray
    position_P: np.ndarray
    entropy_P: np.ndarray


class PromptBuilder:
    """Builds prompts from slices of documents' ids; no text is ever tokenized twice. Can be pickled, for other processes.

    `before` and `after` are the template's ids around a context.
    """

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer):
        """Raises: UserError, where the template is missing or malformed or leaves no room for a context."""
        self._bytes_VxX, self._lengths_V = tokenizer.byte_vocab
        self._reference_bytes = config.reference_bytes
        self._size, self._at_line = config.max_tokens, config.long_context == "cut_at_line"
        last_V = self._bytes_VxX[np.arange(len(self._lengths_V)), np.maximum(self._lengths_V, 1) - 1]
        self._ends_line_V = last_V == ord("\n")
        before, after = read_template(config.template)
        self.before, self.after = tokenizer.encode(before), tokenizer.encode(after)
        if config.chat_template:
            opening, closing = chat_ids(tokenizer)
            self.before, self.after = opening + self.before, self.after + closing
        if self.before[:1] != [tokenizer.bos_id]:  # Some chat templates have it.
            self.before = [tokenizer.bos_id, *self.before]
        if config.prefill_think_token:
            if tokenizer.think_id < 0:
                raise UserError(
                    "prompt.prefill_think_token=True needs a tokenizer with a <think> token; set it to False."
                )
            if tokenizer.think_id not in self.after:  # Some have that, too.
                self.after = [*self.after, tokenizer.think_id]
        self._room = self._size - len(self.before) - len(self.after)
        if self._room < 1:
            raise UserError(
                f"prompt.max_tokens={self._size} leaves no room for a context: the template '{config.template}' alone "
                f"takes {self._size - self._room} tokens."
            )

    def build(self, prompt_id: int, ids: Sequence[int], position: Position) -> PromptBatch:
        """Return the prompt (arrays without the P axis) that asks for token `position` of the document `ids`."""
        at = position.position
        tokens = [*self.before, *self._context(ids[:at]), *self.after]
        reference, boundaries, reference_ids = self._reference(ids[at:])
        return PromptBatch(
            tokens_PxS=np.pad(np.array(tokens, np.int32), (0, self._size - len(tokens))),
            lengths_P=np.int32(len(tokens)),
            ids_P=np.int32(prompt_id),
            reference_PxR=reference,
            boundaries_PxRp1=boundaries,
            reference_ids_PxR=reference_ids,
            window_P=np.int32(position.document),
            position_P=np.int32(at),
            entropy_P=np.float32(position.entropy),
        )

    def _context(self, ids: Sequence[int]) -> Sequence[int]:
        """What of a context there is room for: its newest tokens, as `prompt.long_context` says."""
        if len(ids) <= self._room:
            return ids
        kept = ids[len(ids) - self._room :]
        if self._at_line:
            ends = np.flatnonzero(self._ends_line_V[np.asarray(kept[: len(kept) // 2], np.int64)])
            kept = kept[ends[0] + 1 :] if len(ends) else kept
        return kept

    def _reference(self, completion: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of the completion's first whole tokens that fit, the borders between tokens (paper, L_gt), and their ids."""
        limit = self._reference_bytes
        reference, boundaries = np.zeros(limit, np.uint8), np.zeros(limit + 1, bool)
        reference_ids, end = np.zeros(limit, np.int32), 0
        for number, token in enumerate(completion):
            length = int(self._lengths_V[token])
            # A special token has no bytes: nothing that a prediction spells can go past it.
            if length == 0 or end + length > limit:
                break
            reference[end : end + length] = self._bytes_VxX[token, :length]
            end += length
            boundaries[end], reference_ids[number] = True, token
        return reference, boundaries, reference_ids


def read_template(name: str) -> tuple[str, str]:
    """Return the text of a template before and after its one `{context}`.

    Args:
      name: a registered template, or the path of a text file.

    Raises: UserError, where it is neither, is not UTF-8, or does not hold `{context}` exactly once.
    """
    if name in PROMPT_TEMPLATES:
        text = PROMPT_TEMPLATES[name].function()
    else:
        text = _read_template_file(name)
    before, slot, after = text.partition("{context}")
    if not slot or "{context}" in after:
        raise UserError(f"prompt.template='{name}' must hold {{context}} exactly once.", field="prompt.template")
    return before, after


def _read_template_file(name: str) -> str:
    try:
        return Path(name).read_bytes().decode()
    except OSError:
        known = sorted(PROMPT_TEMPLATES)
        hint = nearest(name, known)
        raise UserError(
            f"prompt.template='{name}' is neither a file nor one of: {', '.join(known)}.{hint}", field="prompt.template"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt.template: {name} is not UTF-8 (byte {error.start}).", field="prompt.template"
        ) from None


def stack(prompts: Sequence[PromptBatch]) -> PromptBatch:
    """Batch single prompts."""
    return PromptBatch(*(np.stack(leaves) for leaves in zip(*prompts, strict=True)))
