"""Parity with `transformers` on CPU, for every model family and option: logits, decoding, import and export."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from rpt_jax.conversion import convert
from rpt_jax.model.rope import rope_frequencies
from rpt_jax.model.transformer import Transformer
from rpt_jax.rollout.generate import generate
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import byte_level_alphabet, load_tokenizer
from rpt_jax.weights.hf import load_model_config, load_policy, save_policy
from rpt_jax.weights.hf_config import from_hf_config, to_hf_config
from tests.helpers.logits import full_forward, hf_logits
from tests.helpers.parameters import mostly_slow

torch = pytest.importorskip("torch", reason="a requirement in tests/requirements.txt, which launch/test.sh installs")
transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS

SIZES = {
    "vocab_size": 300,  # Padded: the tokenizer has 258 tokens.
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
# With 32 positions and an original context of 8, every range of the scaled frequencies has an effect.
SHORT = {"original_max_position_embeddings": 8}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
CASES = {
    "llama": ("Llama", {}),
    "llama, head_dim, untied, eps": (
        "Llama",
        {"head_dim": 10, "tie_word_embeddings": False, "rms_norm_eps": 1e-2, "num_key_value_heads": 1},
    ),
    "llama, llama3": ("Llama", {"rope_parameters": {"rope_theta": 500.0, **LLAMA3, **SHORT}}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 2.5}}),
    "llama, yarn": ("Llama", {"rope_parameters": {"rope_theta": 100.0, **YARN, **SHORT}}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2, untied, yarn": (
        "Qwen2",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_theta": 1e4, **YARN, **SHORT, "attention_factor": 0.7, "beta_fast": 4.0},
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 8, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen3, untied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "tie_word_embeddings": False}),
    "qwen3_moe, not normalized": ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 3, "head_dim": 10}),
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 32)).astype(np.int32)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with all bytes, two special tokens and the normalizer of Qwen models."""
    vocab = {character: i for i, character in enumerate(byte_level_alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.save(str(directory / "tokenizer.json"))
    template = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0]['content'] }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(template))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {case: (directory written by `transformers`, model)}; all parameters are random, also norms and biases."""
    root, made = tmp_path_factory.mktemp("transformers"), {}
    for number, (name, (family, options)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        config = getattr(transformers, f"{family}Config")(**SIZES | options)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or "bias" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(root / str(number))
        write_tokenizer(root / str(number))
        made[name] = root / str(number), model
    return made


def assert_close(ours, expected, scale: float | None = None) -> None:
    """Assert that values agree to 1e-4 of the largest magnitude, or of `scale`."""
    scale = np.abs(expected).max() if scale is None else scale
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * scale


QUICK = ("llama", "qwen2, untied, yarn", "qwen3")


@pytest.mark.parametrize("name", mostly_slow(CASES, *QUICK))
def test_logits_equal_those_of_transformers(models, name):
    directory, model = models[name]
    config, params, _ = load_policy(directory)
    assert_close(full_forward(Transformer(config), params, TOKENS), hf_logits(model, TOKENS))


@pytest.mark.parametrize("name", mostly_slow(CASES, *QUICK))
def test_decoding_equals_the_full_forward_pass_of_transformers(models, name):
    """Responses to prompts of several lengths, with two kinds of padding; `transformers` scores every sampled token."""
    directory, model = models[name]
    config, params, _ = load_policy(directory)
    lengths = np.array([1, 9, 20], np.int32)

    def sample(padding: int):
        prompts = np.where(np.arange(20) < lengths[:, None], TOKENS[:, :20], padding)
        options = {"samples": 2, "max_new_tokens": 8, "temperature": 1.0, "stop_ids": ()}
        return generate(Transformer(config), params, prompts, lengths, np.arange(3), jax.random.key(0), **options)

    ours = sample(7)
    jax.tree.map(np.testing.assert_array_equal, sample(250), ours)
    for p, g in np.ndindex(3, 2):
        response = np.asarray(ours.tokens_PxGxT[p, g])
        logits = hf_logits(model, np.concatenate([TOKENS[p, : lengths[p]], response])[None])[0, lengths[p] - 1 : -1]
        logprobs = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
        assert_close(ours.logprobs_PxGxT[p, g], logprobs[np.arange(8), response], np.abs(logits).max())


@pytest.mark.parametrize(
    ("rope", "head_size", "context"),
    [
        ({"rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 8192}, 128, 131_072),
        ({"rope_theta": 5e5, **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 64, 131_072),
        ({"rope_theta": 1e6, **YARN, "original_max_position_embeddings": 32_768}, 128, 131_072),
        ({"rope_theta": 1e6, **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, 64, 32_768),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}, 64, 8192),
    ],
    ids=["llama 3.1", "llama 3.2", "qwen2.5 long", "yarn, all options", "linear"],
)
def test_rope_frequencies_equal_those_of_transformers(tmp_path, rope, head_size, context):
    sizes = SIZES | {"hidden_size": 4 * head_size, "max_position_embeddings": context}
    hf_config = transformers.LlamaConfig(**sizes, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, "cpu")
    hf_config.save_pretrained(tmp_path)
    config, _ = load_model_config(tmp_path)
    ours = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
    np.testing.assert_allclose(ours[0], expected.numpy(), rtol=1e-5)
    assert ours[1] == pytest.approx(factor) and (ours[1] != 1) == (rope["rope_type"] == "yarn")
    # Written in the form of transformers 4.
    old = to_hf_config(config)
    assert "rope_parameters" not in old and from_hf_config(old, tmp_path) == config


# --- import and export ---


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_identical(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", mostly_slow(CASES, *QUICK))
def test_import_and_export_are_bit_identical(models, tmp_path, name):
    """By converting files, and by loading and saving parameters; `transformers` computes the same logits from the result."""
    directory, model = models[name]
    convert(directory, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out")
    config, params, fingerprint = load_policy(tmp_path / "ours")
    assert fingerprint == load_tokenizer(directory).fingerprint
    save_policy(tmp_path / "saved", config, params, read_tokenizer_files(tmp_path / "ours"), fingerprint)
    for out in ("out", "saved"):
        assert_identical(tensors_in(tmp_path / out), tensors_in(directory))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype="float32").eval()
        assert type(again) is type(model)
        np.testing.assert_array_equal(hf_logits(again, TOKENS), hf_logits(model, TOKENS))
        assert load_model_config(tmp_path / out)[0] == config
        assert (tmp_path / out / "tokenizer_config.json").read_text() == (
            directory / "tokenizer_config.json"
        ).read_text()


def test_sharded_bfloat16_weights_can_be_imported_and_exported(models, tmp_path):
    _, model = models["qwen2, untied, yarn"]
    sharded = tmp_path / "sharded"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(sharded, max_shard_size="20KB")
    write_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    convert(sharded, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out")
    assert_identical(tensors_in(tmp_path / "out"), tensors_in(sharded))
    config, params, _ = load_policy(sharded)
    again = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype="float32").eval()
    assert_close(full_forward(Transformer(config), params, TOKENS), hf_logits(again, TOKENS))
