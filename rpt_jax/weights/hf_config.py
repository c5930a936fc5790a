"""Shapes as Hugging Face writes them: config.json, read and written for each family."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import SCALINGS, Scaling

CONFIG = "config.json"
FINGERPRINT = "tokenizer_sha256"  # Our own field; other readers ignore it.
# What model_type may be -> the models of that kind, for people who know these by their names only.
_FAMILIES = {"llama": "Llama 3 and SmolLM2", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3 without experts"}
# What the families could have and none of those we know of does: (field, the values that mean that it has not).
_ABSENT = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "hidden_act": (None, "silu", "swish"),
}


def read_config(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises: UserError, where the file holds something else; OSError, where it cannot be read."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return config


def to_config(s: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of a shape, in names that releases 4 and 5 of `transformers` read alike."""
    kind = "qwen3" if s.qk_norm else "qwen2" if s.qkv_bias else "llama"
    config = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": s.layers,
        "hidden_size": s.width,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_size,
        "intermediate_size": s.ffn,
        "vocab_size": s.vocab,
        "max_position_embeddings": s.context,
        "rope_theta": s.rope_base,
        "rms_norm_eps": s.norm_epsilon,
        "tie_word_embeddings": s.tied,
        "hidden_act": "silu",
    }
    if s.rope_scaling:
        [name] = (name for name, kind in SCALINGS.items() if isinstance(s.rope_scaling, kind))
        fields = {n: v for n, v in dataclasses.asdict(s.rope_scaling).items() if v is not None}
        config["rope_scaling"] = {"rope_type": name} | fields
    return config


def check_family(where: str, family: Any) -> None:
    """Refuse a family that is not ours, with those that are. Raises: UserError."""
    if not isinstance(family, str) or family not in _FAMILIES:
        ours = ", ".join(f"'{name}' ({models})" for name, models in _FAMILIES.items())
        raise UserError(f"{where}={family!r} is not among the architectures of rpt_jax: {ours}.")


def from_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Read a shape. Raises: UserError, naming `path` and the field, for anything that we do not have or cannot read."""
    kind = config.get("model_type")
    check_family(f"{path}: model_type", kind)
    _refuse_options(config, path)

    def number(name: str, expected: type, default: Any = None) -> Any:
        return _number(path, name, config.get(name, default), expected)

    width, heads = number("hidden_size", int), number("num_attention_heads", int)
    kv_heads = number("num_key_value_heads", int, heads)
    head_size = width // heads if config.get("head_dim") is None else number("head_dim", int)
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"{path}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, and "
            f"head_dim={head_size} even."
        )
    context = number("max_position_embeddings", int, ModelConfig.context)
    base, scaling = _rope(config, path, context)
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
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        context=context,
    )


def _refuse_options(config: dict[str, Any], path: Path) -> None:
    for name, absent in _ABSENT.items():
        if config.get(name) not in absent:
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; what is: {absent[-1]!r}.")
    slides = config.get("use_sliding_window") and config.get("max_window_layers", 0) < config.get(
        "num_hidden_layers", 0
    )
    if slides or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(f"{path}: it has layers with a sliding window, which are not supported.")


def _rope(config: dict[str, Any], path: Path, context: int) -> tuple[float, Scaling | None]:
    """Read base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    fields = config.get(name) or {}
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {name}={fields!r} must be an object.")
    fields = dict(fields)
    base = _number(path, "rope_theta", fields.pop("rope_theta", config.get("rope_theta", 10_000.0)), float)
    # The older name of the same field may stand beside it.
    old = fields.pop("type", "default")
    kind = fields.pop("rope_type", old)
    if kind != "default" and kind not in SCALINGS:
        raise UserError(f"{path}: {name}: rope_type={kind!r} is not one of: default, {', '.join(SCALINGS)}.")
    if kind == "default":
        wanted: dict[str, Any] = {}
    else:
        wanted = typing.get_type_hints(SCALINGS[kind])
        if "original_max_position_embeddings" in wanted:
            fields.setdefault("original_max_position_embeddings", context)
    partial = fields.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if unknown := sorted({*fields} - {*wanted}) or ([] if partial in (None, 1.0) else ["partial_rotary_factor"]):
        raise UserError(f"{path}: {name}: {', '.join(unknown)} is nothing that rope_type={kind!r} has here.")
    if kind == "default":
        return base, None
    values = {n: _field(path, f"{name}.{n}", value, wanted[n]) for n, value in fields.items() if value is not None}
    required = [f.name for f in dataclasses.fields(SCALINGS[kind]) if f.default is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise UserError(f"{path}: {name} with rope_type={kind!r} lacks {', '.join(missing)}.")
    return base, SCALINGS[kind](**values)


def _field(path: Path, name: str, value: Any, expected: Any) -> Any:
    if expected is bool:
        return bool(value)
    return _number(path, name, value, int if expected is int else float)


def _number(path: Path, name: str, value: Any, expected: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | expected) or not 0 < value < 10**12:
        raise UserError(f"{path}: {name}={value!r} must be a positive {'number' if expected is float else 'integer'}.")
    return expected(value)
