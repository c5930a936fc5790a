"""Weights and shape of a GGUF file, under Hugging Face's names and with their order of rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Llama3, llama3_divisors, rope_frequencies
from rpt_jax.weights.gguf_header import header_value, open_gguf
from rpt_jax.weights.hf_config import check_family, from_config
from rpt_jax.weights.safetensors_io import Spec, Tensors

_ROPE_DIVISORS = "rope_freqs.weight"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def gguf_shape(path: Path) -> ModelConfig:
    """Read the shape from the header. Raises: UserError, for an architecture or a scaling that we do not have."""
    family = header_value(path, "general.architecture")
    check_family(f"{path}: general.architecture", family)

    def value(key: str, default: Any = None) -> Any:
        return header_value(path, f"{family}.{key}", default)

    width, heads = value("embedding_length"), value("attention.head_count")
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight.")
    head_size = value("attention.key_length", width // heads)
    base = float(value("rope.freq_base", 10_000.0))
    config = {
        "model_type": family,
        "num_hidden_layers": value("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": value("feed_forward_length"),
        # The header's own count leaves out what a vocabulary is padded with.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": value("context_length"),
        "rope_theta": base,
        # Stored in float32, so that 1e-05 comes as 9.999999747378752e-06; its shortest decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_scaling": _scaling(path, family, tensors.get(_ROPE_DIVISORS), head_size, base),
    }
    return from_config(config, path)


def _scaling(path: Path, family: str, divisors: Any, head_size: int, base: float) -> dict[str, Any] | None:
    """Return `rope_scaling` as config.json would have it."""
    if divisors is not None:
        return _llama3(path, np.asarray(divisors.data, np.float32), head_size, base)
    scaling = f"{family}.rope.scaling"
    kind = header_value(path, f"{scaling}.type", "none")
    if kind == "none":
        return None
    fields = {"rope_type": kind, "factor": header_value(path, f"{scaling}.factor")}
    if kind == "yarn":
        fields["original_max_position_embeddings"] = header_value(path, f"{scaling}.original_context_length")
    return fields


def _llama3(path: Path, divisors: np.ndarray, head_size: int, base: float) -> dict[str, Any]:
    """Recover Llama 3's scaling, which a GGUF file holds as what each frequency is divided by."""
    meant = Llama3(float(divisors.max()), 1.0, 4.0, 8192)
    expected = llama3_divisors(rope_frequencies(head_size, base, None)[0], meant)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(f"{path}: {_ROPE_DIVISORS} is not the scaling of Llama 3, and no other is known of this form.")
    return {"rope_type": "llama3"} | dataclasses.asdict(meant)


def gguf_tensors(path: Path, shape: ModelConfig) -> Tensors:
    """Open the tensors, dequantized to float32 as each is read. Raises: UserError, for a quantization that is not known."""
    from gguf.quants import dequantize

    found = {_hf_name(tensor.name): tensor for tensor in open_gguf(path).tensors if tensor.name != _ROPE_DIVISORS}
    permuted = header_value(path, "general.architecture") == "llama"

    def fetch(name: str) -> np.ndarray:
        tensor = found[name]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise UserError(
                f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which cannot be read."
            ) from None
        values = values.reshape(_dims(tensor))
        for part, heads in (("q_proj.", shape.heads), ("k_proj.", shape.kv_heads)):
            if permuted and part in name:
                values = _halves_first(values, heads)
        return values

    specs = {name: Spec(np.dtype(np.float32), _dims(tensor)) for name, tensor in found.items()}
    return Tensors(str(path), specs, fetch)


def _dims(tensor: Any) -> tuple[int, ...]:
    # GGUF counts dimensions from the last.
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str:
    """Translate a name; one that is not known stays as it is and is refused with the others that have no place."""
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_LAYER[rest]}" if rest in _LAYER else name


def _halves_first(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of Llama files, whose rotations turn neighboring rows: ours turn the halves of a head."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
