"""Small policies in Hugging Face and GGUF format, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.transformer import Transformer
from rpt_jax.tokenizers.tokenizer import byte_level_alphabet
from rpt_jax.weights.hf import save_policy
from rpt_jax.weights.model_files import WEIGHTS_FILE
from tests.helpers.policy_reference import random_params

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=64, vocab=300)
# The tokens: all bytes and one merge, then the special tokens.
PLAIN = [*byte_level_alphabet(), "Ġt"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def hf_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the content of a small config.json, with `changes`; None removes a key."""
    content = {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 300,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def tokenizer_spec() -> dict[str, Any]:
    """Return the content of tokenizer.json for `PLAIN` and `SPECIAL`."""
    return {
        "added_tokens": [
            {"id": len(PLAIN) + i, "content": name, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for i, name in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(PLAIN)}, "merges": ["Ġ t"]},
    }


def write_gguf(
    path: Path,
    family: str = "llama",
    config: ModelConfig = SHAPE,
    quantized: tuple[str, ...] = (),
    pre_tokenizer: str = "smollm",
    tokenizer_model: str = "gpt2",
    extra_tensors: dict[str, np.ndarray] | None = None,
    extra_keys: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write a random policy as llama.cpp does, with the rows of Llama's query and key projections interleaved.

    Args:
      path: file to write; a directory `policy` with the same weights is written next to it.
      family: value of general.architecture.
      config: architecture.
      quantized: Hugging Face names of tensors that are quantized to Q8_0.
      pre_tokenizer: value of tokenizer.ggml.pre.
      tokenizer_model: value of tokenizer.ggml.model.
      extra_tensors: additional tensors by their GGUF names.
      extra_keys: additional values of the header by key.

    Returns: the tensors by their Hugging Face names.
    """
    policy = path.parent / "policy"
    save_policy(policy, config, random_params(Transformer(config), 1), {}, "")
    weights = load_file(policy / WEIGHTS_FILE)
    writer = gguf.GGUFWriter(path, family)

    writer.add_context_length(64)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_key_length(config.head_size)

    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pre_tokenizer)
    padding = [f"[PAD{i}]" for i in range(config.vocab - len(PLAIN + SPECIAL))]
    writer.add_token_list(PLAIN + SPECIAL + padding)
    writer.add_token_types([1] * len(PLAIN) + [3] * len(SPECIAL) + [5] * len(padding))
    writer.add_token_merges(["Ġ t"])
    writer.add_chat_template("{{ messages }}")
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_eot_token_id(259)
    for key, value in (extra_keys or {}).items():
        writer.kv_data[0].pop(key, None)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)  # Includes the names of the other families.
    for name, tensor in weights.items():
        tensor = np.ascontiguousarray(tensor)
        for projection, heads in (("q_proj.", config.heads), ("k_proj.", config.kv_heads)):
            if family == "llama" and projection in name:
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
                tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if name in quantized:
            tensor = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, tensor)
    for name, tensor in (extra_tensors or {}).items():
        writer.add_tensor(name, tensor)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
