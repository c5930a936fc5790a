"""Training of a sentencepiece tokenizer, for a policy that starts from random weights."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.special_tokens import TOKENIZER_CONFIG_FILE
from rpt_jax.tokenizers.tokenizer import END_THINK, THINK

# Content of tokenizer_config.json: every text that a policy is trained on begins with BOS. A sentencepiece model cannot say so.
_CONFIG = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    r"""Train a sentencepiece BPE model with byte fallback and write it to a file, and tokenizer_config.json next to it.

    Training is deterministic. Each digit is one token, and `\boxed{`, `}` and the newline are separate tokens, so that no token
    crosses the boundary of a box or of a line.

    Args:
      texts: training texts.
      vocab_size: number of tokens (`pretrain.vocab_size`).
      path: file to write; its directory is created if necessary.

    Raises: UserError if `vocab_size` is too small or too large for the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # Rarer characters are encoded as bytes.
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=[THINK, END_THINK],
            user_defined_symbols=["\\boxed{", "}", "\n"],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"pretrain.vocab_size={vocab_size} does not suit the training texts: {_possible_sizes(str(error))}.",
            field="pretrain.vocab_size",
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The model comes last, because its existence tells that both files are complete.
    Path(path).with_name(TOKENIZER_CONFIG_FILE).write_text(json.dumps(_CONFIG, indent=2) + "\n")
    Path(path).write_bytes(model.getvalue())


def _possible_sizes(message: str) -> str:
    """Say which sizes of the vocabulary are possible, by sentencepiece's message, which names its own options otherwise."""
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"at least {too_small[1]} are needed, for 256 bytes, 9 symbols and every frequent character"
    if too_large := re.search(r"<= (\d+)", message):
        return f"they give at most {too_large[1]} tokens. Reduce it, or train on more text"
    return message.rpartition("] ")[2].strip(" .") or "there is no text. Check the corpus"


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    # The trainer silently skips lines longer than 4,192 bytes; 1,000 characters are at most 4,000 bytes.
    for text in texts:
        for line in text.split("\n"):
            yield from (line[start : start + 1000] for start in range(0, len(line), 1000))
