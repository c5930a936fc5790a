"""Exported policies in `transformers`: responses end at our ids, and AutoTokenizer loads the tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rpt_jax.conversion import convert
from rpt_jax.model.transformer import Transformer
from rpt_jax.tokenizers.export import exported_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from rpt_jax.weights.hf import load_policy, save_policy, write_policy
from rpt_jax.weights.safetensors_io import Tensors, TensorSpec, open_safetensors
from tests.helpers.generation import LIMIT, generate_with_transformers, write_stopping_policy
from tests.helpers.hf_models import SHAPE, hf_config, tokenizer_spec, write_gguf
from tests.helpers.paths import ROOT
from tests.helpers.policy_reference import random_params
from tests.helpers.tokenizers import TEXTS, write_hf

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
PROMPTS = np.random.default_rng(0).integers(0, 256, (12, 5)).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_of_an_exported_policy_end_at_our_stop_ids(tmp_path, family):
    """The ids that end a response are in config.json alone, beside another end-of-text token."""
    source = write_stopping_policy(tmp_path / "source", **FAMILIES[family])
    tokenizer = load_tokenizer(source)
    assert tokenizer.stop_ids == (258, 257, 259)
    convert(source, tmp_path / "imported")
    convert(tmp_path / "imported", tmp_path / "exported")
    config, params, _ = load_policy(source)
    save_policy(tmp_path / "saved", config, params, exported_files(tokenizer), tokenizer.fingerprint)
    for name in ("imported", "exported", "saved"):
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert set(content["eos_token_id"]) >= {257, 259}
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).eos_token_id == 258
        assert load_tokenizer(tmp_path / name).stop_ids == tokenizer.stop_ids
    for name in ("exported", "saved"):
        responses = generate_with_transformers(tmp_path / name, PROMPTS)
        assert sum(response[-1] in tokenizer.stop_ids for response in responses) > 3, "the example tests too little"
        for response in responses:
            assert not set(response[:-1]) & set(tokenizer.stop_ids)
            assert response[-1] in tokenizer.stop_ids or len(response) == LIMIT


def test_ids_that_end_a_response_are_exported_from_gguf(tmp_path):
    write_gguf(tmp_path / "a.gguf", extra_keys={"tokenizer.ggml.eom_token_id": 257})
    convert(tmp_path / "a.gguf", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert set(json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]) == {257, 258, 259}
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [258, 259, 257]


def test_responses_of_the_shipped_policy_end_at_its_end_of_text():
    directory = ROOT / "configs" / "tiny"
    tokenizer = load_tokenizer(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Ann has 3 apples and buys 4 more. "
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs(text).input_ids == ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    [response] = generate_with_transformers(directory, np.array([ids], np.int32), limit=200)
    assert response[-1] == tokenizer.eos_id and len(response) < 200


def test_a_new_sentencepiece_tokenizer_is_exported_with_its_special_tokens(tmp_path):
    train_sentencepiece(TEXTS, 350, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    config = dataclasses.replace(SHAPE, vocab=350)
    save_policy(tmp_path / "out", config, random_params(Transformer(config), 0), exported_files(tokenizer), "")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    for text in TEXTS[:4]:
        assert theirs(text).input_ids == [1, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text)) == text
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def test_other_values_of_generation_config_and_all_templates_are_kept(tmp_path):
    declared = {"eos_token_id": [259, 258], "temperature": 0.6, "top_p": 0.95, "do_sample": True}
    write_hf(
        tmp_path,
        tokenizer_spec(),
        config=hf_config(),
        generation_config=declared,
        tokenizer_config={"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"},
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    files = exported_files(load_tokenizer(tmp_path))
    # Nothing was missing, so that every file is as it was.
    assert "config.json" not in files
    assert files.pop("additional_chat_templates/tool_use.jinja") == b"{{ tools }}"
    assert files == {name: (tmp_path / name).read_bytes() for name in files} and len(files) == 3
    (tmp_path / "generation_config.json").write_text(json.dumps(declared | {"eos_token_id": 259}))
    changed = json.loads(exported_files(load_tokenizer(tmp_path))["generation_config.json"])
    assert changed == declared | {"eos_token_id": [258, 259]}


def test_a_policy_replaces_another_one_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tensors(value: float, failing: bool = False) -> Tensors:
        def fetch(name: str) -> np.ndarray:
            if failing and name == "b":
                raise OSError("No space left on device")
            return np.full(4, value, np.float32)

        return Tensors(source="", specs=dict.fromkeys("ab", TensorSpec(np.dtype(np.float32), (4,))), fetch=fetch)

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    (tmp_path / "policy.partial").mkdir()  # Of a process that was killed.
    write_policy(tmp_path, {"model": 1}, tensors(1.0), {"tokenizer.json": b"1", "chat/a.jinja": b"1"})
    (tmp_path / "chat" / "a.jinja").unlink()
    (tmp_path / "chat").rmdir()
    (tmp_path / "README.md").write_text("mine")
    before = contents()
    assert before.keys() == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    with pytest.raises(OSError, match="No space"):
        write_policy(tmp_path, {"model": 2}, tensors(2.0, failing=True), {"tokenizer.json": b"2"})
    assert contents() == before

    # What was opened before is still read, and shards that the new policy lacks are gone.
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    opened = open_safetensors(tmp_path)
    write_policy(tmp_path, {"model": 3}, tensors(3.0), {"tokenizer.json": b"3"})
    assert opened.read("a").tolist() == [1.0] * 4 and open_safetensors(tmp_path).read("b").tolist() == [3.0] * 4
    assert contents().keys() == before.keys() and contents()["tokenizer.json"] == b"3"

    # A process that is killed in between leaves nothing that looks like a policy.
    moved = Path.replace

    def replace(source: Path, target: Path) -> Path:
        assert not (tmp_path / "config.json").exists()
        return moved(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_policy(tmp_path, {"model": 4}, tensors(4.0), {})
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": 4}
