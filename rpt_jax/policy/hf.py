"""Policies on disk, in the form of Hugging Face: config.json, model.safetensors and the tokenizer's file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rpt_jax.errors import UserError
from rpt_jax.policy.presets import Shape
from rpt_jax.policy.transformer import Params

WEIGHTS = "model.safetensors"
_FINGERPRINT = "tokenizer_sha256"  # Our own field of config.json; other readers ignore it.
_TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
# Ours: (theirs, number of our axes that are inputs). Theirs is always [outputs, inputs].
_LAYER = {
    "attention_norm": ("input_layernorm.weight", 0),
    "q": ("self_attn.q_proj.weight", 1),
    "k": ("self_attn.k_proj.weight", 1),
    "v": ("self_attn.v_proj.weight", 1),
    "q_bias": ("self_attn.q_proj.bias", 0),
    "k_bias": ("self_attn.k_proj.bias", 0),
    "v_bias": ("self_attn.v_proj.bias", 0),
    "q_norm": ("self_attn.q_norm.weight", 0),
    "k_norm": ("self_attn.k_norm.weight", 0),
    "o": ("self_attn.o_proj.weight", 3),
    "ffn_norm": ("post_attention_layernorm.weight", 0),
    "gate": ("mlp.gate_proj.weight", 1),
    "up": ("mlp.up_proj.weight", 1),
    "down": ("mlp.down_proj.weight", 1),
}


def save_policy(
    directory: str | Path, shape: Shape, params: Params, tokenizer_file: str | Path, fingerprint: str
) -> None:
    """Write a directory that `load_policy` and `transformers` read; float32, one file.

    `fingerprint` is the tokenizer's: token ids mean nothing to these weights under another one.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_TOP[name]: np.asarray(params[name]) for name in _TOP if name in params}
    for ours, (theirs, inputs) in _LAYER.items():
        for layer, leaf in enumerate(np.asarray(params["layers"].get(ours, ()))):
            rows = int(np.prod(leaf.shape[:inputs]))
            tensor = leaf.reshape(rows, -1).T if inputs else leaf.reshape(-1)
            tensors[f"model.layers.{layer}.{theirs}"] = np.ascontiguousarray(tensor)
    (directory / "config.json").write_text(
        json.dumps(_to_hf_config(shape) | {_FINGERPRINT: fingerprint}, indent=2) + "\n"
    )
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    if Path(tokenizer_file).parent.resolve() != directory.resolve():
        shutil.copy(tokenizer_file, directory)


def check_files(directory: str | Path) -> None:
    """Raises: UserError, naming every file of a policy that `directory` lacks."""
    needed = {name: (name,) for name in ("config.json", WEIGHTS)}
    needed["tokenizer.model or tokenizer.json"] = ("tokenizer.model", "tokenizer.json")
    lacking = [what for what, names in needed.items() if not any((Path(directory) / name).is_file() for name in names)]
    if lacking:
        raise UserError(
            f"policy.path='{directory}' must be the directory of a policy, and lacks {', '.join(lacking)}: put them there, or "
            "name another directory."
        )


def load_shape(directory: str | Path) -> tuple[Shape, str]:
    """Read shape and tokenizer fingerprint ("" where it is not known) from config.json.

    Raises: UserError, for a missing, broken or foreign one.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
        return _from_hf_config(config, path), str(config.get(_FINGERPRINT, ""))
    except OSError:
        raise UserError(
            f"policy.path='{directory}' has no config.json: it must be the directory of a policy "
            f"(config.json, {WEIGHTS}, tokenizer.model or tokenizer.json)."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def load_policy(directory: str | Path) -> tuple[Shape, Params, str]:
    """Read shape, float32 parameters and tokenizer fingerprint.

    Raises: UserError, naming the file and the tensor that is at fault.
    """
    (shape, fingerprint), path = load_shape(directory), Path(directory) / WEIGHTS
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); write or copy the weights again.") from None

    def take(name: str, dims: tuple[int, ...]) -> np.ndarray:
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise UserError(f"{path} lacks the tensor {name}.")
        if tensor.shape != dims:
            raise UserError(f"{path}: {name} has shape {tensor.shape}, expected {dims} by config.json.")
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity.")
        return tensor.astype(np.float32)

    params: Params = {"layers": {}}
    for name, dims in _leaf_dims(shape).items():
        if name in _TOP:
            params[name] = take(_TOP[name], dims)
            continue
        theirs, inputs = _LAYER[name]
        rows, columns = int(np.prod(dims[:inputs])), int(np.prod(dims[inputs:]))
        on_disk = (columns, rows) if inputs else (columns,)
        layers = [take(f"model.layers.{i}.{theirs}", on_disk).T.reshape(dims) for i in range(shape.layers)]
        params["layers"][name] = np.stack(layers)
    if tensors:
        raise UserError(f"{path} holds tensors that this policy has no place for: {', '.join(sorted(tensors)[:5])}.")
    return shape, params, fingerprint


def _leaf_dims(s: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, a layer's without the layer axis."""
    group = s.heads // s.kv_heads
    dims: dict[str, tuple[int, ...]] = {
        "embedding": (s.vocab, s.width),
        "norm": (s.width,),
        "attention_norm": (s.width,),
        "q": (s.width, s.kv_heads, group, s.head_size),
        "k": (s.width, s.kv_heads, s.head_size),
        "v": (s.width, s.kv_heads, s.head_size),
        "o": (s.kv_heads, group, s.head_size, s.width),
        "ffn_norm": (s.width,),
        "gate": (s.width, s.ffn),
        "up": (s.width, s.ffn),
        "down": (s.ffn, s.width),
    }
    if not s.tied:
        dims["head"] = (s.vocab, s.width)
    if s.qkv_bias:
        dims["q_bias"] = (1, s.kv_heads, 1, group, 1, s.head_size)
        dims["k_bias"] = dims["v_bias"] = (1, s.kv_heads, 1, 1, s.head_size)
    if s.qk_norm:
        dims["q_norm"] = dims["k_norm"] = (s.head_size,)
    return dims


def _to_hf_config(s: Shape) -> dict[str, Any]:
    kind = "qwen3" if s.qk_norm else "qwen2" if s.qkv_bias else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": s.layers,
        "hidden_size": s.width,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_size,
        "intermediate_size": s.ffn,
        "vocab_size": s.vocab,
        "rope_theta": s.rope_base,
        "rms_norm_eps": s.norm_epsilon,
        "tie_word_embeddings": s.tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def _from_hf_config(config: Any, path: Path) -> Shape:
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: model_type={kind!r} is not one of: llama, qwen2, qwen3.")
    if config.get("rope_scaling"):
        raise UserError(f"{path}: rope_scaling={config['rope_scaling']} is not supported.")

    def number(name: str, kind: type) -> Any:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < 10**12:
            raise UserError(f"{path}: {name}={value!r} must be a positive {'number' if kind is float else 'integer'}.")
        return kind(value)

    width, heads, kv_heads = (number(n, int) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_size = width // heads if config.get("head_dim") is None else number("head_dim", int)
    if heads % kv_heads or head_size % 2:
        raise UserError(
            f"{path}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, and "
            f"head_dim={head_size} even."
        )
    return Shape(
        layers=number("num_hidden_layers", int),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=number("intermediate_size", int),
        vocab=number("vocab_size", int),
        rope_base=number("rope_theta", float),
        norm_epsilon=number("rms_norm_eps", float),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
    )
