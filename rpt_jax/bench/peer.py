"""The same shape in `transformers` on PyTorch, for comparisons in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.policy.presets import Shape


def transformers_calls(shape: Shape, batch: int, length: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Forward, and forward and backward, of a random Qwen2 model. Raises: UserError, where PyTorch is not installed."""
    try:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise UserError(f"--beside=transformers: {error}. Install torch and transformers, or leave it out.") from None
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=length,
        rms_norm_eps=shape.norm_epsilon,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2ForCausalLM(config).to(device, getattr(torch, dtype)).train()
    tokens = torch.randint(0, shape.vocab, (batch, length), device=device)

    def forward() -> float:
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()

    def both() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    return {"transformers: forward": forward, "transformers: forward and backward": both}
