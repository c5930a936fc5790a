"""Conversion of policies: Hugging Face directories, runs, checkpoints, safetensors and GGUF files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
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
from rpt_jax.conversion import convert
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import abstract_parameters
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import Checkpointer
from rpt_jax.infra.workdir import COLD_START, RUN_CONFIG, claimed_workdir
from rpt_jax.model.model_config import PRESETS
from rpt_jax.model.rope import Linear, Llama3, Yarn, llama3_divisors, rope_frequencies
from rpt_jax.model.transformer import Transformer
from rpt_jax.objective.update import TrainState
from rpt_jax.setup import load_starting_policy
from rpt_jax.tokenizers.files import read_tokenizer_files
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.weights.hf import load_model_config, load_policy, save_policy
from rpt_jax.weights.hf_config import FINGERPRINT_KEY
from rpt_jax.weights.model_files import INDEX_FILE, WEIGHTS_FILE
from rpt_jax.weights.safetensors_io import Tensors, TensorSpec, open_safetensors, write_safetensors
from tests.helpers.hf_models import PLAIN, SHAPE, SPECIAL, tokenizer_spec, write_gguf
from tests.helpers.paths import ROOT
from tests.helpers.policy_reference import random_params
from tests.helpers.processes import CHILD_SECONDS, with_devices


@pytest.fixture
def theirs(tmp_path):
    """Return a Hugging Face directory without a recorded tokenizer fingerprint."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    save_policy(directory, SHAPE, random_params(Transformer(SHAPE), 0), read_tokenizer_files(directory), "")
    edit(directory / "config.json", lambda config: config.pop(FINGERPRINT_KEY))
    return directory


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run(*argv) -> int:
    return command.main(["convert", *map(str, argv)])


def test_a_policy_can_be_imported_and_exported_again(theirs, tmp_path, capsys):
    edit(theirs / "config.json", lambda config: config.update(eos_token_id=258, transformers_version="5.0"))
    assert run(f"--from={theirs}", f"--to={tmp_path / 'new' / 'ours'}") == 0
    message = capsys.readouterr().out
    assert "(a Hugging Face directory)" in message and "(an rpt_jax policy)" in message
    assert "NFC" in message and "40 of its 300 ids have no token" in message
    ours = tmp_path / "new" / "ours"
    policy, _, tokenizer = load_starting_policy(PolicyConfig(path=str(ours), preset=""), make_mesh(1, 1, 1))
    assert policy.absent_ids == tuple(range(260, 300))
    assert load_model_config(ours)[1] == tokenizer.fingerprint
    assert tokenizer.stop_ids == (258, 259) and tokenizer.normalizer == "NFC"
    assert tokenizer.token_bytes(tokenizer.encode("e\u0301")) == "e\u0301".encode()
    assert run(f"--from={ours}", f"--to={tmp_path / 'out'}") == 0
    # The names of the special tokens, which were only known by id, are added.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in theirs.iterdir()} | {"tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    for path in theirs.iterdir():
        if path.name in ("config.json", WEIGHTS_FILE):
            continue
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (theirs / "config.json").read_text()
    )
    before, after = load_file(theirs / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_existing_files_are_kept_and_an_error_leaves_no_files(theirs, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert run(f"--from={theirs}", f"--to={tmp_path / 'there'}") == 2
    assert "already exists" in capsys.readouterr().err
    tensors = load_file(theirs / WEIGHTS_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(tensors, theirs / WEIGHTS_FILE)
    before = sorted(tmp_path.iterdir())
    assert run(f"--from={theirs}", f"--to={tmp_path / 'broken'}") == 2
    assert "model.layers.1.mlp.up_proj.weight contains NaN" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "argv", [[], ["--from=x"], ["--to=y"], ["--form=x", "--to=y"], ["--from=x", "--to=y", "z"]], ids=str
)
def test_an_invalid_command_line_is_refused(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(*argv)
    assert exited.value.code == 2
    assert "--from SOURCE --to DIR" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["nowhere", "no.gguf", "nowhere/checkpoints/3"])
def test_a_source_that_does_not_exist_is_refused(source, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(f"--from={source}", "--to=y") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_policy_with_another_tokenizer_is_refused(theirs, tmp_path):
    convert(theirs, tmp_path / "ours")
    path = tmp_path / "ours" / "tokenizer.json"
    edit(path, lambda spec: spec.update(version="1.0"))
    with pytest.raises(UserError) as raised:
        convert(tmp_path / "ours", tmp_path / "out")
    assert raised.value.field == str(path)


# --- runs ---


@pytest.fixture
def workdir(tmp_path, theirs):
    """Return the workdir of a run with two checkpoints, and the parameters of each by step."""
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


def test_every_checkpoint_of_a_run_can_be_exported(workdir, theirs, tmp_path):
    path, saved = workdir
    for source, step in ((path, 10), (path / "checkpoints" / "5", 5)):
        target = tmp_path / f"out{step}"
        assert f"checkpoint {step} of a run" in convert(source, target)
        config, params, fingerprint = load_policy(target)
        assert (config, fingerprint) == (SHAPE, "")
        assert (target / "chat_template.jinja").read_bytes() == (theirs / "chat_template.jinja").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, params, saved[step])


def test_a_checkpoint_after_a_cold_start_from_random_weights_has_the_tokenizer_of_the_cold_start(
    workdir, theirs, tmp_path, monkeypatch
):
    path, saved = workdir
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)
    fields = {"policy.path": "", "policy.preset": "tiny", "cold_start.total_steps": 1}
    edit(path / RUN_CONFIG, lambda content: content["config"].update(fields))
    (path / COLD_START).mkdir()
    shutil.copy(theirs / "tokenizer.json", path / COLD_START)
    convert(path, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "out")[1], saved[10])
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer(theirs).fingerprint


def test_a_finished_run_is_exported_as_its_final_policy(workdir, theirs, tmp_path):
    path, _ = workdir
    convert(theirs, path / "policy")
    assert "an rpt_jax policy" in convert(path, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "out")[1], load_policy(theirs)[1])


def test_a_missing_or_damaged_checkpoint_is_refused(workdir, tmp_path):
    path, _ = workdir
    with pytest.raises(UserError) as raised:
        convert(path / "checkpoints" / "7", tmp_path / "out")
    assert raised.value.field == str(path / "checkpoints")
    for file in (path / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    with pytest.raises(UserError) as raised:
        convert(path, tmp_path / "out")
    assert raised.value.field == "--workdir"


def test_a_checkpoint_of_another_architecture_is_refused(workdir, theirs, tmp_path):
    path, _ = workdir
    edit(theirs / "config.json", lambda config: config.update(hidden_size=64))
    with pytest.raises(UserError) as raised:
        convert(path / "checkpoints" / "5", tmp_path / "out")
    assert raised.value.field == "embedding"


# --- safetensors ---


def in_memory(arrays: dict[str, np.ndarray]) -> Tensors:
    specs = {name: TensorSpec(dtype=x.dtype, shape=x.shape) for name, x in arrays.items()}
    return Tensors(source="memory", specs=specs, fetch=arrays.__getitem__)


def test_shards_and_their_index(tmp_path):
    arrays = {f"t{i}": np.random.default_rng(i).random((10, i + 1)).astype(np.float32) for i in range(6)}
    write_safetensors(tmp_path, in_memory(arrays), max_shard_bytes=350)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert {n: f for f in files for n in load_file(tmp_path / f)} == index["weight_map"]
    opened = open_safetensors(tmp_path)
    assert all(np.array_equal(opened.read(n), x) for n, x in arrays.items()) and opened.specs.keys() == arrays.keys()

    def assert_refused(file: str) -> None:
        with pytest.raises(UserError) as raised:
            open_safetensors(tmp_path)
        assert raised.value.field == str(tmp_path / file)

    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"t9": files[1]}}))
    assert_refused(files[1])
    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"t0": files[1]}}))
    assert_refused(INDEX_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"t0": "../x"}}))
    assert_refused(INDEX_FILE)
    (tmp_path / INDEX_FILE).write_text('{"weight')
    assert_refused(INDEX_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    (tmp_path / files[2]).unlink()
    assert_refused(files[2])


def test_an_integer_tensor_is_refused(theirs):
    tensors = load_file(theirs / WEIGHTS_FILE)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.int32)}, theirs / WEIGHTS_FILE)
    with pytest.raises(UserError, match="model.norm.weight has dtype I32") as raised:
        load_policy(theirs)
    assert raised.value.field == str(theirs / WEIGHTS_FILE)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(theirs):
    tensors = load_file(theirs / WEIGHTS_FILE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, theirs / WEIGHTS_FILE)
    assert "head" not in load_policy(theirs)[1]
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, theirs / WEIGHTS_FILE)
    with pytest.raises(UserError) as raised:
        load_policy(theirs)
    assert raised.value.field == str(theirs / WEIGHTS_FILE)


@pytest.mark.parametrize("sharded", [False, True])
def test_loading_holds_at_most_two_tensors_on_the_host(tmp_path, sharded):
    # With an untied head, so that there are consecutive large tensors outside of the layers, too.
    config = dataclasses.replace(SHAPE, layers=4, width=128, ffn=4096, vocab=4096, tied=False)
    params, largest = random_params(Transformer(config), 0), 4096 * 128 * 4
    save_policy(tmp_path, config, params, {}, "")
    abstract = abstract_parameters(Transformer(config), make_mesh(1, 1, 1)) if sharded else None
    load_policy(tmp_path, abstract)  # Compile first.
    peaks, read = [], Tensors.read

    def measured(self, name):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        return read(self, name)

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensors, "read", measured)
        _, loaded, _ = load_policy(tmp_path, abstract)
    tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # The next tensor may be read while the one before is on its way to the device; everything else is small.
    assert max(peaks) < 2 * largest + 2**18
    if sharded:
        assert jax.tree.all(
            jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), loaded, abstract)
        )


# Loads a policy on eight devices, and asserts that no transfer puts more than an eighth of a matrix on one of them.
_LOAD_ON_EIGHT_DEVICES = """
import sys, jax, numpy as np
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import abstract_parameters
from rpt_jax.model.transformer import Transformer
from rpt_jax.weights.hf import load_policy

config, expected, _ = load_policy(sys.argv[1])
abstract = abstract_parameters(Transformer(config), make_mesh(1, 4, 2))
make_array, fractions = jax.make_array_from_callback, []

def measured(shape, sharding, callback):
    array = make_array(shape, sharding, callback)
    if array.ndim > 1:
        fractions.append(max(shard.data.size for shard in array.addressable_shards) / array.size)
    return array

jax.make_array_from_callback = measured
_, loaded, _ = load_policy(sys.argv[1], abstract)
jax.tree.map(np.testing.assert_array_equal, loaded, expected)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), loaded, abstract))
assert len(jax.devices()) == 8 and max(fractions) == 1 / 8, fractions
"""


def test_loading_puts_only_its_own_shards_on_each_device(tmp_path):
    """For a policy with biases and an untied head."""
    config = dataclasses.replace(SHAPE, qkv_bias=True, tied=False)
    save_policy(tmp_path, config, random_params(Transformer(config), 0), {}, "")
    argv = [sys.executable, "-c", _LOAD_ON_EIGHT_DEVICES, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=with_devices(8), capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


# --- GGUF ---


@pytest.fixture
def gguf_file(theirs):
    """Return the path of a GGUF file in a directory with the tokenizer of `write_gguf`; a test writes the file."""
    return theirs / "tiny.gguf"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tied": False, "norm_epsilon": 1e-5}),
        ("qwen2", {"qkv_bias": True, "rope_base": 1e6}),
        ("qwen3", {"qk_norm": True, "head_size": 16}),
    ],
)
def test_gguf_weights_are_those_of_the_original_policy(gguf_file, tmp_path, family, options):
    """Only Llama's rows are reordered; a quantized tensor is read as its dequantized values."""
    config, down = dataclasses.replace(SHAPE, **options), "model.layers.1.mlp.down_proj.weight"
    weights = write_gguf(gguf_file, family, config, quantized=(down,))
    assert load_model_config(gguf_file) == (config, "") and load_model_config(gguf_file)[0].context == 64
    convert(gguf_file, tmp_path / "ours")
    ours, q8 = load_file(tmp_path / "ours" / WEIGHTS_FILE), gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(weights[down]), q8), q8)
    assert ours.keys() == weights.keys() and not np.array_equal(expected, weights[down])
    for name, tensor in (weights | {down: expected}).items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, load_policy(gguf_file)[1], load_policy(tmp_path / "ours")[1])


def test_gguf_tokenizer_is_that_of_its_header(gguf_file, tmp_path):
    write_gguf(gguf_file)
    convert(gguf_file, tmp_path / "ours")
    for tokenizer in (load_tokenizer(gguf_file), load_tokenizer(tmp_path / "ours")):
        assert tokenizer.vocab_size == len(PLAIN + SPECIAL) and tokenizer.special_ids == {257, 258, 259}
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (257, 258, (258, 259))
        assert tokenizer.encode("a t12<|im_end|>")[:2] == [PLAIN.index("a"), 256]
        assert tokenizer.token_bytes(tokenizer.encode("a t12<|im_end|>\u00e9")) == "a t12<|im_end|>\u00e9".encode()
        assert tokenizer.fingerprint == load_model_config(tmp_path / "ours")[1]
        assert tokenizer.special_names == dict(zip((257, 258, 259), SPECIAL, strict=True))
    config = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["eos_token"] == "<|im_end|>"


def test_the_rope_scaling_of_llama_3_is_recovered_from_gguf(gguf_file):
    scaling = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = dataclasses.replace(SHAPE, rope_base=5e5, rope_scaling=scaling)
    divisors = llama3_divisors(rope_frequencies(8, 5e5, None)[0], scaling).astype(np.float32)
    name = "rope_freqs.weight"
    write_gguf(gguf_file, config=config, pre_tokenizer="llama-bpe", extra_tensors={name: divisors})
    assert load_policy(gguf_file)[0] == config
    write_gguf(gguf_file, config=config, pre_tokenizer="llama-bpe", extra_tensors={name: divisors[::-1].copy()})
    with pytest.raises(UserError, match=name) as raised:
        load_model_config(gguf_file)
    assert raised.value.field == str(gguf_file)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"rope.dimension_count": 8, "attention.value_length": 8, "attention.sliding_window": 64}, None),
        ({"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0, "expert_count": 0, "vocab_size": 260}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, Linear(4.0)),
        ({"rope.scaling.factor": 4.0}, Linear(4.0)),
        ({"rope.scale_linear": 4.0}, Linear(4.0)),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, Yarn(4.0, 64)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 1.25,
            },
            Yarn(4.0, 16, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0),
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_attn_factor": 1.1},
            Yarn(4.0, 64, attention_factor=1.1),
        ),
    ],
    ids=str,
)
def test_every_key_of_a_gguf_header_that_changes_the_frequencies_is_read(gguf_file, keys, scaling):
    write_gguf(gguf_file, extra_keys={f"llama.{key}": value for key, value in keys.items()})
    assert load_model_config(gguf_file)[0] == dataclasses.replace(SHAPE, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"family": "phi3"}, "general.architecture='phi3'"),
        ({"tokenizer_model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"pre_tokenizer": "tekken"}, "tokenizer.ggml.pre='tekken'"),
        ({"extra_keys": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count=4"),
        ({"extra_keys": {"llama.attention.value_length": 16}}, "llama.attention.value_length=16"),
        ({"extra_keys": {"llama.attention.sliding_window": 32}}, "llama.attention.sliding_window=32"),
        ({"extra_keys": {"llama.attention.scale": 0.5}}, "llama.attention.scale=0.5"),
        ({"extra_keys": {"llama.logit_scale": 2.0}}, "llama.logit_scale=2.0"),
        ({"extra_keys": {"llama.expert_count": 8}}, "llama.expert_count=8"),
        ({"extra_keys": {"llama.attention.causal": False}}, "llama.attention.causal=False"),
        ({"extra_keys": {"llama.rope.freq_base_swa": 10.0}}, "llama.rope.freq_base_swa"),
        ({"extra_keys": {"llama.rope.scaling.yarn_beta_fast": 16.0}}, "llama.rope.scaling.yarn_beta_fast"),
        ({"extra_keys": {"llama.rope.scaling.attn_factor": 1.5}}, "llama.rope.scaling.attn_factor"),
        ({"extra_keys": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        (
            {
                "extra_keys": {
                    "llama.rope.scaling.type": "yarn",
                    "llama.rope.scaling.factor": 4.0,
                    "llama.rope.scaling.attn_factor": 1.5,
                    "llama.rope.scaling.yarn_attn_factor": 1.2,
                }
            },
            "llama.rope.scaling.attn_factor",
        ),
        ({"extra_keys": {"adapter.type": "lora"}}, "adapter.type"),
        ({"extra_tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "blk.0.attn_sinks.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gguf_file_that_is_not_supported_is_refused(gguf_file, tmp_path, options, cause):
    write_gguf(gguf_file, **options)
    with pytest.raises(UserError, match=re.escape(cause)) as raised:
        convert(gguf_file, tmp_path / "ours")
    assert raised.value.field == str(gguf_file)


@pytest.mark.parametrize("kept", [0, 3, 100, 6000])
def test_a_truncated_gguf_file_is_refused(gguf_file, tmp_path, kept):
    write_gguf(gguf_file)
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(UserError) as raised:
        convert(gguf_file, tmp_path / "ours")
    assert raised.value.field == str(gguf_file)


@pytest.mark.parametrize(
    ("original", "damaged"), [(b"smollm", b"\xffmollm"), (b"head_count\x04\0\0\0\x04", b"head_count\x04\0\0\0\0")]
)
def test_a_gguf_file_with_an_invalid_value_is_refused(gguf_file, tmp_path, original, damaged):
    write_gguf(gguf_file)
    data = gguf_file.read_bytes()
    assert original in data
    gguf_file.write_bytes(data.replace(original, damaged))
    with pytest.raises(UserError) as raised:
        convert(gguf_file, tmp_path / "ours")
    assert raised.value.field == str(gguf_file)


def test_the_tiny_policy_records_its_tokenizer(tmp_path):
    assert "an rpt_jax policy" in convert(ROOT / "configs" / "tiny", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file()
