"""Greedy responses by `transformers`, and small policies whose responses end soon."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rpt_jax.model.transformer import Transformer
from rpt_jax.weights.hf import save_policy
from rpt_jax.weights.hf_config import FINGERPRINT_KEY
from tests.helpers.hf_models import SHAPE, tokenizer_spec
from tests.helpers.policy_reference import random_params
from tests.helpers.tokenizers import write_hf

torch = pytest.importorskip("torch", reason="a requirement in tests/requirements.txt, which launch/test.sh installs")
transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

LIMIT = 24  # New tokens of a response.


def write_stopping_policy(directory: Path, **options: Any) -> Path:
    """Write a Hugging Face directory whose responses end at ids that only config.json and tokenizer_config.json list.

    Args:
      directory: to create.
      options: fields of `ModelConfig`.

    Returns: the directory.
    """
    write_hf(directory, tokenizer_spec(), tokenizer_config={"eos_token": "<|im_end|>"})
    config = dataclasses.replace(SHAPE, vocab=260, **options)
    # Large weights, so that responses vary, and larger ones for the special tokens, so that some end soon.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, random_params(Transformer(config), 0))
    params["embedding"] = np.array(params["embedding"])
    params["embedding"][257:] *= 3
    save_policy(directory, config, params, {}, "")
    content = json.loads((directory / "config.json").read_text())
    del content[FINGERPRINT_KEY]
    (directory / "config.json").write_text(json.dumps(content | {"eos_token_id": [257, 259]}))
    return directory


def generate_with_transformers(directory: Path, prompts_PxS: np.ndarray, limit: int = LIMIT) -> list[list[int]]:
    """Return the greedy response to each prompt, with the token that ends it, as the files in `directory` say."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    inputs = torch.from_numpy(prompts_PxS.astype(np.int64))
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit, do_sample=False)
    # Shorter responses are padded.
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    responses = []
    for response in output[:, prompts_PxS.shape[1] :].tolist():
        length = next((n for n, token in enumerate(response, start=1) if token in ends), len(response))
        responses.append(response[:length])
    return responses
