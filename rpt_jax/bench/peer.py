"""The same model in `transformers` on PyTorch, as a baseline measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.objective.batch import UpdateBatch


def transformers_calls(config: ModelConfig, batch: int, length: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return a forward pass, and a forward and backward pass, of a random Qwen2 model.

    Raises:
      UserError: torch or transformers is not installed.
    """
    torch, model = _random_qwen2(config, length, dtype)
    tokens = torch.randint(0, config.vocab, (batch, length), device=model.device)

    def forward() -> float:
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()

    def forward_and_backward() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    return {"transformers: forward": forward, "transformers: forward and backward": forward_and_backward}


def transformers_update(
    config: ModelConfig, batch: UpdateBatch, microbatch: int, autocast: bool
) -> dict[str, Callable[[], Any]]:
    """Return one AdamW step on the batch in PyTorch, in float32 or under bfloat16 autocast.

    Logits are computed at response positions only; every response repeats its prompt.

    Args:
      config: the model.
      batch: host arrays of full length.
      microbatch: responses per forward and backward pass.
      autocast: whether to run under bfloat16 autocast.

    Raises:
      UserError: torch or transformers is not installed.
    """
    samples, response = batch.tokens_PxGxT.shape[1:]
    prompts = np.repeat(batch.prompts_PxS, samples, axis=0)
    rows = np.concatenate([prompts, batch.tokens_PxGxT.reshape(-1, response)], axis=1)
    torch, model = _random_qwen2(config, rows.shape[1], "float32")
    ids = torch.from_numpy(rows).long().to(model.device)
    advantages = torch.from_numpy(np.asarray(batch.advantages_PxG).reshape(-1, 1)).to(model.device)
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


def transformers_generate(config: ModelConfig, prompts_BxS: np.ndarray, new_tokens: int) -> Callable[[], Any]:
    """Return a call that samples `new_tokens` tokens after every prompt, in bfloat16.

    Raises:
      UserError: torch or transformers is not installed.
    """
    torch, model = _random_qwen2(config, prompts_BxS.shape[1] + new_tokens, "bfloat16")
    model.eval()
    prompts = torch.from_numpy(prompts_BxS).long().to(model.device)

    def generate() -> int:
        with torch.no_grad():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=0,
                pad_token_id=0,
            )
        return int(tokens[:, -1].sum())  # Wait for the last token.

    return generate


def torch_matmul(size: int) -> Callable[[], Any]:
    """Return a product of large bfloat16 matrices. Raises: UserError, if torch or transformers is not installed."""
    torch, _ = _import_peers()
    x = torch.randn(size, size, dtype=torch.bfloat16, device=_torch_device(torch))
    return lambda: float((x @ x)[0, 0])  # Wait for it.


def _import_peers() -> tuple[Any, Any]:
    """Return the modules torch and transformers. Raises: UserError, if one is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--compare=transformers: {error}. Install torch and transformers, or omit --compare.", field="--compare"
        ) from None
    return torch, transformers


def _torch_device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _random_qwen2(config: ModelConfig, length: int, dtype: str) -> tuple[Any, Any]:
    """Return the torch module and a random model in training mode. Raises UserError if there is none."""
    if config.experts:
        raise UserError("--compare=transformers: only dense policies are compared. Omit it.", field="--compare")
    torch, transformers = _import_peers()
    qwen2_config = transformers.Qwen2Config(
        num_hidden_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        intermediate_size=config.ffn,
        vocab_size=config.vocab,
        tie_word_embeddings=config.tied,
        max_position_embeddings=length,
        rms_norm_eps=config.norm_epsilon,
    )
    with torch.device(_torch_device(torch)):  # Large models are initialized much faster on a GPU.
        model = transformers.Qwen2ForCausalLM(qwen2_config)
    return torch, model.to(getattr(torch, dtype)).train()
