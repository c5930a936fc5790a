"""Policies in and out by the command line: what is recognized, what is refused, and what a GGUF file holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc

import gguf
import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from rpt_jax import convert as command
from rpt_jax.config import Experiment, PolicyConfig
from rpt_jax.convert import convert
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import parameter_shardings
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.workdir import claimed_workdir
from rpt_jax.model.model_config import ModelConfig
from rpt_jax.model.rope import Llama3, llama3_divisors, rope_frequencies
from rpt_jax.model.transformer import Transformer
from rpt_jax.objective.update import TrainState
from rpt_jax.setup import load_start
from rpt_jax.tokenizers.tokenizer import byte_level_alphabet, load_tokenizer
from rpt_jax.weights import safetensors_io as tensors_module
from rpt_jax.weights.hf import load_model_config, load_policy, save_policy
from rpt_jax.weights.hf_config import FINGERPRINT
from rpt_jax.weights.safetensors_io import INDEX, WEIGHTS, Spec, Tensors, open_safetensors, write_safetensors
from tests.helpers.paths import ROOT
from tests.helpers.policy_reference import random_params

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=64, vocab=300)
PLAIN = [*byte_level_alphabet(), "Ġt"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def tokenizer_spec() -> dict:
    return {
        "added_tokens": [
            {"id": len(PLAIN) + i, "content": name, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for i, name in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(PLAIN)}, "merges": ["Ġ t"]},
    }


@pytest.fixture
def theirs(tmp_path):
    """A Hugging Face directory as others write it: no fingerprint of ours."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    save_policy(directory, SHAPE, random_params(Transformer(SHAPE), 0), directory / "tokenizer.json", "")
    edit(directory / "config.json", lambda config: config.pop(FINGERPRINT))
    return directory


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run(*argv) -> int:
    return command.main(["convert", *map(str, argv)])


def test_a_foreign_policy_becomes_ours_and_foreign_again(theirs, tmp_path, capsys):
    edit(theirs / "config.json", lambda config: config.update(eos_token_id=258, transformers_version="5.0"))
    assert run(f"--from={theirs}", f"--to={tmp_path / 'new' / 'ours'}") == 0
    said = capsys.readouterr().out
    assert "a Hugging Face directory: it is now our policy" in said
    assert (
        "normalizes texts (NFC)" in said and "40 of its 300 ids stand for no token; rpt_jax never samples them" in said
    )
    ours = tmp_path / "new" / "ours"
    policy, _, tokenizer = load_start(PolicyConfig(path=str(ours), preset=""), make_mesh(1, 1, 1))
    assert policy.absent_ids == tuple(range(260, 300))
    assert load_model_config(ours)[1] == tokenizer.fingerprint
    assert tokenizer.stop_ids == (258, 259) and tokenizer.normalizer == "NFC"
    assert tokenizer.token_bytes(tokenizer.encode("e\u0301")) == "e\u0301".encode()
    assert run(f"--from={ours}", f"--to={tmp_path / 'out'}") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in theirs.iterdir():
        if path.name in ("config.json", WEIGHTS):
            continue
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (theirs / "config.json").read_text()
    )
    before, after = load_file(theirs / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_nothing_is_overwritten_and_nothing_half_is_left(theirs, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert run(f"--from={theirs}", f"--to={tmp_path / 'there'}") == 2
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    tensors = load_file(theirs / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(tensors, theirs / WEIGHTS)
    before = sorted(tmp_path.iterdir())
    assert run(f"--from={theirs}", f"--to={tmp_path / 'broken'}") == 2
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--from=SOURCE and --to=DIR"),
        (["--from=x"], "--from=SOURCE and --to=DIR"),
        (["--form=x", "--to=y"], "form"),
        (["--from=nowhere", "--to=y"], "neither a .gguf file nor a directory"),
        (["--from=no.gguf", "--to=y"], "no.gguf cannot be read"),
        (["--from=nowhere/checkpoints/3", "--to=y"], "it is not the --workdir of a run"),
    ],
    ids=str,
)
def test_command_lines_that_are_refused(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("from", "to"):
        command.flags.FLAGS[flag].value = None
    assert run(*argv) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_policy_with_a_foreign_tokenizer(theirs, tmp_path):
    convert(theirs, tmp_path / "ours")
    edit(tmp_path / "ours" / "tokenizer.json", lambda spec: spec.update(version="1.0"))
    with pytest.raises(UserError, match="tokenizer.json is not the tokenizer of the policy"):
        convert(tmp_path / "ours", tmp_path / "out")


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path, theirs):
    """Return a run with two checkpoints, and the parameters in each."""
    path, saved = tmp_path / "run", {}
    with claimed_workdir(path, Experiment(policy=PolicyConfig(path=str(theirs), preset=""))):
        optimizer = optax.adam(1.0)
        states = {}
        for step in (5, 10):
            saved[step] = random_params(Transformer(SHAPE), step)
            states[step] = TrainState(saved[step], optimizer.init(saved[step]))
        checkpoints = Checkpointer(path, 2, states[5])
        for step, state in states.items():
            checkpoints.stage(step, state, {"stream": step})
            checkpoints.save()
        checkpoints.close()
    return path, saved


def test_any_checkpoint_of_a_run(workdir, theirs, tmp_path):
    path, saved = workdir
    for source, step in ((path, 10), (path / "checkpoints" / "5", 5)):
        target = tmp_path / f"out{step}"
        assert f"checkpoint {step} of a run" in convert(source, target)
        shape, params, fingerprint = load_policy(target)
        assert (shape, fingerprint) == (SHAPE, "")
        assert (target / "chat_template.jinja").read_bytes() == (theirs / "chat_template.jinja").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, params, saved[step])


def test_a_finished_run_is_its_policy(workdir, theirs, tmp_path):
    path, _ = workdir
    convert(theirs, path / "policy")
    assert "our policy" in convert(path, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "out")[1], load_policy(theirs)[1])


def test_runs_that_cannot_be_exported(workdir, theirs, tmp_path):
    path, _ = workdir
    with pytest.raises(UserError, match="has no checkpoint 7; it has 5, 10"):
        convert(path / "checkpoints" / "7", tmp_path / "out")
    for file in (path / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    with pytest.raises(UserError, match="10 is damaged"):
        convert(path, tmp_path / "out")
    edit(theirs / "config.json", lambda config: config.update(hidden_size=64))
    with pytest.raises(UserError, match=r"shape \(300, 32\), expected \(300, 64\)"):
        convert(path / "checkpoints" / "5", tmp_path / "out")


# --- files of tensors --------------------------------------------------------------------------------


def in_memory(arrays) -> Tensors:
    return Tensors("memory", {n: Spec(x.dtype, x.shape) for n, x in arrays.items()}, arrays.__getitem__)


def test_shards_and_their_index(tmp_path, monkeypatch):
    arrays = {f"t{i}": np.random.default_rng(i).random((10, i + 1)).astype(np.float32) for i in range(6)}
    monkeypatch.setattr(tensors_module, "_SHARD_BYTES", 350)
    write_safetensors(tmp_path, in_memory(arrays))
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert {n: f for f in files for n in load_file(tmp_path / f)} == index["weight_map"]
    opened = open_safetensors(tmp_path)
    assert all(np.array_equal(opened.read(n), x) for n, x in arrays.items()) and opened.specs.keys() == arrays.keys()

    def refused(message):
        with pytest.raises(UserError, match=message):
            open_safetensors(tmp_path)

    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"t9": files[1]}}))
    refused(f"{files[1]} lacks the tensor t9")
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"t0": "../x"}}))
    refused("must name files beside it")
    (tmp_path / INDEX).write_text('{"weight')
    refused(f"{INDEX} cannot be read")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / files[2]).unlink()
    refused(f"{files[2]} cannot be read as safetensors")


def test_dtypes_that_are_not_weights(theirs):
    tensors = load_file(theirs / WEIGHTS)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.int32)}, theirs / WEIGHTS)
    with pytest.raises(UserError, match="model.norm.weight is I32, which is not one of: F32, F16, BF16"):
        load_policy(theirs)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(theirs):
    tensors = load_file(theirs / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, theirs / WEIGHTS)
    assert "head" not in load_policy(theirs)[1]
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, theirs / WEIGHTS)
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        load_policy(theirs)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_host_holds_less_than_two_tensors(tmp_path, sharded):
    # With a head of its own, so that large tensors follow each other outside of the layers, too.
    shape = dataclasses.replace(SHAPE, layers=4, width=128, ffn=4096, vocab=4096, tied=False)
    params, largest = random_params(Transformer(shape), 0), 4096 * 128 * 4
    save_policy(tmp_path, shape, params, tmp_path / "tokenizer.json", "")
    shardings = parameter_shardings(Transformer(shape), make_mesh(1, 1, 1)) if sharded else None
    load_policy(tmp_path, shardings)  # Compiles.
    peaks, read = [], tensors_module.Tensors.read

    def measured(self, name):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        return read(self, name)

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_module.Tensors, "read", measured)
        _, loaded, _ = load_policy(tmp_path, shardings)
    tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert max(peaks) < 2 * largest
    if sharded:
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings))


_ON_EIGHT_DEVICES = """
import sys, jax, numpy as np
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import parameter_shardings
from rpt_jax.weights import hf
from rpt_jax.model.transformer import Transformer
from rpt_jax.setup import load_start
shape, expected, _ = hf.load_policy(sys.argv[1])
shardings = parameter_shardings(Transformer(shape), make_mesh(1, 4, 2))
put, parts = hf._put, []
def counted(tensor, sharding):
    array = put(tensor, sharding)
    parts.append(max(shard.data.size for shard in array.addressable_shards) / tensor.size if tensor.ndim > 1 else 0)
    return array
hf._put = counted
_, loaded, _ = hf.load_policy(sys.argv[1], shardings)
jax.tree.map(np.testing.assert_array_equal, loaded, expected)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings))
assert len(jax.devices()) == 8 and max(parts) == 1 / 8, parts
"""


def test_no_device_holds_more_than_its_share(tmp_path):
    """Not even while it reads, of a policy with biases and a head of its own."""
    shape = dataclasses.replace(SHAPE, qkv_bias=True, tied=False)
    save_policy(tmp_path, shape, random_params(Transformer(shape), 0), tmp_path / "tokenizer.json", "")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", _ON_EIGHT_DEVICES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | devices, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


# --- GGUF --------------------------------------------------------------------------------------------


def write_gguf(path, family="llama", shape=SHAPE, quantized=(), pre="smollm", kind="gpt2", **tensors):
    """Write a policy as llama.cpp does, the rows of Llama's queries and keys turned; return its tensors by their names."""
    policy = path.parent / "policy"
    save_policy(policy, shape, random_params(Transformer(shape), 1), path.parent / "tokenizer.json", "")
    weights, writer = load_file(policy / WEIGHTS), gguf.GGUFWriter(path, family)
    writer.add_context_length(64), writer.add_embedding_length(shape.width), writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn), writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads), writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon), writer.add_key_length(shape.head_size)
    writer.add_tokenizer_model(kind), writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{i}]" for i in range(shape.vocab - len(PLAIN + SPECIAL))]
    writer.add_token_list(PLAIN + SPECIAL + padding)
    writer.add_token_types([1] * len(PLAIN) + [3] * len(SPECIAL) + [5] * len(padding))
    writer.add_token_merges(["Ġ t"]), writer.add_chat_template("{{ messages }}")
    writer.add_bos_token_id(257), writer.add_eos_token_id(258), writer.add_eot_token_id(259)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, shape.layers)  # A superset of the others.
    for name, tensor in weights.items():
        tensor = np.ascontiguousarray(tensor)
        for part, heads in (("q_proj.", shape.heads), ("k_proj.", shape.kv_heads)):
            if family == "llama" and part in name:
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
                tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name in quantized:
            tensor = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(theirs, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(theirs, tensor)
    for name, tensor in tensors.items():
        writer.add_tensor(name.replace("__", "."), tensor)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def file(theirs):
    return theirs / "tiny.gguf"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tied": False, "norm_epsilon": 1e-5}),
        ("qwen2", {"qkv_bias": True, "rope_base": 1e6}),
        ("qwen3", {"qk_norm": True, "head_size": 16}),
    ],
)
def test_gguf(file, tmp_path, family, options):
    """Llama's rows are put in order again, Qwen's are in order; what is quantized comes back as its own values."""
    shape, down = dataclasses.replace(SHAPE, **options), "model.layers.1.mlp.down_proj.weight"
    weights = write_gguf(file, family, shape, quantized=(down,))
    assert load_model_config(file) == (shape, "") and load_model_config(file)[0].context == 64
    convert(file, tmp_path / "ours")
    ours, q8 = load_file(tmp_path / "ours" / WEIGHTS), gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(weights[down]), q8), q8)
    assert ours.keys() == weights.keys() and not np.array_equal(expected, weights[down])
    for name, tensor in (weights | {down: expected}).items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, load_policy(file)[1], load_policy(tmp_path / "ours")[1])


def test_gguf_tokenizer(file, tmp_path):
    write_gguf(file)
    convert(file, tmp_path / "ours")
    for tokenizer in (load_tokenizer(file), load_tokenizer(tmp_path / "ours")):
        assert tokenizer.vocab_size == len(PLAIN + SPECIAL) and tokenizer.special_ids == {257, 258, 259}
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (257, 258, (258, 259))
        assert tokenizer.encode("a t12<|im_end|>")[:2] == [PLAIN.index("a"), 256]
        assert tokenizer.token_bytes(tokenizer.encode("a t12<|im_end|>\u00e9")) == "a t12<|im_end|>\u00e9".encode()
        assert tokenizer.fingerprint == load_model_config(tmp_path / "ours")[1]
    config = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["eos_token"] == "<|im_end|>"


def test_gguf_with_the_scaling_of_llama_3(file):
    meant = Llama3(8.0, 1.0, 4.0, 8192)
    shape = dataclasses.replace(SHAPE, rope_base=5e5, rope_scaling=meant)
    divisors = llama3_divisors(rope_frequencies(8, 5e5, None)[0], meant).astype(np.float32)
    write_gguf(file, shape=shape, pre="llama-bpe", rope_freqs__weight=divisors)
    assert load_policy(file)[0] == shape
    write_gguf(file, shape=shape, pre="llama-bpe", rope_freqs__weight=divisors[::-1].copy())
    with pytest.raises(UserError, match="rope_freqs.weight is not the scaling of Llama 3"):
        load_model_config(file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "phi3"}, "general.architecture='phi3' is not among the architectures of rpt_jax: 'llama' .Llama 3"),
        ({"kind": "llama"}, "tokenizer.ggml.model='llama' is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not one of: smollm"),
        ({"blk__0__attn_sinks__weight": np.ones(4, np.float32)}, "no place for: blk.0.attn_sinks.weight"),
    ],
    ids=["family", "sentencepiece", "split", "tensor"],
)
def test_gguf_that_cannot_be_used(file, tmp_path, options, said):
    write_gguf(file, **options)
    with pytest.raises(UserError, match=said):
        convert(file, tmp_path / "ours")


@pytest.mark.parametrize("kept", [0, 3, 100, 6000])
def test_damaged_gguf(file, tmp_path, kept):
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="tiny.gguf is not a GGUF file, or damaged"):
        convert(file, tmp_path / "ours")


def test_the_tiny_policy_is_ours(tmp_path):
    assert "our policy" in convert(ROOT / "configs" / "tiny", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file()
