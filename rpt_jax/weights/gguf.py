"""Architecture and weights of a GGUF file, with the tensor names and row order of Hugging Face."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Llama3, llama3_divisors, rope_frequencies
from rpt_jax.weights.gguf_header import header_value, open_gguf
from rpt_jax.weights.hf_config import check_family, from_hf_config
from rpt_jax.weights.safetensors_io import Tensors, TensorSpec

_ROPE_DIVISORS = "rope_freqs.weight"
# Tensor names: GGUF -> Hugging Face. Those of a layer come after "blk.N." and "model.layers.N.".
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
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


def gguf_model_config(path: Path) -> ModelConfig:
    """Read the architecture from the header. Raises: UserError for an architecture or RoPE scaling that is not supported."""
    family = header_value(path, "general.architecture")
    check_family(path, "general.architecture", family)

    def value(key: str, default: Any = None) -> Any:
        return header_value(path, f"{family}.{key}", default)

    width = value("embedding_length")
    heads = value("attention.head_count")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        raise UserError(
            f"{path}: {family}.embedding_length={width!r} and {family}.attention.head_count={heads!r} must be positive integers.",
            field=str(path),
        )

    # The size of the vocabulary, tied embeddings and the scaling of Llama 3 are not in the header, but follow from the tensors.
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing.", field=str(path))

    # Build the equivalent config.json, which `from_hf_config` checks.
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
        # The size in the header does not include padding of the vocabulary.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": value("context_length"),
        "rope_theta": base,
        # Stored as float32, in which 1e-05 is 9.999999747378752e-06: recover the original value as the shortest decimal.
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_scaling": _rope_scaling(path, family, tensors.get(_ROPE_DIVISORS), head_size, base),
    }
    return from_hf_config(config, path)


def _rope_scaling(path: Path, family: str, divisors: Any, head_size: int, base: float) -> dict[str, Any] | None:
    """Return the value of `rope_scaling` in an equivalent config.json."""
    if divisors is not None:
        return _llama3_scaling(path, np.asarray(divisors.data, np.float32), head_size, base)
    scaling = f"{family}.rope.scaling"
    kind = header_value(path, f"{scaling}.type", "none")
    if kind == "none":
        return None
    fields = {"rope_type": kind, "factor": header_value(path, f"{scaling}.factor")}
    if kind == "yarn":
        fields["original_max_position_embeddings"] = header_value(path, f"{scaling}.original_context_length")
    return fields


def _llama3_scaling(path: Path, divisors: np.ndarray, head_size: int, base: float) -> dict[str, Any]:
    """Recover the parameters of Llama 3's scaling, which GGUF files store as the divisor of each frequency."""
    # The published models differ only in the factor, which is the largest divisor.
    scaling = Llama3(
        factor=float(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    expected = llama3_divisors(rope_frequencies(head_size, base, None)[0], scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: {_ROPE_DIVISORS} does not match the RoPE scaling of Llama 3, the only one supported in this form.",
            field=str(path),
        )
    return {"rope_type": "llama3"} | dataclasses.asdict(scaling)


def gguf_tensors(path: Path, config: ModelConfig) -> Tensors:
    """Open the tensors; each is dequantized to float32 when it is read.

    Args:
      path: the GGUF file.
      config: its architecture.

    Raises: UserError on reading a tensor with an unknown quantization.
    """
    from gguf.quants import dequantize

    tensors = {_hf_name(tensor.name): tensor for tensor in open_gguf(path).tensors if tensor.name != _ROPE_DIVISORS}
    interleaved = header_value(path, "general.architecture") == "llama"

    def fetch(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise UserError(
                f"{path}: the quantization {tensor.tensor_type.name} of tensor {tensor.name} is not supported.",
                field=str(path),
            ) from None
        values = values.reshape(_shape(tensor))
        for projection, heads in (("q_proj.", config.heads), ("k_proj.", config.kv_heads)):
            if interleaved and projection in name:
                values = _deinterleave(values, heads)
        return values

    specs = {name: TensorSpec(dtype=np.dtype(np.float32), shape=_shape(tensor)) for name, tensor in tensors.items()}
    return Tensors(source=str(path), specs=specs, fetch=fetch)


def _shape(tensor: Any) -> tuple[int, ...]:
    # GGUF stores the dimensions in reverse order.
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str:
    """Return Hugging Face's name of a tensor, or the name unchanged if it is unknown, so that `Tensors.select` refuses it."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer, _, rest = name.removeprefix("blk.").partition(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}" if rest in _LAYER_NAMES else name


def _deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection for rotary embedding of the two halves of a head.

    GGUF files of Llama models are ordered for rotation of adjacent rows instead.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
