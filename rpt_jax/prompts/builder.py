"""Prompts as arrays: a context in the template's token ids, and the true continuation that a prediction is compared with.

A question is a context too: one that is never cut, and that no continuation follows. The continuation of a segment's prompt ends
with the segment, and the text after it may be part of the prompt (masked middle).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rpt_jax.config import PromptConfig
from rpt_jax.errors import UserError, nearest
from rpt_jax.prompts.chat_template import render_chat
from rpt_jax.prompts.positions import Position
from rpt_jax.prompts.targets import Segments
from rpt_jax.registry import PROMPT_TEMPLATES
from rpt_jax.tokenizers.tokenizer import END_THINK, THINK, Tokenizer

_RIGHT_CONTEXT = "{right_context}"  # Where a template has the text after the target.


class PromptBatch(NamedTuple):
    """P prompts as arrays, padded to S tokens, with R bytes of the true continuation of each.

    Attributes:
      tokens_PxS: int32, token ids; zeros after `lengths_P`.
      lengths_P: int32, tokens of each prompt.
      ids_P: int32, the index of each prompt in the stream; part of the random key of its samples.
      reference_PxR: uint8, the true continuation; zeros after its last whole token.
      boundaries_PxRp1: bool, True at index l if the first l reference bytes are whole tokens; False at 0.
      reference_ids_PxR: int32, the token ids of the reference; zeros after the last.
      window_P: int32, the index of the window that each prompt is taken from, or of its question.
      position_P: int32, the position in that window of the token to predict.
      entropy_P: float32, the entropy at that position, in nats.
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
    """Builds prompts from token ids; nothing is tokenized again. Picklable, for worker processes.

    Attributes:
      before, after: token ids of the template before the context and at its end.
      max_context_tokens: number of tokens that the template, and a right context, leave for the context.
      max_tail_tokens: tokens that follow the context, at most.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, slot: str = "context", segments: Segments | None = None
    ):
        """
        Args:
          config: section `prompt`.
          tokenizer: encodes the template.
          slot: what the template has braces around, where the context goes: "context" or "question".
          segments: finds the segments of a window, if they are the targets.

        Raises: UserError, if the template is missing or malformed, if it leaves no room for a context, or if the tokenizer has no
          <think> token for `prompt.prefill_think_token`.
        """
        self._segments = segments
        self._right_context = segments.right_context if segments else 0
        self._bytes_VxX = tokenizer.byte_vocab.bytes_VxX
        self._lengths_V = tokenizer.byte_vocab.lengths_V
        self._reference_bytes = config.reference_bytes
        self._max_tokens = config.max_tokens
        self._cut_at_line = config.long_context == "cut_at_line"

        # Mark the tokens that end with a line feed, for `prompt.long_context="cut_at_line"`.
        last_byte_V = self._bytes_VxX[np.arange(len(self._lengths_V)), np.maximum(self._lengths_V, 1) - 1]
        self._ends_line_V = last_byte_V == ord("\n")

        # Encode the template. Outside of a chat template, which is complete, the tokenizer's own prefix comes first.
        before, after = read_template(config.template, slot)
        _check_right_context(config.template, after, self._right_context)
        if config.chat_template:
            before, after = render_chat(tokenizer, before, after)
        gap = ""
        if self._right_context:
            gap, _, after = after.partition(_RIGHT_CONTEXT)
        self.before = tokenizer.encode_template(before, True)
        self._gap = tokenizer.encode_template(gap, False)
        self.after = tokenizer.encode_template(after, False)
        prefix = list(tokenizer.prefix_ids)
        if not config.chat_template and self.before[: len(prefix)] != prefix:
            self.before = prefix + self.before

        # Let the response begin with reasoning, unless the template opens it already.
        reasoning = reasoning_marker(tokenizer, self.after, in_chat=config.chat_template)
        if reasoning == END_THINK:
            field = "chat_template" if config.chat_template else "template"
            raise UserError(
                f"prompt.{field}={getattr(config, field)}: the template ends the reasoning itself, with {END_THINK} in front of "
                f"the response. No response could earn anything, because a prediction counts only after {END_THINK} in the "
                "response. Use a template without it.",
                field=f"prompt.{field}",
            )
        if config.prefill_think_token:
            if tokenizer.think_id < 0:
                raise UserError(
                    "prompt.prefill_think_token=True needs a tokenizer with a <think> token; set it to False.",
                    field="prompt.prefill_think_token",
                )
            if reasoning != THINK:
                self.after = [*self.after, tokenizer.think_id]

        # The rest of the prompt is left for the context.
        self.max_tail_tokens = len(self._gap) + self._right_context + len(self.after)
        template_tokens = len(self.before) + self.max_tail_tokens
        self.max_context_tokens = self._max_tokens - template_tokens
        if self.max_context_tokens < 1:
            right_context = (
                f", with data.target_options.right_context={self._right_context}," if self._right_context else ""
            )
            raise UserError(
                f"prompt.max_tokens={self._max_tokens} leaves no room for a {slot}: the template '{config.template}' alone"
                f"{right_context} takes {template_tokens} tokens.",
                field="prompt.max_tokens",
            )

    def build(self, prompt_id: int, ids: Sequence[int], position: Position) -> PromptBatch:
        """Return the prompt for one position.

        Args:
          prompt_id: the index of the prompt in the stream.
          ids: token ids of the window that `position` is in.
          position: the token to predict.

        Returns: the fields of `PromptBatch` without the P axis.
        """
        end = len(ids)
        tail = self.after
        if self._segments:
            end = int(self._segments.ends(ids)[position.position])
            tail = [*self._gap, *ids[end : end + self._right_context], *self.after]
        tokens = [*self.before, *self.cut_context(ids[: position.position]), *tail]
        reference_R, boundaries_Rp1, reference_ids_R = self._reference(ids[position.position : end])
        return PromptBatch(
            tokens_PxS=np.pad(np.array(tokens, np.int32), (0, self._max_tokens - len(tokens))),
            lengths_P=np.array(len(tokens), np.int32),
            ids_P=np.array(prompt_id, np.int32),
            reference_PxR=reference_R,
            boundaries_PxRp1=boundaries_Rp1,
            reference_ids_PxR=reference_ids_R,
            window_P=np.array(position.window, np.int32),
            position_P=np.array(position.position, np.int32),
            entropy_P=np.array(position.entropy, np.float32),
        )

    def contexts(self, prompts: PromptBatch) -> list[np.ndarray]:
        """Return the token ids of each prompt on the host without the template, but with a right context (see `cut_context`)."""
        starts = len(self.before)
        ends_P = prompts.lengths_P - len(self.after)
        return [tokens_S[starts:end] for tokens_S, end in zip(prompts.tokens_PxS, ends_P, strict=True)]

    def cut_context(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the newest tokens of a context that fit into the prompt, cut as `prompt.long_context` says."""
        if len(ids) <= self.max_context_tokens:
            return ids
        kept = ids[len(ids) - self.max_context_tokens :]
        if self._cut_at_line:
            line_ends = np.flatnonzero(self._ends_line_V[np.asarray(kept[: len(kept) // 2], np.int64)])
            if len(line_ends):
                kept = kept[line_ends[0] + 1 :]
        return kept

    def _reference(self, continuation: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first whole tokens of a continuation that fit into R bytes.

        Returns: their bytes, the boundaries between tokens (the paper's L_gt) and their ids; see `PromptBatch`.
        """
        limit = self._reference_bytes
        reference_R = np.zeros(limit, np.uint8)
        boundaries_Rp1 = np.zeros(limit + 1, bool)
        reference_ids_R = np.zeros(limit, np.int32)
        end = 0
        for index, token in enumerate(continuation):
            length = int(self._lengths_V[token])
            # A special token has no bytes, so no prediction can match it or anything after it.
            if length == 0 or end + length > limit:
                break
            reference_R[end : end + length] = self._bytes_VxX[token, :length]
            end += length
            boundaries_Rp1[end] = True
            reference_ids_R[index] = token
        return reference_R, boundaries_Rp1, reference_ids_R


def reasoning_marker(tokenizer: Tokenizer, after: Sequence[int], *, in_chat: bool) -> str:
    """Return the marker that the response begins after: <think>, </think>, or "" for none.

    Args:
      tokenizer: that of the prompt.
      after: token ids of the prompt after the context.
      in_chat: whether they are of a chat template. Then the markers after the last special token count, which are in the
        assistant's turn. Else only a marker at the very end counts, because an instruction may mention them.
    """
    markers = {tokenizer.think_id: THINK.encode(), tokenizer.end_think_id: END_THINK.encode()}
    turns = [n for n, i in enumerate(after, start=1) if i in tokenizer.special_ids and i not in markers]
    tail = after[max(turns, default=0) :]
    text = b"".join(markers.get(i, tokenizer.pieces[i]) for i in tail).decode(errors="replace").rstrip()
    last = max(THINK, END_THINK, key=text.rfind)
    return last if last in text and (in_chat or text.endswith(last)) else ""


def read_template(name: str, slot: str = "context") -> tuple[str, str]:
    """Return the text of a template before and after its `{context}` or `{question}`.

    Args:
      name: a registered template, or the path of a text file.
      slot: the name in braces.

    Raises: UserError, if it is neither, is not UTF-8, or does not contain the slot exactly once.
    """
    if name in PROMPT_TEMPLATES:
        text = PROMPT_TEMPLATES[name].function()
    else:
        text = _read_template_file(name)
    before, found, after = text.partition(f"{{{slot}}}")
    if not found or found in after:
        fitting = [other for other, choice in _built_in_texts() if f"{{{slot}}}" in choice]
        raise UserError(
            f"prompt.template='{name}' must contain {{{slot}}} exactly once, as these do: {', '.join(fitting)}.",
            field="prompt.template",
        )
    return before, after


def _check_right_context(name: str, after: str, right_context: int) -> None:
    """Check that a template has a place for a right context if, and only if, there is one.

    Args:
      name: of the template.
      after: its text after the context.
      right_context: tokens of right context.

    Raises: UserError.
    """
    expected = 1 if right_context else 0
    if after.count(_RIGHT_CONTEXT) != expected:
        raise UserError(
            f"prompt.template='{name}' has {_RIGHT_CONTEXT} {after.count(_RIGHT_CONTEXT)} times after {{context}}, but with "
            f"data.target_options.right_context={right_context} it must be there {'once' if expected else 'not at all'}"
            f"{', as in masked_segment' if expected else ''}.",
            field="prompt.template",
        )


def _built_in_texts() -> list[tuple[str, str]]:
    """Return the names and texts of all registered templates."""
    return [(choice.name, choice.function()) for choice in PROMPT_TEMPLATES.choices()]


def _read_template_file(name: str) -> str:
    try:
        return Path(name).read_bytes().decode()
    except OSError:
        known = sorted(PROMPT_TEMPLATES)
        hint = nearest(name, known)
        raise UserError(
            f"prompt.template='{name}' is neither a readable file nor one of: {', '.join(known)}.{hint}",
            field="prompt.template",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt.template='{name}' is not UTF-8 (byte {error.start}).", field="prompt.template"
        ) from None


def stack(prompts: Sequence[PromptBatch]) -> PromptBatch:
    """Stack single prompts, without the P axis, into one batch."""
    return PromptBatch(
        **{name: np.stack([getattr(prompt, name) for prompt in prompts]) for name in PromptBatch._fields}
    )
