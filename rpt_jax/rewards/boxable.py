"""Which tokens a box can hold: only positions before such a token can earn a reward, so the others are never chosen."""

from __future__ import annotations

import numpy as np

from rpt_jax.config import PromptConfig
from rpt_jax.prompts.response_format import BOX
from rpt_jax.rewards.prefix_match import prefix_match_reward
from rpt_jax.tokenizers.tokenizer import END_THINK, ByteVocab


def boxable_tokens(vocab: ByteVocab, config: PromptConfig) -> np.ndarray:
    r"""Return whether the reward reads a box around each token as that token, bool [V].

    Every token is written into a response `</think>\boxed{…}`, and the reward kernel compares the response with a continuation
    that begins with the token. This decides about longer predictions too: where the first token ends the box or restarts it, no
    prediction that begins with it can be read.

    Args:
      vocab: raw bytes of every token.
      config: section `prompt`. `box_reading` is the reading; a token longer than `reference_bytes` can never be compared.
    """
    # Two more tokens, for what is before and after the predicted one.
    opening, closing = (END_THINK + BOX).encode(), b"}"
    size, longest = vocab.bytes_VxX.shape
    bytes_WxX = np.zeros((size + 2, max(longest, len(opening))), np.uint8)
    bytes_WxX[:size, :longest] = vocab.bytes_VxX
    bytes_WxX[size, : len(opening)] = list(opening)
    bytes_WxX[size + 1, : len(closing)] = list(closing)
    lengths_W = np.append(vocab.lengths_V, [len(opening), len(closing)]).astype(np.int32)

    # One response for each token, and its continuation: the token alone.
    token_V = np.arange(size, dtype=np.int32)
    response_Vx3 = np.stack([np.full(size, size), token_V, np.full(size, size + 1)], axis=1).astype(np.int32)
    reference_VxR = np.zeros((size, config.reference_bytes), np.uint8)
    kept = min(longest, config.reference_bytes)
    reference_VxR[:, :kept] = vocab.bytes_VxX[:, :kept]
    end_VxRp1 = np.arange(config.reference_bytes + 1) == vocab.lengths_V[:, None]
    end_VxRp1[:, 0] = False
    reward_Vx1, _ = prefix_match_reward(
        response_Vx3[:, None],
        np.full((size, 1), 3, np.int32),
        np.ones((size, 1), bool),
        reference_VxR,
        end_VxRp1,
        bytes_WxX,
        lengths_W,
        -1,
        reading=config.box_reading,
    )
    return np.asarray(reward_Vx1)[:, 0] > 0
