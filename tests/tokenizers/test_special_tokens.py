"""Special tokens from all files of a model, with `transformers` as the reference."""

from __future__ import annotations

import json

import pytest

from rpt_jax.errors import UserError
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers.hf_models import PLAIN, SPECIAL, hf_config, tokenizer_spec, write_gguf
from tests.helpers.tokenizers import TEXTS, write_hf

transformers = pytest.importorskip("transformers", reason="a requirement in tests/requirements.txt")

START, END, TEXT_END = range(len(PLAIN), len(PLAIN) + len(SPECIAL))
DECODER = {
    str(len(PLAIN) + i): {"content": name, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    for i, name in enumerate(SPECIAL)
}
# What the files say, by name without extension, and the resulting end of text, begin of text and ids that end a response.
CASES = {
    "several ids in config.json": (
        {
            "config": {"eos_token_id": [TEXT_END, END], "bos_token_id": END},
            "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None},
        },
        (END, None, {TEXT_END, END}),
    ),
    "generation_config.json before config.json": (
        {
            "config": {"eos_token_id": START},
            "generation_config": {"eos_token_id": [TEXT_END, END]},
            "tokenizer_config": {"eos_token": "<|im_end|>"},
        },
        (END, None, {TEXT_END, END}),
    ),
    "special_tokens_map.json alone": (
        {
            "config": {"eos_token_id": END},
            "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}},
        },
        (END, START, {END}),
    ),
    "special_tokens_map.json before tokenizer_config.json": (
        {
            "generation_config": {"eos_token_id": END},
            "tokenizer_config": {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"},
            "special_tokens_map": {"eos_token": "<|im_end|>"},
        },
        (END, START, {END}),
    ),
    "tokenizer_config.json with added_tokens_decoder before special_tokens_map.json": (
        {
            "generation_config": {"eos_token_id": END},
            "tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER},
            "special_tokens_map": {"eos_token": "<|endoftext|>"},
        },
        (END, None, {END}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_equal_those_of_transformers(tmp_path, name):
    files, (eos_id, bos_id, stop_ids) = CASES[name]
    write_hf(tmp_path, tokenizer_spec(), **files | {"config": hf_config(**files.get("config", {}))})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    try:
        generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(json.loads((tmp_path / "config.json").read_text()))
    ends = generation.eos_token_id
    assert (theirs.eos_token_id, theirs.bos_token_id) == (eos_id, bos_id)
    assert set(ends if isinstance(ends, list) else [ends]) == stop_ids

    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == eos_id and tokenizer.bos_id == (eos_id if bos_id is None else bos_id)
    assert set(tokenizer.stop_ids) == stop_ids and tokenizer.stop_ids[0] == eos_id
    assert f"<|im_end|> ({END})" in tokenizer.describe_stop_ids()


def test_the_end_of_text_token_ends_a_response_beside_those_in_generation_config(tmp_path):
    write_hf(
        tmp_path,
        tokenizer_spec(),
        tokenizer_config={"eos_token": "<|im_end|>"},
        generation_config={"eos_token_id": TEXT_END},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (END, TEXT_END)
    assert tokenizer.describe_stop_ids() == f"A response ends at <|im_end|> ({END}) or <|endoftext|> ({TEXT_END})."


def test_an_ordinary_token_may_end_a_response(tmp_path):
    newline = PLAIN.index("\u010a")
    write_hf(tmp_path, tokenizer_spec(), generation_config={"eos_token_id": [END, newline]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (END, newline) and tokenizer.encode("\n") == [newline]
    assert tokenizer.describe_stop_ids() == f"A response ends at <|im_end|> ({END}) or '\\n' ({newline})."


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_are_added_beside_tokenizer_json_exist(tmp_path, form):
    new = len(PLAIN + SPECIAL)
    files = {"tokenizer_config": {"eos_token": "<|eot|>"}}
    if form == "added_tokens_decoder":
        token = {"content": "<|eot|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        files["tokenizer_config"]["added_tokens_decoder"] = DECODER | {str(new): token}
    else:
        files["added_tokens"] = {"<|eot|>": new}
    write_hf(tmp_path, tokenizer_spec(), config=hf_config(), **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.vocab_size) == (new, new + 1)
    assert new in tokenizer.special_ids and new not in tokenizer.encode("a<|eot|>")

    # With another id than the token would get.
    if form == "added_tokens.json":
        write_hf(tmp_path, tokenizer_spec(), added_tokens={"<|eot|>": new + 50})
        with pytest.raises(UserError) as raised:
            load_tokenizer(tmp_path)
        assert raised.value.field == str(tmp_path / "tokenizer.json")


def test_files_override_the_special_tokens_of_a_sentencepiece_model(tmp_path):
    train_sentencepiece(TEXTS, 350, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).stop_ids == (2,)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</think>", "pad_token": "<unk>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (5, 1, 3)
    assert tokenizer.stop_ids == (5, 2) and "</think> (5) or </s> (2)" in tokenizer.describe_stop_ids()


def test_a_declared_token_that_does_not_exist_is_named_in_a_warning(tmp_path, caplog):
    write_hf(
        tmp_path,
        tokenizer_spec(),
        tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        generation_config={"eos_token_id": [END, 290], "pad_token_id": -1},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (END,) and tokenizer.pad_id == END
    assert "<pad>" in caplog.text and "[290]" in caplog.text and "[-1]" not in caplog.text


@pytest.mark.parametrize("value", ["2", [2.5], [True], {"id": 2}], ids=str)
def test_an_id_that_is_not_a_number_is_refused(tmp_path, value):
    write_hf(tmp_path, tokenizer_spec(), generation_config={"eos_token_id": value})
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field == str(tmp_path / "generation_config.json")


@pytest.mark.parametrize("value", [{"7": "x"}, {"x": {"content": "y"}}, {"7": {}}, [1]], ids=str)
def test_damaged_added_tokens_are_refused(tmp_path, value):
    write_hf(tmp_path, tokenizer_spec(), tokenizer_config={"added_tokens_decoder": value})
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert raised.value.field == str(tmp_path / "tokenizer_config.json")


# --- GGUF ---


def test_all_end_tokens_of_a_gguf_header_end_a_response(tmp_path):
    """Those that the header names (eos, eot, eom), and known names: here all three special tokens."""
    write_gguf(tmp_path / "a.gguf")
    assert load_tokenizer(tmp_path / "a.gguf").stop_ids == (END, TEXT_END)
    write_gguf(tmp_path / "b.gguf", extra_keys={"tokenizer.ggml.eom_token_id": START})
    assert load_tokenizer(tmp_path / "b.gguf").stop_ids == (END, TEXT_END, START)


@pytest.mark.parametrize("key", ["eom_token_id", "padding_token_id"])
@pytest.mark.parametrize(("value", "warns"), [(9999, True), (2**32 - 1, False)])
def test_an_id_of_a_gguf_header_that_is_not_a_token_is_announced(tmp_path, caplog, key, value, warns):
    write_gguf(tmp_path / "a.gguf", extra_keys={f"tokenizer.ggml.{key}": value})
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert tokenizer.stop_ids == (END, TEXT_END) and tokenizer.pad_id == END
    assert [f"tokenizer.ggml.{key}=9999" in record.getMessage() for record in caplog.records] == [True] * warns


def test_an_id_of_a_gguf_header_that_is_no_number_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", extra_keys={"tokenizer.ggml.eom_token_id": "258"})
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path / "a.gguf")
    assert raised.value.field == str(tmp_path / "a.gguf")


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges"])
@pytest.mark.parametrize("value", [[1], 1], ids=str)
def test_lists_of_a_gguf_header_that_are_damaged_are_refused(tmp_path, key, value):
    if key == "merges" and value == [1]:
        value = "one"
    write_gguf(tmp_path / "a.gguf", extra_keys={f"tokenizer.ggml.{key}": value})
    with pytest.raises(UserError, match="must be lists") as raised:
        load_tokenizer(tmp_path / "a.gguf")
    assert raised.value.field == str(tmp_path / "a.gguf")


@pytest.mark.parametrize(("header", "begins"), [({}, False), ({"add_bos_token": True}, True)], ids=str)
def test_a_gguf_header_says_whether_texts_begin_with_the_begin_of_text_token(tmp_path, header, begins):
    write_gguf(tmp_path / "a.gguf", extra_keys={f"tokenizer.ggml.{key}": value for key, value in header.items()})
    files = read_tokenizer_files(tmp_path / "a.gguf")
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is begins
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a").input_ids == ([START] if begins else []) + [PLAIN.index("a")]


def test_further_chat_templates_of_a_gguf_header_are_kept(tmp_path):
    write_gguf(tmp_path / "a.gguf", extra_keys={"tokenizer.chat_template.tool_use": "tools"})
    templates = json.loads(read_tokenizer_files(tmp_path / "a.gguf")["tokenizer_config.json"])["chat_template"]
    assert templates == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "tools"},
    ]


@pytest.mark.parametrize(
    ("alias", "name"), [("llama3", "llama-bpe"), ("megrez", "qwen2"), ("phi-2", "gpt-2"), ("refact", "smollm")]
)
def test_other_names_of_a_pre_tokenizer_are_read(tmp_path, alias, name):
    def spec(pre_tokenizer: str) -> dict:
        write_gguf(tmp_path / "a.gguf", pre_tokenizer=pre_tokenizer)
        return json.loads(read_tokenizer_files(tmp_path / "a.gguf")["tokenizer.json"])

    assert spec(alias) == spec(name)
