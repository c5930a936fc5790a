"""Conversion between `ModelConfig` and Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import SCALINGS, Scaling
from rpt_jax.weights.model_files import parse_object

# Key of the tokenizer's fingerprint in config.json. Only rpt_jax writes and reads it; other readers ignore it.
FINGERPRINT_KEY = "tokenizer_sha256"
# Supported values of `model_type` -> names of the models, for error messages.
_FAMILIES = {"llama": "Llama 3 and SmolLM2", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3 without experts"}
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
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
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
    content: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
    }
    if config.rope_scaling:
        [rope_type] = (name for name, kind in SCALINGS.items() if isinstance(config.rope_scaling, kind))
        fields = {n: v for n, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
        content["rope_scaling"] = {"rope_type": rope_type} | fields
    return content


def check_family(path: Path, key: str, family: Any) -> None:
    """Check that a model family is supported.

    Args:
      path: file that names the family, for the message.
      key: key of the family in this file, for the message.
      family: its value.

    Raises: UserError with the supported families.
    """
    if not isinstance(family, str) or family not in _FAMILIES:
        supported = ", ".join(f"'{name}' ({models})" for name, models in _FAMILIES.items())
        raise UserError(f"{path}: {key}={family!r} is not supported; choose one of: {supported}.", field=str(path))


def from_hf_config(content: dict[str, Any], path: Path) -> ModelConfig:
    """Return the architecture that a config.json describes.

    Args:
      content: the parsed file.
      path: the file, for messages.

    Raises: UserError that names the file and the key, for a value that is missing, invalid or not supported.
    """
    family = content.get("model_type")
    check_family(path, "model_type", family)
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
        ffn=number("intermediate_size", int),
        vocab=number("vocab_size", int),
        rope_base=base,
        rope_scaling=scaling,
        norm_epsilon=number("rms_norm_eps", float),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=bool(content.get("tie_word_embeddings", False)),
        context=context,
    )


def _check_options(content: dict[str, Any], path: Path) -> None:
    """Refuse options that are not implemented, and unknown ones. Raises: UserError that names the file and the key."""
    for name, supported in _UNSUPPORTED_OPTIONS.items():
        if content.get(name) not in supported:
            raise UserError(
                f"{path}: {name}={content[name]!r} is not supported; expected {supported[-1]!r}.", field=str(path)
            )
    known = _READ_KEYS | _UNSUPPORTED_OPTIONS.keys() | _NEUTRAL_KEYS
    unknown = [
        name
        for name, value in content.items()
        if name not in known and value is not None and not name.startswith("_") and not name.endswith("_token_id")
    ]
    if unknown:
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
    # In Qwen models, the first layers have full attention, and the others a window if it is turned on; Llama has no switch.
    full_layers = content.get("max_window_layers", _QWEN2_FULL_LAYERS)
    layers = content.get("num_hidden_layers")
    all_full = isinstance(full_layers, int) and isinstance(layers, int) and full_layers >= layers
    has_window = content.get("use_sliding_window") and not all_full
    if other_layers or has_window or (content["model_type"] == "llama" and window is not None):
        raise UserError(
            f"{path}: layers with sliding-window or other attention are not supported (sliding_window={window!r}, "
            f"layer_types={layer_types!r}).",
            field=str(path),
        )


def _read_rope(content: dict[str, Any], path: Path, context: int) -> tuple[float, Scaling | None]:
    """Read the RoPE base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    section = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    fields = content.get(section) or {}
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {section}={fields!r} must be an object.", field=str(path))
    fields = dict(fields)
    theta = fields.pop("rope_theta", content.get("rope_theta", 10_000.0))
    base = _check_number(path, "rope_theta", theta, float)

    # Older files have "type" instead of, or in addition to, "rope_type".
    old_type = fields.pop("type", "default")
    rope_type = fields.pop("rope_type", old_type)
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
    return base, SCALINGS[rope_type](**values)


def _read_yarn_factors(path: Path, section: str, fields: dict[str, Any], context: int) -> None:
    """Set `factor` and `attention_factor` as `transformers` does; remove the fields that they are computed from."""

    def number(name: str) -> float:
        return _check_number(path, f"{section}.{name}", fields[name], float)

    if "factor" in fields and fields["factor"] is None:
        fields["factor"] = context / number("original_max_position_embeddings")
    if fields.get("mscale") and fields.get("mscale_all_dim") and fields.get("attention_factor") is None:
        log_factor = math.log(max(number("factor"), 1.0))
        fields["attention_factor"] = (0.1 * number("mscale") * log_factor + 1) / (
            0.1 * number("mscale_all_dim") * log_factor + 1
        )
    for name in ("mscale", "mscale_all_dim"):
        fields.pop(name, None)


def _check_rope_field(path: Path, name: str, value: Any, expected: Any) -> Any:
    if expected is bool:
        return bool(value)
    return _check_number(path, name, value, int if expected is int else float)


def _check_number(path: Path, name: str, value: Any, expected: type) -> Any:
    """Return a positive number as the expected type. Raises: UserError that names the file and the key."""
    if isinstance(value, bool) or not isinstance(value, int | expected) or not 0 < value < 10**12:
        kind = "number" if expected is float else "integer"
        raise UserError(f"{path}: {name}={value!r} must be a positive {kind}.", field=str(path))
    return expected(value)
