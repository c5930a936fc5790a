"""Low-rank adapters on disk: merged into the weights that they belong to, or in the format of Hugging Face's PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rpt_jax.distributed.processes import is_leader, to_host
from rpt_jax.errors import UserError
from rpt_jax.model.lora import Lora, matrix_sizes
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Params, Transformer
from rpt_jax.weights.hf import LAYER_NAMES, open_weights, save_policy, write_policy
from rpt_jax.weights.hf_config import FINGERPRINT_KEY, to_hf_config
from rpt_jax.weights.safetensors_io import Tensors

# Returns the parameter of a layer with this name, with the layer axis, on the host.
GetAdapter = Callable[[str], np.ndarray]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"


def save_trained(
    directory: Path,
    policy: Transformer,
    trained: Params,
    base: str,
    tokenizer_files: Mapping[str, bytes],
    fingerprint: str,
) -> None:
    """Write the policy that a run has trained, as `weights.hf.save_policy` does; adapters are merged into their base.

    Args:
      directory: where to write; created if necessary.
      policy: the policy.
      trained: all of its parameters or, if it has adapters, these alone; on the host or sharded over devices.
      base: the policy that adapters belong to, a Hugging Face directory or a GGUF file.
      tokenizer_files, fingerprint: as of `save_policy`.
    """
    if policy.lora is None:
        save_policy(directory, policy.config, trained, tokenizer_files, fingerprint)
        return
    adapters = to_host(trained)["layers"]
    if is_leader():
        tensors = merged_tensors(open_weights(base, policy.config), policy.config, policy.lora, adapters.__getitem__)
        content = to_hf_config(policy.config) | {"torch_dtype": "float32", FINGERPRINT_KEY: fingerprint}
        write_policy(directory, content, tensors, tokenizer_files)


def merged_tensors(base: Tensors, config: ModelConfig, lora: Lora, get_adapter: GetAdapter) -> Tensors:
    """Return the weights W + alpha / rank · A B in float32, with Hugging Face's names.

    Args:
      base: the weights W.
      config: architecture.
      lora: the adapters.
      get_adapter: returns A and B of all layers.

    Raises: UserError on reading a tensor whose adapters do not have the shapes that `config` and `lora` say.
    """
    targets = {
        f"model.layers.{layer}.{LAYER_NAMES[name][0]}": (name, layer)
        for name in lora.targets
        for layer in range(config.layers)
    }

    def fetch(name: str) -> np.ndarray:
        tensor = base.read(name).astype(np.float32)
        if name not in targets:
            return tensor
        a_RxI, b_OxR = _adapter_pair(config, lora, *targets[name], get_adapter)
        return tensor + np.float32(lora.scale) * (b_OxR @ a_RxI)

    specs = {name: spec._replace(dtype=np.dtype(np.float32)) for name, spec in base.specs.items()}
    return Tensors(source=base.source, specs=specs, fetch=fetch)


def write_adapters(directory: Path, base: str, config: ModelConfig, lora: Lora, get_adapter: GetAdapter) -> None:
    """Write adapters that `peft` loads.

    Args:
      directory: where to write; it must exist.
      base: path of the policy that they belong to, which is written into the config.
      config, lora, get_adapter: as of `merged_tensors`.
    """
    tensors: dict[str, np.ndarray] = {}
    for name in lora.targets:
        module = LAYER_NAMES[name][0].removesuffix(".weight")
        for layer in range(config.layers):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            pair = _adapter_pair(config, lora, name, layer, get_adapter)
            for matrix, tensor in zip("AB", pair, strict=True):
                tensors[f"{prefix}.lora_{matrix}.weight"] = np.ascontiguousarray(tensor)
    save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _adapter_pair(
    config: ModelConfig, lora: Lora, name: str, layer: int, get_adapter: GetAdapter
) -> tuple[np.ndarray, np.ndarray]:
    """Return A [rank, inputs] and B [outputs, rank] of a matrix of a layer, as they are on disk. Raises: UserError."""
    inputs, outputs = matrix_sizes(config)[name]
    a = _layer_of(get_adapter, f"{name}_lora_a", layer, (inputs, lora.rank))
    b = _layer_of(get_adapter, f"{name}_lora_b", layer, (lora.rank, outputs))
    return a.T, b.T


def _layer_of(get_adapter: GetAdapter, name: str, layer: int, shape: tuple[int, int]) -> np.ndarray:
    array: Any = get_adapter(name)[layer]
    if array.size != shape[0] * shape[1]:
        raise UserError(f"parameter {name} has shape {array.shape}, expected {shape} for its policy.", field=name)
    return array.reshape(shape)
