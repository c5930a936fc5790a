"""Policies in Hugging Face format (config.json, safetensors, tokenizer files); GGUF files can be loaded, too."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params
from rpt_jax.weights.gguf import gguf_model_config, gguf_tensors
from rpt_jax.weights.hf_config import FINGERPRINT_KEY, from_hf_config, read_json_object, to_hf_config
from rpt_jax.weights.model_files import (
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    MODEL_CONFIG_FILE,
    SPECIAL_ID_KEYS,
    WEIGHTS_FILE,
    find_gguf,
    missing_hint,
    parse_object,
    split_parts,
)
from rpt_jax.weights.safetensors_io import Tensors, TensorSpec, open_safetensors, write_safetensors

# Parameter -> tensor on disk.
_TOP_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
# Parameter of a layer -> (tensor on disk, number of leading axes of the parameter that are inputs). Matrices on disk are
# [outputs, inputs], transposed relative to ours, with the head axes merged. 0 means a vector, which is only reshaped.
LAYER_NAMES = {
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
    "router": ("mlp.gate.weight", 1),
    "gate": ("mlp.gate_proj.weight", 1),
    "up": ("mlp.up_proj.weight", 1),
    "down": ("mlp.down_proj.weight", 1),
}
# Parameter that stacks the experts of a layer -> tensor of one expert on disk, by its number.
_EXPERT_NAMES = {
    "gate": "mlp.experts.{}.gate_proj.weight",
    "up": "mlp.experts.{}.up_proj.weight",
    "down": "mlp.experts.{}.down_proj.weight",
}


def check_files(source: str | Path, field: str = "policy.path") -> None:
    """Check that the files of a policy exist.

    Args:
      source: a directory in Hugging Face format, or a GGUF file.
      field: the config field or option that gives it, for errors.

    Raises: UserError, if it does not exist, or with a list of all missing files.
    """
    if gguf := find_gguf(source):
        for part in split_parts(gguf):
            if not part.is_file():
                raise UserError(f"{field}='{source}': {part} does not exist.{missing_hint(source)}", field=field)
        return
    if not Path(source).exists():
        raise UserError(
            f"{field}='{source}' does not exist: give a directory in Hugging Face format or a .gguf file.{missing_hint(source)}",
            field=field,
        )
    required = {
        MODEL_CONFIG_FILE: (MODEL_CONFIG_FILE,),
        WEIGHTS_FILE: (WEIGHTS_FILE, INDEX_FILE),
        "tokenizer.model or tokenizer.json": ("tokenizer.model", "tokenizer.json"),
    }
    missing = [
        description
        for description, names in required.items()
        if not any((Path(source) / name).is_file() for name in names)
    ]
    if missing:
        raise UserError(
            f"{field}='{source}' must be a directory in Hugging Face format or a .gguf file, but it has no "
            f"{', no '.join(missing)}.{missing_hint(source)}",
            field=field,
        )


def load_model_config(source: str | Path, field: str = "policy.path") -> tuple[ModelConfig, str]:
    """Read the architecture of a policy, and the fingerprint of its tokenizer ("" if it is not recorded).

    Args:
      source: a directory in Hugging Face format, or a GGUF file.
      field: the config field or option that gives it, for errors.

    Raises: UserError if config.json, or the header of the GGUF file, is missing, damaged or not supported.
    """
    if gguf := find_gguf(source):
        return gguf_model_config(gguf), ""
    path = Path(source) / MODEL_CONFIG_FILE
    try:
        content = read_json_object(path)
    except OSError:
        raise UserError(
            f"{field}='{source}' has no {MODEL_CONFIG_FILE}. Expected a .gguf file, or a directory with "
            f"{MODEL_CONFIG_FILE}, {WEIGHTS_FILE} and tokenizer.model or tokenizer.json.{missing_hint(source)}",
            field=field,
        ) from None
    return from_hf_config(content, path), str(content.get(FINGERPRINT_KEY, ""))


def open_weights(source: str | Path, config: ModelConfig) -> Tensors:
    """Open the weights of a policy, with Hugging Face's tensor names.

    Args:
      source: a directory in Hugging Face format, or a GGUF file.
      config: its architecture.

    Raises: UserError that names file and tensor, for a tensor that is missing, unknown or of another shape.
    """
    gguf = find_gguf(source)
    tensors = gguf_tensors(gguf, config) if gguf else open_safetensors(Path(source))
    head = _TOP_NAMES["head"]
    embedding = _TOP_NAMES["embedding"]
    if config.tied and head in tensors.specs and embedding in tensors.specs:
        # Some exports contain the tied matrix twice.
        if not np.array_equal(tensors.read(head), tensors.read(embedding)):
            raise UserError(
                f"{tensors.source}: {head} differs from the embedding, but {MODEL_CONFIG_FILE} has tie_word_embeddings.",
                field=tensors.source,
            )
        tensors = tensors.without(head)
    return tensors.select((name, entry.shape) for entry in _tensor_entries(config) for name in entry.names)


def load_policy(
    source: str | Path, abstract: Any = None, field: str = "policy.path"
) -> tuple[ModelConfig, Params, str]:
    """Load architecture, parameters and tokenizer fingerprint ("" if it is not recorded).

    The host holds one tensor at a time, or a layer's experts, in the dtype on disk, and each device only its own shards.

    Args:
      source: a directory in Hugging Face format, or a GGUF file.
      abstract: dtypes and shardings (`jax.ShapeDtypeStruct`) in a tree that has the structure of the parameters, and may have
        more; None for float32 on the default device.
      field: the config field or option that gives the source, for errors.

    Raises: UserError that names the file and the tensor that cannot be loaded.
    """
    config, fingerprint = load_model_config(source, field)
    tensors = open_weights(source, config)
    shapes = _param_shapes(config)
    params: Params = {"layers": {}}
    for entry in _tensor_entries(config):
        name = entry.parameter
        dtype = jnp.dtype(jnp.float32)
        sharding = None
        if abstract:
            expected = abstract[name] if entry.layer is None else abstract["layers"][name]
            dtype = expected.dtype
            sharding = expected.sharding
        if entry.layer is None:
            params[name] = jax.block_until_ready(_to_device(_read(tensors, entry), sharding).astype(dtype))
            continue

        # A layer's tensor is written into the parameter that stacks all layers.
        _, input_axes = LAYER_NAMES[name]
        if entry.layer == 0:
            params["layers"][name] = _zeros((config.layers, *shapes[name]), dtype, sharding)
        # The tensor is not bound to a variable, which would keep it alive while the next one is read.
        params["layers"][name] = _write_layer(
            params["layers"][name],
            _to_device(_read(tensors, entry), sharding and _sharding_on_disk(sharding, input_axes, entry.is_stack)),
            entry.layer,
            shape=shapes[name],
            input_axes=input_axes,
            sharding=sharding,
        )
        # Wait, so that reading does not run ahead of the transfers, with the tensors of many layers in host memory.
        jax.block_until_ready(params["layers"][name])
    return config, params, fingerprint


def _read(tensors: Tensors, entry: _TensorEntry) -> np.ndarray:
    """Return a tensor as it is on disk, those of experts with an axis of the experts in front."""
    if not entry.is_stack:
        return tensors.read(entry.names[0])
    stack = np.empty((len(entry.names), *entry.shape), tensors.specs[entry.names[0]].dtype)
    for expert, name in enumerate(entry.names):
        stack[expert] = tensors.read(name)
    return stack


def _to_device(tensor: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """Copy a tensor to its devices, into memory that JAX owns.

    On the CPU, JAX may alias the memory of a NumPy array and release it only in the call after the array is deleted. Without the
    explicit copy, the tensor would therefore still be in memory while the next one is read.
    """
    if sharding is None:
        return jnp.asarray(tensor)
    return jax.block_until_ready(
        _copy(jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index]))
    )


_copy = jax.jit(jnp.copy)


def _sharding_on_disk(sharding: NamedSharding, input_axes: int, is_stack: bool) -> NamedSharding:
    """Return the sharding of a layer's tensor on disk, [outputs, inputs], that matches the sharding of its parameter.

    Args:
      sharding: of the parameter, with the layer axis.
      input_axes: as in `LAYER_NAMES`.
      is_stack: whether an axis of the experts comes before the others, on disk too.
    """
    experts = sharding.spec[1 : 1 + is_stack]
    axes = sharding.spec[1 + is_stack :]
    groups = (axes[input_axes:], axes[:input_axes]) if input_axes else (axes,)
    # Of the axes that are merged on disk, only the first one longer than 1 is ever sharded.
    merged = (next((axis for axis in group if axis is not None), None) for group in groups)
    return NamedSharding(sharding.mesh, PartitionSpec(*experts, *merged))


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    stack = jnp.zeros(shape, dtype)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


@functools.partial(jax.jit, static_argnames=("shape", "input_axes", "sharding"), donate_argnames="stack")
def _write_layer(
    stack: jax.Array,
    tensor: jax.Array,
    layer: int,
    shape: tuple[int, ...],
    input_axes: int,
    sharding: NamedSharding | None,
) -> jax.Array:
    """Write one layer's tensor, as it is on disk, into the parameter with a layer axis."""
    value = (tensor.swapaxes(-1, -2) if input_axes else tensor).reshape(shape).astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


def save_policy(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer_files: Mapping[str, bytes],
    fingerprint: str,
) -> None:
    """Write a directory that `load_policy` and `transformers` can load, in float32, one tensor at a time.

    In a run with several processes, all must call this function, and the leader writes.

    Args:
      directory: where to write; created if necessary.
      config: architecture.
      params: parameters, on the host or sharded over devices.
      tokenizer_files: content by file name (`tokenizers.export.exported_files`).
      fingerprint: of the tokenizer; it is recorded because the weights are meaningless with other token ids.
    """
    tensors = params_as_tensors(config, lambda path: functools.reduce(operator.getitem, path, params))
    content = to_hf_config(config) | {"torch_dtype": "float32", FINGERPRINT_KEY: fingerprint}
    if is_leader():
        write_policy(Path(directory), content, tensors, tokenizer_files)
    else:
        for name in tensors.specs:
            tensors.read(name)  # A collective operation if the parameter is sharded over processes.


def write_policy(
    directory: Path, hf_config: dict[str, Any], tensors: Tensors, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Write weights, tokenizer files and config.json into `directory`.

    A policy that is there stays until the new one is complete. A process that is killed while the one replaces the other leaves
    a directory without config.json, never parts of both.

    Args:
      directory: where to write; created if necessary.
      hf_config: content of config.json; ids of special tokens that it lacks are added from generation_config.json.
      tensors: weights with Hugging Face's names.
      tokenizer_files: content by file name (`tokenizers.export.exported_files`).
    """
    # Inside of `directory`, which may be the root of a disk or of a copy of a URL; a killed process may have left one.
    partial = directory / "policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_files(partial, hf_config, tensors, tokenizer_files)
        _move_policy(partial, directory)
    finally:
        shutil.rmtree(partial)


def _write_files(
    directory: Path, hf_config: dict[str, Any], tensors: Tensors, tokenizer_files: Mapping[str, bytes]
) -> None:
    """Write the files of `write_policy` into an empty directory."""
    write_safetensors(directory, tensors)
    for name, data in tokenizer_files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    generation = parse_object(directory / GENERATION_CONFIG_FILE, tokenizer_files.get(GENERATION_CONFIG_FILE, b"{}"))
    special = {key: generation[key] for key in SPECIAL_ID_KEYS if key in generation}
    hf_config = hf_config | {key: value for key, value in special.items() if hf_config.get(key) is None}
    (directory / MODEL_CONFIG_FILE).write_text(json.dumps(hf_config, indent=2) + "\n")


def _move_policy(source: Path, target: Path) -> None:
    """Move the files of a policy to a directory, in place of those of another policy."""
    # First and last, because a directory with config.json is taken for a complete policy.
    (target / MODEL_CONFIG_FILE).unlink(missing_ok=True)
    for path in (*target.glob("model*.safetensors"), target / INDEX_FILE):
        path.unlink(missing_ok=True)
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name.name == MODEL_CONFIG_FILE):
        (target / name).parent.mkdir(exist_ok=True)
        (source / name).replace(target / name)


def params_as_tensors(config: ModelConfig, get_param: Callable[[tuple[str, ...]], Any]) -> Tensors:
    """Return parameters as float32 tensors with Hugging Face's names, parameter by parameter, and layer by layer within one.

    Args:
      config: architecture.
      get_param: function from the path of a parameter in the tree to its value, with the layer axis, on the host or sharded.

    Raises: UserError on reading a parameter whose shape does not match `config`.
    """
    shapes = _param_shapes(config)
    entries = {name: entry for entry in _tensor_entries(config) for name in entry.names}

    def fetch(name: str) -> np.ndarray:
        entry = entries[name]
        parameter = entry.parameter
        layer = entry.layer
        array = get_param((parameter,) if layer is None else ("layers", parameter))
        expected = shapes[parameter] if layer is None else (config.layers, *shapes[parameter])
        if array.shape != expected:
            raise UserError(
                f"parameter {parameter} has shape {array.shape}, expected {expected} for its policy.", field=parameter
            )
        index = () if layer is None else (layer, entry.names.index(name)) if entry.is_stack else (layer,)
        array = to_host(array[index])
        if layer is not None and LAYER_NAMES[parameter][1]:
            return array.reshape(entry.shape[::-1]).T
        return array.reshape(entry.shape)

    specs = {name: TensorSpec(dtype=np.dtype(np.float32), shape=entry.shape) for name, entry in entries.items()}
    return Tensors(source="the parameters", specs=specs, fetch=fetch)


class _TensorEntry(NamedTuple):
    """A tensor on disk, or those of a layer's experts, and the parameter that they belong to."""

    names: tuple[str, ...]  # One, or one for each expert.
    shape: tuple[int, ...]  # Of each tensor.
    parameter: str
    layer: int | None  # None outside of the layers.
    is_stack: bool = False  # Whether the tensors are those of experts.


def _tensor_entries(config: ModelConfig) -> Iterator[_TensorEntry]:
    """Yield the tensors of an architecture, parameter by parameter, and layer by layer within one."""
    shapes = _param_shapes(config)
    for parameter, name in _TOP_NAMES.items():
        if parameter in shapes:
            yield _TensorEntry(names=(name,), shape=shapes[parameter], parameter=parameter, layer=None)
    for parameter, (name, input_axes) in LAYER_NAMES.items():
        if parameter not in shapes:
            continue
        is_stack = config.experts > 0 and parameter in _EXPERT_NAMES
        names = [_EXPERT_NAMES[parameter].format(expert) for expert in range(config.experts)] if is_stack else [name]
        dims = shapes[parameter][is_stack:]
        inputs = int(np.prod(dims[:input_axes]))
        outputs = int(np.prod(dims[input_axes:]))
        shape = (outputs, inputs) if input_axes else (outputs,)
        for layer in range(config.layers):
            yield _TensorEntry(
                names=tuple(f"model.layers.{layer}.{name}" for name in names),
                shape=shape,
                parameter=parameter,
                layer=layer,
                is_stack=is_stack,
            )


def _param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, for those of the layers without the layer axis."""
    width = config.width
    kv_heads = config.kv_heads
    head_size = config.head_size
    heads_per_kv = config.heads // kv_heads
    experts = (config.experts,) if config.experts else ()
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab, width),
        "norm": (width,),
        "attention_norm": (width,),
        "q": (width, kv_heads, heads_per_kv, head_size),
        "k": (width, kv_heads, head_size),
        "v": (width, kv_heads, head_size),
        "o": (kv_heads, heads_per_kv, head_size, width),
        "ffn_norm": (width,),
        "gate": (*experts, width, config.ffn),
        "up": (*experts, width, config.ffn),
        "down": (*experts, config.ffn, width),
    }
    if config.experts:
        shapes["router"] = (width, config.experts)
    if not config.tied:
        shapes["head"] = (config.vocab, width)
    if config.qkv_bias:
        shapes["q_bias"] = (1, kv_heads, 1, heads_per_kv, 1, head_size)
        shapes["k_bias"] = shapes["v_bias"] = (1, kv_heads, 1, 1, head_size)
    if config.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (head_size,)
    return shapes
