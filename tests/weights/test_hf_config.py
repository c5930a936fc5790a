"""Keys of config.json: those that change a model's results are read as by `transformers`, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.errors import UserError
from rpt_jax.model.rope import rope_frequencies
from rpt_jax.weights.hf_config import from_hf_config
from tests.helpers.hf_models import hf_config

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


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
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_scaling": YARN | {"extrapolation_factor": 2.0}}),
        ("llama", {"rope_scaling": {"full_attention": YARN}}),
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


def test_another_activation_is_answered_with_the_name_of_the_supported_one():
    with pytest.raises(UserError, match="hidden_act='gelu' is not supported; expected 'silu'"):
        from_hf_config(hf_config(hidden_act="gelu"), Path("config.json"))


def test_a_qwen3_config_without_head_dim_has_the_default_of_transformers():
    content = hf_config("qwen3", head_dim=None)
    assert from_hf_config(content, Path("config.json")).head_size == transformers.Qwen3Config(**content).head_dim == 128
