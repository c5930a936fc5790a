"""Keys of config.json: those that change a model's results are read as by `transformers`, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.errors import UserError
from rpt_jax.model.rope import rope_frequencies
from rpt_jax.weights.hf_config import from_hf_config, to_hf_config
from tests.helpers.hf_models import hf_config

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN, "original_max_position_embeddings": 512},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": YARN | {"factor": 0.5}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.1}},
        {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
        {"rope_parameters": YARN | {"rope_theta": 5e5}, "rope_theta": None},
        {"rope_parameters": YARN | {"rope_theta": 5e5}, "rope_scaling": YARN, "rope_theta": 5e5},
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 512,
        },
    ],
    ids=str,
)
def test_frequencies_equal_those_of_transformers(tmp_path, changes):
    content = hf_config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    config = from_hf_config(content, tmp_path / "config.json")
    frequencies, ours = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-5)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 1024, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1024}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}),
        ("qwen3", {"layer_types": ["full_attention", "full_attention"]}),
        ("llama", {"sliding_window": 4096}),
        ("qwen2", {"use_mrope": False, "_name_or_path": "x", "bos_token_id": 1, "unsloth_version": "2026.1"}),
        ("llama", {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {}}),
    ],
    ids=str,
)
def test_keys_without_an_effect_are_accepted(family, changes):
    assert from_hf_config(hf_config(family, **changes), Path("config.json")).layers == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_scaling": YARN, "rope_theta": 1}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.3}}),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        ),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_scaling": YARN | {"extrapolation_factor": 2.0}}),
        ("llama", {"rope_scaling": {"full_attention": YARN}}),
        ("llama", {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 5e5}}),
        ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}),
        ("llama", {"rope_scaling": YARN | {"truncate": "false"}}),
        ("llama", {"tie_word_embeddings": "false"}),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": "false"}),
        ("llama", {"sliding_window": 1024}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 1024, "layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}),
        ("qwen2", {"layer_types": 3}),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 1024}}),
        ("qwen2", {"use_mrope": True}),
        ("llama", {"is_causal": False}),
        ("llama", {"logits_scaling": 8.0}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
        ("llama", {"quantization": {"bits": 4}}),
    ],
    ids=str,
)
def test_keys_that_may_change_the_results_are_refused(family, changes):
    with pytest.raises(UserError) as raised:
        from_hf_config(hf_config(family, **changes), Path("config.json"))
    assert raised.value.field == "config.json"


# What published config.json files of other architectures say, without keys that have no effect.
OTHER_ARCHITECTURES = {
    "gemma-2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "gemma-3": {
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 1e4,
    },
    "gemma-3, with images": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
    "mistral": {"model_type": "mistral", "sliding_window": 4096, "hidden_act": "silu"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632,
        "use_sliding_window": False,
        "sliding_window": 32768,
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        "linear_num_value_heads": 32,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 512,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 512,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "scoring_func": "sigmoid",
        "topk_group": 4,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
    },
    "phi-3": {"model_type": "phi3", "sliding_window": 2047, "partial_rotary_factor": 1.0},
    "glm-4": {"model_type": "glm4", "partial_rotary_factor": 0.5},
    "granite": {"model_type": "granite", "attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    "unknown, with state-space layers": {"model_type": "some_new_model", "mamba_d_state": 128},
}
FEATURES = {
    "gemma-2": (
        "soft cap of the attention scores",
        "soft cap of the logits",
        "sliding-window",
        "norms after",
        "activation",
    ),
    "gemma-3": ("sliding-window", "norms after"),
    "gemma-3, with images": ("other than text",),
    "mistral": ("sliding-window attention (sliding_window=4096)",),
    "mixtral": ("names of the experts' tensors",),
    "qwen2-moe": ("a shared expert",),
    "qwen3-next": ("linear attention", "a shared expert", "partial rotary"),
    "deepseek-v3": (
        "multi-head latent attention",
        "shared experts",
        "dense layers before",
        "another function of the router",
    ),
    "gpt-oss": ("attention sinks", "sliding-window"),
    "phi-3": ("query, key and value in one tensor", "sliding-window"),
    "glm-4": ("partial rotary",),
    "granite": ("other scales of attention scores", "scaled logits"),
    "unknown, with state-space layers": ("state-space layers (mamba_d_state=128)",),
}


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_another_architecture_is_refused_with_what_is_missing(name):
    content = hf_config() | OTHER_ARCHITECTURES[name]
    with pytest.raises(UserError) as raised:
        from_hf_config(content, Path("config.json"))
    assert raised.value.field == "config.json"
    for part in (f"model_type='{content['model_type']}'", "'qwen3_moe'", *FEATURES[name]):
        assert part in str(raised.value)
    if name == "qwen2-moe":  # Its config has a sliding window, which `use_sliding_window` turns off.
        assert "sliding" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "normalize"),
    [
        ({}, False),
        ({"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}, True),
        ({"num_experts": None, "num_local_experts": 8}, False),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.001, "use_sliding_window": False}, False),
    ],
    ids=str,
)
def test_experts_are_read(changes, normalize):
    config = from_hf_config(hf_config("qwen3_moe", **EXPERTS | changes), Path("config.json"))
    assert (config.experts, config.experts_per_token, config.ffn) == (8, 2, 16)
    assert config.normalize_expert_weights is normalize and config.qk_norm
    assert from_hf_config(to_hf_config(config), Path("config.json")) == config


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"num_experts": None}, "num_local_experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_local_experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2}, "sliding_window"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 16}, "a shared expert"),
        ("llama", {}, "num_experts"),
        ("llama", {"attn_logit_softcapping": 50.0}, "a soft cap of the attention scores"),
    ],
    ids=str,
)
def test_experts_that_cannot_be_read_are_refused(family, changes, key):
    with pytest.raises(UserError, match=key) as raised:
        from_hf_config(hf_config(family, **EXPERTS | changes), Path("config.json"))
    assert raised.value.field == "config.json"


def test_another_activation_is_answered_with_the_name_of_the_supported_one():
    with pytest.raises(UserError, match="hidden_act='gelu' is not supported; expected 'silu'"):
        from_hf_config(hf_config(hidden_act="gelu"), Path("config.json"))


def test_a_qwen3_config_without_head_dim_has_the_default_of_transformers():
    content = hf_config("qwen3", head_dim=None)
    assert from_hf_config(content, Path("config.json")).head_size == transformers.Qwen3Config(**content).head_dim == 128
