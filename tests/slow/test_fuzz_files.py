"""Fuzz tests of files: a malformed file gives a valid result or a UserError that names it, never another exception."""

from __future__ import annotations

import dataclasses
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_jax.config import DataConfig, Experiment
from rpt_jax.corpus.documents import Document, Rejected
from rpt_jax.corpus.entropy import BINS
from rpt_jax.corpus.files import find_file_ranges
from rpt_jax.corpus.prepared import open_prepared, write_manifest
from rpt_jax.corpus.readers import read_file_range
from rpt_jax.corpus.store import ShardWriter
from rpt_jax.corpus.tokenization import plan_shards, tokenize
from rpt_jax.corpus.tokenized import open_tokens
from rpt_jax.errors import UserError
from rpt_jax.model.transformer import Transformer
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.weights.hf import load_model_config, open_weights, save_policy
from rpt_jax.weights.model_files import INDEX_FILE, WEIGHTS_FILE
from tests.helpers.corpora import write_every_format, write_jsonl
from tests.helpers.fuzzing import altered, altered_json, many, values
from tests.helpers.hf_models import SHAPE, tokenizer_spec, write_gguf
from tests.helpers.paths import TINY
from tests.helpers.policy_reference import random_params
from tests.helpers.whole_corpus import load_corpus

pytestmark = pytest.mark.slow
TEXTS = ["Tom has 3 apples.\nHe buys 4 more.", "naïve \U0001f9ee", "a b c " * 40, "12 + 30 = 42"]


def refused_or(path: Path, use: Callable[[], object]) -> None:
    """Call `use`, which may raise a UserError that names `path`, but no other exception."""
    try:
        use()
    except UserError as error:
        assert str(path) in str(error)


# --- corpora ---


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of a valid file of every format, by path."""
    folder = tmp_path_factory.mktemp("corpora")
    write_every_format(folder, [{"text": text} for text in TEXTS])
    (folder / "h.txt").write_text("\n\n".join(TEXTS))
    (folder / "i.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (folder / "j.csv").write_text("text,id\n" + "".join(f'"{text}",1\n' for text in TEXTS))
    (folder / "k.txt.xz").write_bytes(lzma.compress("\n\n".join(TEXTS).encode()))
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read_all(config: DataConfig) -> None:
    for file_range in find_file_ranges(config):
        for item in read_file_range(file_range, config):
            assert isinstance(item, Document | Rejected)


@many
@given(st.data())
def test_malformed_files_of_text(corpora: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(corpora)))
    shutil.rmtree(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data.draw(altered(corpora[name]) | st.binary(max_size=300)))
    refused_or(tmp_path, lambda: read_all(DataConfig(source="path", path=str(path), max_document_bytes=1000)))


@many
@given(st.lists(values | st.dictionaries(st.just("text"), values), max_size=5))
def test_any_json_in_the_lines_of_a_file(tmp_path: Path, records: list[object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    refused_or(path, lambda: load_corpus(DataConfig(source="path", path=str(path))))


# --- tokenizers ---


def use_tokenizer(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    for text in TEXTS:
        assert tokenizer.token_bytes(tokenizer.encode(text)) == text.encode()
    return tokenizer


@many
@given(altered_json(tokenizer_spec()) | altered(json.dumps(tokenizer_spec()).encode()))
def test_byte_level_tokenizers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    refused_or(tmp_path, lambda: use_tokenizer(tmp_path))


BESIDE = {
    "tokenizer_config.json": {
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": "<|im_start|>",
        "chat_template": "x",
        "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}},
    },
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}},
    "added_tokens.json": {"<|im_end|>": 258, "<|eot|>": 260},
    "generation_config.json": {"eos_token_id": [258, 259], "pad_token_id": 257},
    "config.json": {"eos_token_id": 258, "bos_token_id": 257},
}


@many
@given(st.data())
def test_other_files_next_to_a_tokenizer(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    for name, content in BESIDE.items():
        (tmp_path / name).write_bytes(
            data.draw(altered_json(content) | values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=50))
        )
    refused_or(tmp_path, lambda: use_tokenizer(tmp_path))


@many
@given(altered((TINY / "tokenizer.model").read_bytes()))
def test_sentencepiece_models(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    refused_or(tmp_path, lambda: use_tokenizer(tmp_path))


# --- weights ---


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    (directory / "generation_config.json").write_text(json.dumps(BESIDE["generation_config.json"]))
    save_policy(directory, SHAPE, random_params(Transformer(SHAPE), 0), read_tokenizer_files(directory), "")
    write_gguf(directory / "tiny.gguf")
    return directory


def read_weights(source: Path) -> None:
    shape, _ = load_model_config(source)
    tensors = open_weights(source, shape)
    for name, spec in tensors.specs.items():
        tensor = tensors.read(name)
        assert tensor.shape == spec.shape and np.isfinite(tensor).all()


@many
@given(st.data())
def test_safetensors(policy: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (policy / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    # Most of a file is numbers, in which nothing can be wrong but infinity; so most changes are to its header.
    header = data.draw(altered(whole[:end]) | altered_json(json.loads(whole[8:end])).map(_with_length))
    (tmp_path / "config.json").write_bytes((policy / "config.json").read_bytes())
    (tmp_path / WEIGHTS_FILE).write_bytes(header + data.draw(st.just(whole[end:]) | altered(whole[end:])))
    refused_or(tmp_path, lambda: read_weights(tmp_path))


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


MORE_OPTIONS = (
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": ["full_attention"] * 2},
)


@many
@given(st.data())
def test_indices_of_safetensors_and_shapes(policy: Path, tmp_path: Path, data: st.DataObject) -> None:
    file = "model-00001-of-00001.safetensors"
    (tmp_path / file).write_bytes((policy / WEIGHTS_FILE).read_bytes())
    tensors = open_weights(policy, SHAPE)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors.specs, file)}
    config = json.loads((policy / "config.json").read_text())
    whole = json.dumps(index).encode()
    (tmp_path / INDEX_FILE).write_bytes(data.draw(st.just(whole) | altered_json(index) | altered(whole)))
    (tmp_path / "config.json").write_bytes(
        data.draw(st.one_of(altered_json(config), *(altered_json(config | options) for options in MORE_OPTIONS)))
    )
    refused_or(tmp_path, lambda: read_weights(tmp_path))


@many
@given(st.data())
def test_gguf_files(policy: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (policy / "tiny.gguf").read_bytes()
    end = data.draw(st.sampled_from([200, 2_000, 12_000, len(whole)]))
    path = tmp_path / "altered.gguf"
    path.write_bytes(data.draw(altered(whole[:end])) + whole[end:])

    def use() -> None:
        read_weights(path)
        use_tokenizer(path)

    refused_or(path, use)


# --- prepared corpora ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path]:
    """The config and the directory of a corpus that is tokenized, and whose entropies are all zero."""
    folder = tmp_path_factory.mktemp("prepared")
    directory = folder / "whole"
    config = dataclasses.replace(write_jsonl(folder / "a.jsonl", TEXTS), held_out_documents=1)
    tokenizer = load_tokenizer(TINY)
    plan = plan_shards(config)
    tokenize(config, plan, tokenizer, directory, lambda status: None)
    with ShardWriter(directory, "scores", 0, 1) as writer:
        for ids in open_tokens(config, directory, 1).tokens:
            writer.write([np.zeros(len(ids[0])), np.zeros(len(ids[0]))], [len(ids[0])])
        writer.commit({"made_from": {}, "histogram": [writer.records] + [0] * (BINS - 1)})
    write_manifest(Experiment(data=config), plan, tokenizer, "a fingerprint", directory)
    return config, directory


@many
@given(st.data())
def test_malformed_manifests_and_shards(prepared: tuple[DataConfig, Path], tmp_path: Path, data: st.DataObject) -> None:
    config, whole = prepared
    paths = [path for path in whole.iterdir() if path.suffix != ".png"]
    changed = data.draw(st.sampled_from(sorted(path.name for path in paths)))
    for path in paths:
        content = path.read_bytes()
        if path.name == changed:
            by_value = [altered_json(json.loads(content))] if path.suffix == ".json" else []
            content = data.draw(st.one_of(altered(content), *by_value))
        (tmp_path / path.name).write_bytes(content)

    def use() -> None:
        opened = open_prepared(config, load_tokenizer(TINY), tmp_path)
        opened.corpus.tokens.read(range(len(opened.corpus.tokens)))

    refused_or(tmp_path, use)
