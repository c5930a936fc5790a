"""Policies on disk, in the form of Hugging Face: config.json, safetensors and the tokenizer's files; GGUF as a source."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.weights.gguf import gguf_shape, gguf_tensors
from rpt_jax.weights.gguf_header import is_gguf
from rpt_jax.weights.hf_config import CONFIG, FINGERPRINT, from_config, read_config, to_config
from rpt_jax.weights.safetensors_io import INDEX, WEIGHTS, Spec, Tensors, open_safetensors, write_safetensors

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


def check_files(source: str | Path) -> None:
    """Raises: UserError, naming every file of a policy that `source` lacks."""
    if is_gguf(source):
        if not Path(source).is_file():
            raise UserError(f"policy.path='{source}' does not exist.")
        return
    needed = {CONFIG: (CONFIG,), WEIGHTS: (WEIGHTS, INDEX)}
    needed["tokenizer.model or tokenizer.json"] = ("tokenizer.model", "tokenizer.json")
    lacking = [what for what, names in needed.items() if not any((Path(source) / name).is_file() for name in names)]
    if lacking:
        raise UserError(
            f"policy.path='{source}' must be the directory of a policy, or a .gguf file, and lacks {', '.join(lacking)}: put "
            "them there, or name another one."
        )


def load_model_config(source: str | Path) -> tuple[ModelConfig, str]:
    """Read shape and tokenizer fingerprint ("" where it is not known) from config.json or from a GGUF file's header.

    Raises: UserError, for a missing, broken or foreign one.
    """
    if is_gguf(source):
        return gguf_shape(Path(source)), ""
    path = Path(source) / CONFIG
    try:
        config = read_config(path)
    except OSError:
        raise UserError(
            f"policy.path='{source}' has no config.json: it must be the directory of a policy "
            f"(config.json, {WEIGHTS}, tokenizer.model or tokenizer.json), or a .gguf file."
        ) from None
    return from_config(config, path), str(config.get(FINGERPRINT, ""))


def open_weights(source: str | Path, shape: ModelConfig) -> Tensors:
    """Open the weights of a policy under Hugging Face's names, checked against `shape`.

    Raises: UserError, naming file and tensor, for one that is missing, that is not mapped or has another shape.
    """
    path = Path(source)
    tensors = gguf_tensors(path, shape) if is_gguf(source) else open_safetensors(path)
    head = _TOP["head"]
    if shape.tied and head in tensors.specs and _TOP["embedding"] in tensors.specs:
        # Some exports write a tied matrix twice.
        if not np.array_equal(tensors.read(head), tensors.read(_TOP["embedding"])):
            raise UserError(f"{tensors.source}: {head} is not the embedding, but config.json has tie_word_embeddings.")
        tensors = tensors.without(head)
    return tensors.check((name, on_disk) for name, on_disk, _, _ in _names(shape))


def load_policy(source: str | Path, shardings: Any = None) -> tuple[ModelConfig, Params, str]:
    """Read shape, float32 parameters and tokenizer fingerprint.

    The host holds one tensor of the files at a time, in their dtype, and no device more than its own share.

    Args:
      source: a directory in the form of Hugging Face, or a GGUF file.
      shardings: tree of NamedShardings like the parameters; without it they go to the default device.

    Raises: UserError, naming the file and the tensor that is at fault.
    """
    shape, fingerprint = load_model_config(source)
    tensors, dims = open_weights(source, shape), _leaf_dims(shape)
    params: Params = {"layers": {}}
    for name, _, ours, layer in _names(shape):
        if layer is None:
            sharding = shardings and shardings[ours]
            params[ours] = jax.block_until_ready(_put(tensors.read(name), sharding).astype(jnp.float32))
            continue
        inputs, sharding = _LAYER[ours][1], shardings and shardings["layers"][ours]
        if layer == 0:
            params["layers"][ours] = _empty_stack((shape.layers, *dims[ours]), sharding)
        # Not kept in a name of its own, which would hold this tensor while the next one is read.
        params["layers"][ours] = _write_layer(
            params["layers"][ours],
            _put(tensors.read(name), sharding and _on_disk(sharding, inputs)),
            layer,
            dims[ours],
            inputs,
            sharding,
        )
        # Waited for, or reading would run ahead and the tensors of many layers wait on the host.
        jax.block_until_ready(params["layers"][ours])
    return shape, params, fingerprint


def _put(tensor: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """Put a tensor where it belongs, in memory of its own.

    On the CPU, JAX makes arrays of NumPy's own memory where it can, and lets go of that only in the call after the array's
    end: without the copy, a tensor would still be there while the next one is read.
    """
    if sharding is None:
        return jnp.asarray(tensor)
    return jax.block_until_ready(
        _copy(jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index]))
    )


_copy = jax.jit(jnp.copy)


def _on_disk(sharding: NamedSharding, inputs: int) -> NamedSharding:
    """Return how a layer's tensor as it is on disk, [outputs, inputs], is split like the parameter that it becomes."""
    axes = sharding.spec[1:]
    parts = (axes[inputs:], axes[:inputs]) if inputs else (axes,)
    # Of the axes that are one on disk, the first that is longer than one is the only one that is ever split.
    merged = (next((axis for axis in part if axis is not None), None) for part in parts)
    return NamedSharding(sharding.mesh, PartitionSpec(*merged))


@functools.partial(jax.jit, static_argnames=("dims", "sharding"))
def _empty_stack(dims: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    stack = jnp.zeros(dims, jnp.float32)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


@functools.partial(jax.jit, static_argnames=("dims", "inputs", "sharding"), donate_argnames="stack")
def _write_layer(
    stack: jax.Array,
    tensor: jax.Array,
    layer: int,
    dims: tuple[int, ...],
    inputs: int,
    sharding: NamedSharding | None,
) -> jax.Array:
    ours = (tensor.T if inputs else tensor).reshape(dims).astype(jnp.float32)
    stack = jax.lax.dynamic_update_index_in_dim(stack, ours, layer, 0)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


def save_policy(
    directory: str | Path, shape: ModelConfig, params: Params, tokenizer_file: str | Path, fingerprint: str
) -> None:
    """Write a directory that `load_policy` and `transformers` read, in float32, one tensor after the other.

    `fingerprint` is the tokenizer's: token ids mean nothing to these weights under another one. The files beside
    `tokenizer_file` that belong to it (chat template, special and stop ids) come along. Of several processes one writes.
    """
    tensors = params_as_tensors(shape, lambda path: functools.reduce(operator.getitem, path, params))
    config = to_config(shape) | {"torch_dtype": "float32", FINGERPRINT: fingerprint}
    if is_leader():
        write_policy(Path(directory), config, tensors, read_tokenizer_files(tokenizer_file))
    else:
        for name in tensors.specs:
            tensors.read(name)  # Every process must ask for what lies with several.


def write_policy(directory: Path, config: dict[str, Any], tensors: Tensors, files: dict[str, bytes]) -> None:
    """Write config.json, the weights and the tokenizer's files into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory, tensors)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    # The last one, because it makes a directory a policy's.
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def params_as_tensors(shape: ModelConfig, leaf: Callable[[tuple[str, ...]], Any]) -> Tensors:
    """Our parameters as float32 tensors under Hugging Face's names, one parameter's layers after the other.

    Args:
      leaf: gives a parameter, with its layer axis, by its path in the tree; on the host or sharded over devices.

    Raises: UserError on reading, where a parameter is not of `shape`.
    """
    ours = _leaf_dims(shape)
    places = {name: (dims, parameter, layer) for name, dims, parameter, layer in _names(shape)}

    def fetch(name: str) -> np.ndarray:
        dims, parameter, layer = places[name]
        array = leaf((parameter,) if layer is None else ("layers", parameter))
        expected = ours[parameter] if layer is None else (shape.layers, *ours[parameter])
        if array.shape != expected:
            raise UserError(f"the parameter {parameter} has shape {array.shape}, expected {expected} of its policy.")
        array = to_host(array if layer is None else array[layer])
        return array.reshape(dims[::-1]).T if layer is not None and _LAYER[parameter][1] else array.reshape(dims)

    return Tensors("the policy", {n: Spec(np.dtype(np.float32), place[0]) for n, place in places.items()}, fetch)


def _layer_name(ours: str, layer: int) -> str:
    return f"model.layers.{layer}.{_LAYER[ours][0]}"


def _names(shape: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str, int | None]]:
    """Yield of every tensor on disk its name, its dimensions, our name and the layer (None outside of the layers)."""
    dims = _leaf_dims(shape)
    for name in _TOP:
        if name in dims:
            yield _TOP[name], dims[name], name, None
    for name, (_, inputs) in _LAYER.items():
        if name in dims:
            rows, columns = (int(np.prod(part)) for part in (dims[name][:inputs], dims[name][inputs:]))
            for layer in range(shape.layers):
                yield _layer_name(name, layer), (columns, rows) if inputs else (columns,), name, layer


def _leaf_dims(s: ModelConfig) -> dict[str, tuple[int, ...]]:
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
