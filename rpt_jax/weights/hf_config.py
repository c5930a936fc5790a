"""Conversion between `ModelConfig` and Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.infra.json_object import parse_json_object
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import SCALINGS, Scaling

MODEL_CONFIG_FILE = "config.json"
# Key of the tokenizer's fingerprint in config.json. Only rpt_jax writes and reads it; other readers ignore it.
FINGERPRINT_KEY = "tokenizer_sha256"
# Supported values of `model_type` -> names of the models, for error messages.
_FAMILIES = {"llama": "Llama 3 and SmolLM2", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3 without experts"}
# Options that are not supported: key of config.json -> values that turn the option off (or are the default).
_UNSUPPORTED_OPTIONS = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "hidden_act": (None, "swish", "silu"),  # Two names of one function; messages recommend the last.
}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises: UserError if the file contains something else; OSError if it cannot be read.
    """
    return parse_json_object(path, path.read_bytes())


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
        return _check_number(path, name, content.get(name, default), expected)

    # The sizes of attention, which depend on each other.
    width = number("hidden_size", int)
    heads = number("num_attention_heads", int)
    kv_heads = number("num_key_value_heads", int, heads)
    head_size = width // heads if content.get("head_dim") is None else number("head_dim", int)
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
    """Refuse options that are not implemented. Raises: UserError that names the file and the key."""
    for name, supported in _UNSUPPORTED_OPTIONS.items():
        if content.get(name) not in supported:
            raise UserError(
                f"{path}: {name}={content[name]!r} is not supported; expected {supported[-1]!r}.", field=str(path)
            )
    # Qwen2 config files have the first `max_window_layers` layers use full attention, and the others a sliding window.
    full_layers = content.get("max_window_layers", 0)
    has_sliding_layers = content.get("use_sliding_window") and full_layers < content.get("num_hidden_layers", 0)
    if has_sliding_layers or "sliding_attention" in (content.get("layer_types") or ()):
        raise UserError(f"{path}: layers with sliding-window attention are not supported.", field=str(path))


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
            fields.setdefault("original_max_position_embeddings", context)

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
