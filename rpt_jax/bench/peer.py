"""The same shape in `transformers` on PyTorch, for comparisons in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.objective.batch import UpdateBatch


def transformers_calls(shape: ModelConfig, batch: int, length: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Forward, and forward and backward, of a random Qwen2 model. Raises: UserError, where PyTorch is not installed."""
    torch, model = _random_qwen2(shape, length, dtype)
    tokens = torch.randint(0, shape.vocab, (batch, length), device=model.device)

    def forward() -> float:
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()

    def both() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    return {"transformers: forward": forward, "transformers: forward and backward": both}


def transformers_update(
    shape: ModelConfig, batch: UpdateBatch, microbatch: int, autocast: bool
) -> dict[str, Callable[[], Any]]:
    """One AdamW step on the batch in plain PyTorch, `microbatch` responses a pass: float32, or under bfloat16 autocast.

    Logits are computed where responses are predicted; every response has a prompt of its own. Raises: UserError.
    """
    samples, response = batch.tokens_PxGxT.shape[1:]
    prompts = np.repeat(batch.prompts_PxS, samples, axis=0)
    rows = np.concatenate([prompts, batch.tokens_PxGxT.reshape(-1, response)], axis=1)
    torch, model = _random_qwen2(shape, rows.shape[1], "float32")
    ids = torch.from_numpy(rows).long().to(model.device)
    advantages = torch.from_numpy(batch.advantages_PxG.reshape(-1, 1)).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def update() -> float:
        optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(ids), microbatch):
            part = slice(first, first + microbatch)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                output = model(input_ids=ids[part], logits_to_keep=response + 1, use_cache=False)
            logits = output.logits[:, :-1].float().transpose(1, 2)
            logprobs = -torch.nn.functional.cross_entropy(logits, ids[part, -response:], reduction="none")
            ratio = torch.exp(logprobs - logprobs.detach())
            (-(ratio * advantages[part]).sum() / (len(ids) * response)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return norm.item()

    return {f"transformers: {'bfloat16 autocast' if autocast else 'float32'}": update}


def _random_qwen2(shape: ModelConfig, length: int, dtype: str) -> tuple[Any, Any]:
    """Return torch, and the shape as a model in training mode. Raises: UserError, where PyTorch is not installed."""
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
    return torch, model
