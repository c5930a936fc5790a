"""Architecture and weights of a GGUF file, with the tensor names and row order of Hugging Face."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Llama3, llama3_divisors, rope_frequencies
from rpt_jax.weights.gguf_header import header_value, open_gguf, open_tensors
from rpt_jax.weights.hf_config import DENSE_FAMILIES, check_family, from_hf_config
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


# Keys of the header below the name of the architecture that are read or compared with others.
_READ_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Keys without an effect on the results. The size of the vocabulary follows from the tensors.
_NEUTRAL_KEYS = {"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
# Keys of options that are not supported -> value that turns the option off.
_OFF_VALUES = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}
# Beginnings of keys that only adapters, image encoders and diffusion models have.
_OTHER_MODELS = ("adapter.", "clip.", "diffusion.")


def gguf_model_config(path: Path) -> ModelConfig:
    """Read the architecture from the header.

    Raises: UserError for an architecture or an option that is not supported, and for a key of the architecture that is unknown.
    """
    family = header_value(path, "general.architecture")
    check_family(path, "general.architecture", family, DENSE_FAMILIES)
    header = _architecture_header(path, family)

    def value(key: str) -> Any:
        if key not in header:
            raise UserError(f"{path}: the header has no {family}.{key}.", field=str(path))
        return header[key]

    width = value("embedding_length")
    heads = value("attention.head_count")
    head_size = header.get("attention.key_length", width // heads if heads >= 1 else 0)
    if head_size < 1:
        raise UserError(
            f"{path}: {family}.embedding_length={width!r}, {family}.attention.head_count={heads!r} and "
            f"{family}.attention.key_length={head_size!r} must be positive integers.",
            field=str(path),
        )
    _check_attention(path, family, header, head_size)

    # The size of the vocabulary, tied embeddings and the scaling of Llama 3 are not in the header, but follow from the tensors.
    tensors = {tensor.name: tensor for tensor in open_tensors(path)}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing.", field=str(path))
    if len(shape := tensors["token_embd.weight"].shape) != 2:
        raise UserError(
            f"{path}: tensor token_embd.weight has {len(shape)} axes, not 2. The file is damaged; get it again.",
            field=str(path),
        )

    # Build the equivalent config.json, which `from_hf_config` checks.
    base = float(header.get("rope.freq_base", 10_000.0))
    config = {
        "model_type": family,
        "num_hidden_layers": value("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": value("feed_forward_length"),
        # The size in the header does not include padding of the vocabulary.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": value("context_length"),
        "rope_theta": base,
        "rms_norm_eps": _shortest_decimal(value("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_scaling": _rope_scaling(path, family, header, tensors.get(_ROPE_DIVISORS), head_size, base),
    }
    return from_hf_config(config, path)


def _architecture_header(path: Path, family: str) -> dict[str, Any]:
    """Return the values of the keys below `family`, without it. Raises: UserError for one that might change the results."""
    names = list(open_gguf(path).fields)
    if others := [name for name in names if name.startswith(_OTHER_MODELS)]:
        raise UserError(f"{path} is not a language model: its header has {', '.join(others[:3])}.", field=str(path))
    header = {
        name.removeprefix(f"{family}."): header_value(path, name) for name in names if name.startswith(f"{family}.")
    }
    for key, value in header.items():
        if key in _OFF_VALUES:
            if value != _OFF_VALUES[key]:
                raise UserError(
                    f"{path}: {family}.{key}={value!r} is not supported; expected {_OFF_VALUES[key]!r}.",
                    field=str(path),
                )
        elif key not in _READ_KEYS | _NEUTRAL_KEYS:
            raise UserError(
                f"{path}: {family}.{key}={value!r} is unknown and may change the model's results, so the file is not read. "
                "Use the model's directory with config.json and safetensors instead.",
                field=str(path),
            )
        elif key in _READ_KEYS and key != "rope.scaling.type" and not isinstance(value, int | float):
            raise UserError(f"{path}: {family}.{key} must be one number, the same for all layers.", field=str(path))
    return header


def _check_attention(path: Path, family: str, header: dict[str, Any], head_size: int) -> None:
    """Refuse partial rotary embedding, heads of several sizes, another scale and a window shorter than the context."""
    context = header.get("context_length", 0)
    supported = {
        "rope.dimension_count": lambda value: value == head_size,
        "attention.value_length": lambda value: value == head_size,
        "attention.scale": lambda value: math.isclose(value, head_size**-0.5, rel_tol=1e-5),
        "attention.sliding_window": lambda value: value == 0 or value >= context,
    }
    for key, is_supported in supported.items():
        value = header.get(key)
        if value is not None and not is_supported(value):
            raise UserError(
                f"{path}: {family}.{key}={value!r} is not supported with heads of size {head_size} and a context of {context}; "
                "only full attention with rotary embedding of whole heads is.",
                field=str(path),
            )


def _shortest_decimal(value: float) -> float:
    """Return a float32 of the header as it was written: 1e-05 is stored as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    path: Path, family: str, header: dict[str, Any], divisors: Any, head_size: int, base: float
) -> dict[str, Any] | None:
    """Return the value of `rope_scaling` in an equivalent config.json."""
    # A factor without a type is that of linear scaling, also under its older name.
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0))
    kind = header.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    # Writers store `attention_factor` of config.json under either key; an attn_factor of 1 is the default, no factor.
    attention_keys = [key for key in ("rope.scaling.yarn_attn_factor",) if key in header]
    if header.get("rope.scaling.attn_factor", 1.0) != 1.0:
        attention_keys.append("rope.scaling.attn_factor")
    yarn_keys = [*attention_keys, *(key for key in header if key.startswith("rope.scaling.yarn_beta"))]
    ignored = yarn_keys if kind != "yarn" else attention_keys[1:]
    if ignored or (divisors is not None and kind != "none"):
        raise UserError(
            f"{path}: {', '.join(f'{family}.{key}' for key in ignored) or _ROPE_DIVISORS} is not supported together with "
            f"{family}.rope.scaling.type='{kind}' and the header's other factors.",
            field=str(path),
        )
    if divisors is not None:
        return _llama3_scaling(path, np.asarray(divisors.data, np.float32), head_size, base)
    if kind == "none":
        return None
    fields = {"rope_type": kind, "factor": _shortest_decimal(factor)}
    if kind == "yarn":
        fields["original_max_position_embeddings"] = header.get(
            "rope.scaling.original_context_length", header.get("context_length")
        )
        optional = {
            "attention_factor": header[attention_keys[0]] if attention_keys else None,
            "beta_fast": header.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": header.get("rope.scaling.yarn_beta_slow"),
        }
        fields |= {name: _shortest_decimal(value) for name, value in optional.items() if value is not None}
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

    tensors = {_hf_name(tensor.name): tensor for tensor in open_tensors(path) if tensor.name != _ROPE_DIVISORS}
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
