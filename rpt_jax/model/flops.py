"""FLOPs of a decoder's forward pass, by formula.

A matrix product takes 2 FLOPs per parameter and token, and attention 4·C FLOPs per query head and pair of a query and a key that
it attends to: 2·C for the score and 2·C for the weighted value. Masked pairs, norms, softmax and the embedding lookup do not
count, and neither does anything that rematerialization computes again: these are model FLOPs (PaLM, 2204.02311, appendix B). A
backward pass takes twice the FLOPs of its forward pass; where matrices are frozen, their products take the same FLOPs again. The
products of low-rank adapters do not count.

The functions accept Python numbers and arrays of JAX.
"""

from __future__ import annotations

from typing import Any

from rpt_jax.model.model_config import ModelConfig

Count = Any  # int, float or a scalar float32 array.


def forward_flops(config: ModelConfig, *, tokens: Count, pairs: Count, head_tokens: Count) -> Any:
    """Return the FLOPs of a forward pass.

    Args:
      config: of the decoder.
      tokens: tokens that run through the layers.
      pairs: pairs of a query and a key that it attends to.
      head_tokens: tokens whose logits are computed.
    """
    head = config.vocab * config.width
    matmul = 2.0 * (config.matmul_parameters - head) * tokens + 2.0 * head * head_tokens
    return matmul + attention_flops(config, pairs)


def training_flops(config: ModelConfig, *, tokens: Count, pairs: Count, head_tokens: Count, frozen: bool) -> Any:
    """Return the FLOPs of a forward and a backward pass.

    Args:
      config, tokens, pairs, head_tokens: as those of `forward_flops`.
      frozen: whether the matrices are frozen, so that they have no gradients.
    """
    forward = forward_flops(config, tokens=tokens, pairs=pairs, head_tokens=head_tokens)
    attention = attention_flops(config, pairs)
    return (2 if frozen else 3) * (forward - attention) + 3 * attention


def cache_flops(config: ModelConfig, *, tokens: Count, pairs: Count) -> Any:
    """Return the FLOPs of keys and values in all layers, the last of which computes nothing else.

    Args:
      config: of the decoder.
      tokens: tokens whose keys and values are computed.
      pairs: pairs of a query and a key that it attends to.
    """
    last_layer = 2.0 * config.width * 2 * config.kv_heads * config.head_size * tokens
    share = (config.layers - 1) / config.layers
    return last_layer + share * forward_flops(config, tokens=tokens, pairs=pairs, head_tokens=0)


def attention_flops(config: ModelConfig, pairs: Count) -> Any:
    """Return the forward FLOPs of attention over `pairs` pairs of a query and a key, in all layers and heads."""
    return 4.0 * config.layers * config.heads * config.head_size * pairs


def causal_pairs(tokens: Count, earlier: Count = 0) -> Any:
    """Return the pairs of `tokens` consecutive tokens that attend to themselves, each other and `earlier` tokens before them."""
    return tokens * earlier + tokens * (tokens + 1) / 2
