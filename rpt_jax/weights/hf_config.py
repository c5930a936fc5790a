"""Conversion between `ModelConfig` and Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import SCALINGS, Scaling
from rpt_jax.weights.model_files import parse_object

# Key of the tokenizer's fingerprint in config.json. Only rpt_jax writes and reads it; other readers ignore it.
FINGERPRINT_KEY = "tokenizer_sha256"
# Supported values of `model_type` -> names of the models, for error messages.
DENSE_FAMILIES = {"llama": "Llama 3 and SmolLM2", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3 without experts"}
_FAMILIES = DENSE_FAMILIES | {"qwen3_moe": "Qwen3 with experts"}
# Keys of config.json that are read.
_READ_KEYS = {
    FINGERPRINT_KEY,
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
}
# Keys that are read of a model with experts, and unknown in others.
_EXPERT_KEYS = {
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
}
# Options that are not supported: key of config.json -> values that turn the option off (or are the default).
_UNSUPPORTED_OPTIONS = {
    "attention_bias": (None, False),
    "hidden_act": (None, "swish", "silu"),  # Two names of one function; messages recommend the last.
    "is_causal": (None, True),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
}
# Keys without an effect on the logits: for training, sampling and bookkeeping. So are "*_token_id" and names with "_" in front.
_NEUTRAL_KEYS = {
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "do_sample",
    "dtype",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_new_tokens",
    "model_max_length",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "router_aux_loss_coef",
    "seq_length",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
# What other architectures have and the decoder does not, by the keys of config.json that turn it on.
_FEATURE_KEYS = {
    "attention_chunk_size": "chunked attention",
    "attention_multiplier": "other scales of attention scores",
    "attn_logit_softcapping": "a soft cap of the attention scores",
    "cross_attention_layers": "cross-attention to images",
    "dual_chunk_attention_config": "dual chunk attention",
    "embedding_multiplier": "scaled embeddings",
    "final_logit_softcapping": "a soft cap of the logits",
    "first_k_dense_replace": "dense layers before those with experts",
    "hidden_size_per_layer_input": "embeddings for every layer",
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_value_heads": "linear attention",
    "logits_scaling": "scaled logits",
    "logit_scale": "scaled logits",
    "mamba_d_state": "state-space layers",
    "moe_num_shared_experts": "shared experts",
    "n_shared_experts": "shared experts",
    "no_rope_layers": "layers without rotary embedding",
    "num_shared_experts": "shared experts",
    "query_pre_attn_scalar": "other scales of attention scores",
    "residual_multiplier": "scaled residual connections",
    "scoring_func": "another function of the router",
    "shared_expert_intermediate_size": "a shared expert",
    "shared_intermediate_size": "a shared expert",
    "sliding_window": "sliding-window attention",
    "ssm_state_size": "state-space layers",
    "text_config": "inputs other than text",
    "topk_group": "a choice of experts by groups",
}
# What an architecture has whose keys do not show it, by `model_type`.
_FAMILY_FEATURES = {
    "cohere": ("attention and feed-forward layer in parallel", "LayerNorm"),
    "cohere2": ("attention and feed-forward layer in parallel", "LayerNorm"),
    "deepseek_v2": ("multi-head latent attention",),
    "deepseek_v3": ("multi-head latent attention", "a router with a sigmoid"),
    "gemma": ("scaled embeddings", "norm weights around 0"),
    "gemma2": ("scaled embeddings", "norm weights around 0", "norms after attention and feed-forward layer"),
    "gemma3": ("scaled embeddings", "norm weights around 0", "norms after attention and feed-forward layer"),
    "gemma3_text": ("scaled embeddings", "norm weights around 0", "norms after attention and feed-forward layer"),
    "glm4": ("partial rotary embedding", "norms after attention and feed-forward layer"),
    "glm4_moe": ("partial rotary embedding", "a router with a sigmoid"),
    "gpt_oss": ("attention sinks", "biases of router and experts", "clamped activations"),
    "llama4_text": ("experts that scale their inputs",),
    "mixtral": ("other names of the experts' tensors",),
    "olmo2": ("norms after attention and feed-forward layer", "norms over all heads' queries and keys"),
    "olmo3": ("norms after attention and feed-forward layer", "norms over all heads' queries and keys"),
    "olmoe": ("norms over all heads' queries and keys",),
    "phi3": ("query, key and value in one tensor", "gate and up in one tensor"),
    "qwen2_moe": ("a gate of the shared expert",),
    "qwen3_5_moe": ("linear attention", "gates of attention"),
    "qwen3_5_text": ("linear attention", "gates of attention"),
    "qwen3_next": ("linear attention", "gates of attention", "partial rotary embedding"),
    "smollm3": ("layers without rotary embedding",),
    "starcoder2": ("LayerNorm", "a feed-forward layer without gate"),
}
_QWEN3_HEAD_SIZE = 128  # Of a config.json of this family without `head_dim`.
_QWEN2_FULL_LAYERS = 28  # Layers with full attention without `max_window_layers`.


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises: UserError if the file contains something else; OSError if it cannot be read.
    """
    return parse_object(path, path.read_bytes())


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json for an architecture, in the form that `transformers` 4 and 5 both read."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    architecture = family.capitalize()
    experts: dict[str, Any] = {}
    if config.experts:
        family, architecture = "qwen3_moe", "Qwen3Moe"
        experts = {
            "moe_intermediate_size": config.ffn,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalize_expert_weights,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    content: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        # With experts, the size of dense layers, of which there are none. Published files have that of a token's experts.
        "intermediate_size": config.ffn * max(1, config.experts_per_token),
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        **experts,
    }
    if config.rope_scaling:
        [rope_type] = (name for name, kind in SCALINGS.items() if isinstance(config.rope_scaling, kind))
        fields = {n: v for n, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
        content["rope_scaling"] = {"rope_type": rope_type} | fields
    return content


def check_family(path: Path, key: str, family: Any, families: Mapping[str, str], features: Sequence[str] = ()) -> None:
    """Check that a model family is supported.

    Args:
      path: file that names the family, for the message.
      key: key of the family in this file, for the message.
      family: its value.
      families: the supported values, with the names of their models.
      features: what the model has that is not implemented, as far as it is known.

    Raises: UserError with the supported families, and with what is missing.
    """
    if not isinstance(family, str) or family not in families:
        supported = ", ".join(f"'{name}' ({models})" for name, models in families.items())
        missing = f" because of {', '.join(features)}" if features else ""
        raise UserError(
            f"{path}: {key}={family!r} is not supported{missing}; choose one of: {supported}.", field=str(path)
        )


def _missing_features(content: dict[str, Any]) -> list[str]:
    """Return what a model has that the decoder does not, as far as its config.json tells."""
    features = list(_FAMILY_FEATURES.get(str(content.get("model_type")), ()))
    on = {key: content[key] for key in _FEATURE_KEYS if content.get(key)}
    if content.get("use_sliding_window") is False:
        on.pop("sliding_window", None)
    features += [
        f"{_FEATURE_KEYS[key]} ({key}={value!r})"
        if isinstance(value, int | float | str)
        else f"{_FEATURE_KEYS[key]} ({key})"
        for key, value in on.items()
    ]
    if content.get("hidden_act", content.get("hidden_activation")) not in (None, *_UNSUPPORTED_OPTIONS["hidden_act"]):
        features.append("another activation function")
    return features


def from_hf_config(content: dict[str, Any], path: Path) -> ModelConfig:
    """Return the architecture that a config.json describes.

    Args:
      content: the parsed file.
      path: the file, for messages.

    Raises: UserError that names the file and the key, for a value that is missing, invalid or not supported.
    """
    family = content.get("model_type")
    check_family(path, "model_type", family, _FAMILIES, _missing_features(content))
    _check_options(content, path)

    def number(name: str, expected: type, default: Any = None) -> Any:
        value = content.get(name)
        return _check_number(path, name, default if value is None else value, expected)

    # The sizes of attention, which depend on each other.
    width = number("hidden_size", int)
    heads = number("num_attention_heads", int)
    kv_heads = number("num_key_value_heads", int, heads)
    head_size = number("head_dim", int, _QWEN3_HEAD_SIZE if family == "qwen3" else max(1, width // heads))
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"{path}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, and "
            f"head_dim={head_size} must be even.",
            field=str(path),
        )

    # The rotary embedding, whose scaling may depend on the context.
    context = number("max_position_embeddings", int, ModelConfig.context)
    base, scaling = _read_rope(content, path, context)
    return ModelConfig(
        layers=number("num_hidden_layers", int),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=number("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size", int),
        vocab=number("vocab_size", int),
        rope_base=base,
        rope_scaling=scaling,
        norm_epsilon=number("rms_norm_eps", float),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=_check_bool(path, "tie_word_embeddings", content.get("tie_word_embeddings")),
        context=context,
        **(_read_experts(content, path) if family == "qwen3_moe" else {}),
    )


def _read_experts(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of `ModelConfig` about experts. Raises: UserError that names the file and the key."""
    # Layers without experts would need a second stack of layers.
    sparse_step = content.get("decoder_sparse_step")
    dense_layers = content.get("mlp_only_layers")
    if sparse_step not in (None, 1) or dense_layers:
        raise UserError(
            f"{path}: decoder_sparse_step={sparse_step!r} and mlp_only_layers={dense_layers!r}: dense layers between those with "
            "experts are not supported; expected 1 and [].",
            field=str(path),
        )
    # `transformers` has two names for the number of experts.
    key = "num_experts" if content.get("num_experts") is not None else "num_local_experts"
    experts = _check_number(path, key, content.get(key), int)
    per_token = _check_number(path, "num_experts_per_tok", content.get("num_experts_per_tok"), int)
    if per_token > experts or content.get("num_local_experts", experts) not in (None, experts):
        raise UserError(
            f"{path}: num_experts_per_tok={per_token} must be at most num_experts={experts}, and num_local_experts="
            f"{content.get('num_local_experts')!r}, its other name, equal to it.",
            field=str(path),
        )
    return {
        "experts": experts,
        "experts_per_token": per_token,
        "normalize_expert_weights": _check_bool(path, "norm_topk_prob", content.get("norm_topk_prob")),
    }


def _check_options(content: dict[str, Any], path: Path) -> None:
    """Refuse options that are not implemented, and unknown ones. Raises: UserError that names the file and the key."""
    for name, supported in _UNSUPPORTED_OPTIONS.items():
        if content.get(name) not in supported:
            raise UserError(
                f"{path}: {name}={content[name]!r} is not supported; expected {supported[-1]!r}.", field=str(path)
            )
    has_experts = content["model_type"] == "qwen3_moe"
    known = _READ_KEYS | _UNSUPPORTED_OPTIONS.keys() | _NEUTRAL_KEYS | (_EXPERT_KEYS if has_experts else set())
    unknown = [
        name
        for name, value in content.items()
        if name not in known and value is not None and not name.startswith("_") and not name.endswith("_token_id")
    ]
    if unknown:
        missing = [f"{_FEATURE_KEYS[name]} ({name}={content[name]!r})" for name in unknown if name in _FEATURE_KEYS]
        if missing:
            raise UserError(f"{path}: {', '.join(missing)} is not supported.", field=str(path))
        raise UserError(
            f"{path}: {', '.join(unknown)} is unknown and may change the model's results, so the model is not read. If it has no "
            f"effect on them, remove it from {path.name}.",
            field=str(path),
        )

    # Layers with a window at least as long as the context have full attention.
    window = content.get("sliding_window")
    context = content.get("max_position_embeddings", ModelConfig.context)
    if isinstance(window, int) and isinstance(context, int) and window >= context:
        return
    layer_types = content.get("layer_types") or []
    other_layers = layer_types != ["full_attention"] * len(layer_types) if isinstance(layer_types, list) else True
    # In Qwen models, the first layers have full attention, and the others a window if it is turned on. With experts, all layers
    # have the window, and Llama has no switch.
    full_layers = content.get("max_window_layers", _QWEN2_FULL_LAYERS)
    layers = content.get("num_hidden_layers")
    all_full = isinstance(full_layers, int) and isinstance(layers, int) and full_layers >= layers
    has_window = content.get("use_sliding_window") and (has_experts or not all_full)
    if other_layers or has_window or (content["model_type"] == "llama" and window is not None):
        raise UserError(
            f"{path}: layers with sliding-window or other attention are not supported (sliding_window={window!r}, "
            f"layer_types={layer_types!r}).",
            field=str(path),
        )


def _read_rope(content: dict[str, Any], path: Path, context: int) -> tuple[float, Scaling | None]:
    """Read the RoPE base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    given = {name: content[name] for name in ("rope_parameters", "rope_scaling") if content.get(name)}
    sections: dict[str, dict[str, Any]] = {}
    for name, fields in (given or {"rope_parameters": {}}).items():
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {name}={fields!r} must be an object.", field=str(path))
        # Older files have "type" instead of, or in addition to, "rope_type".
        defaults = {"rope_theta": content.get("rope_theta", 10_000.0), "rope_type": fields.get("type", "default")}
        sections[name] = defaults | {key: value for key, value in fields.items() if key != "type"}
    section, fields = sections.popitem()
    if any(other != fields for other in sections.values()):
        raise UserError(
            f"{path}: rope_parameters={given['rope_parameters']!r} and rope_scaling={given['rope_scaling']!r} differ; remove the "
            "one that the weights were not trained with.",
            field=str(path),
        )
    base = _check_number(path, "rope_theta", fields.pop("rope_theta"), float)
    rope_type = fields.pop("rope_type")
    if not isinstance(rope_type, str) or rope_type not in ("default", *SCALINGS):
        raise UserError(
            f"{path}: {section}: rope_type={rope_type!r} is not one of: default, {', '.join(SCALINGS)}.",
            field=str(path),
        )
    types: dict[str, Any] = {}
    if rope_type != "default":
        types = typing.get_type_hints(SCALINGS[rope_type])
        if "original_max_position_embeddings" in types:
            # A value outside of the section takes precedence.
            fields.setdefault("original_max_position_embeddings", context)
            fields |= {key: content[key] for key in ("original_max_position_embeddings",) if content.get(key)}

    if rope_type == "yarn":
        _read_yarn_factors(path, section, fields, context)

    # Refuse fields that would change the frequencies in a way that is not implemented.
    partial = fields.pop("partial_rotary_factor", content.get("partial_rotary_factor"))
    unknown = sorted(fields.keys() - types.keys())
    if not unknown and partial not in (None, 1.0):
        unknown = ["partial_rotary_factor"]
    if unknown:
        raise UserError(
            f"{path}: {section}: {', '.join(unknown)} is not supported for rope_type={rope_type!r}.", field=str(path)
        )
    if rope_type == "default":
        return base, None

    # Check the types of the fields, and that none is missing.
    values = {
        name: _check_rope_field(path, f"{section}.{name}", value, types[name])
        for name, value in fields.items()
        if value is not None
    }
    required = [f.name for f in dataclasses.fields(SCALINGS[rope_type]) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(
            f"{path}: {section} with rope_type={rope_type!r} requires {', '.join(missing)}.", field=str(path)
        )
    if rope_type == "yarn" and base <= 1:
        raise UserError(f"{path}: rope_theta={base} must be above 1 with rope_type='yarn'.", field=str(path))
    if rope_type == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(
            f"{path}: {section}.high_freq_factor={values['high_freq_factor']} must be above "
            f"low_freq_factor={values['low_freq_factor']}.",
            field=str(path),
        )
    return base, SCALINGS[rope_type](**values)


def _read_yarn_factors(path: Path, section: str, fields: dict[str, Any], context: int) -> None:
    """Set `factor` and `attention_factor` as `transformers` does; remove the fields that they are computed from."""

    def number(name: str) -> float:
        return _check_number(path, f"{section}.{name}", fields[name], float)

    if "factor" in fields and fields["factor"] is None:
        fields["factor"] = context / number("original_max_position_embeddings")
    # Without a factor, they are refused by the caller.
    has_scales = "factor" in fields and fields.get("mscale") and fields.get("mscale_all_dim")
    if has_scales and fields.get("attention_factor") is None:
        log_factor = math.log(max(number("factor"), 1.0))
        fields["attention_factor"] = (0.1 * number("mscale") * log_factor + 1) / (
            0.1 * number("mscale_all_dim") * log_factor + 1
        )
    for name in ("mscale", "mscale_all_dim"):
        fields.pop(name, None)


def _check_rope_field(path: Path, name: str, value: Any, expected: Any) -> Any:
    if expected is bool:
        return _check_bool(path, name, value)
    return _check_number(path, name, value, int if expected is int else float)


def _check_bool(path: Path, name: str, value: Any) -> bool:
    """Return a boolean, False for none. Raises: UserError that names the file and the key."""
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {name}={value!r} must be true or false.", field=str(path))
    return bool(value)


def _check_number(path: Path, name: str, value: Any, expected: type) -> Any:
    """Return a positive number as the expected type. Raises: UserError that names the file and the key."""
    if isinstance(value, bool) or not isinstance(value, int | expected) or not 0 < value < 10**12:
        kind = "number" if expected is float else "integer"
        raise UserError(f"{path}: {name}={value!r} must be a positive {kind}.", field=str(path))
    return expected(value)
