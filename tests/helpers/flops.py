"""FLOPs of a decoder, counted token by token from the sizes of its matrices."""

from __future__ import annotations

from rpt_jax.model.model_config import ModelConfig


def token_flops(config: ModelConfig, keys: int, *, head: bool, only_cache: bool = False) -> int:
    """Return the forward FLOPs of a token that attends to `keys` keys, itself included.

    With `only_cache`, its last layer computes only its key and value.
    """
    heads = config.heads * config.head_size
    kv = config.kv_heads * config.head_size
    layer = 2 * config.width * (heads + kv + kv + heads)  # Query, key, value and output.
    layer += 3 * 2 * config.width * config.ffn * max(1, config.experts_per_token)  # Gate, up and down.
    layer += 2 * config.width * config.experts  # Router.
    layer += keys * heads * (2 + 2)  # Scores and weighted values.
    logits = 2 * config.width * config.vocab if head else 0
    if only_cache:
        return (config.layers - 1) * layer + 2 * config.width * 2 * kv
    return config.layers * layer + logits
