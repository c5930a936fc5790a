"""Derived sizes against hand arithmetic, and against what JAX keeps."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import rich
from flax import linen as nn
from rich.console import Console

from rpt_jax.config import Experiment, MeshConfig
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.describe import describe, print_description
from rpt_jax.errors import UserError
from rpt_jax.model.attention.packed import make_key_ranges
from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from tests.config.test_config import CONFIGS, load
from tests.helpers.paths import ROOT

PAPER = load(ROOT / "configs" / "rpt_14b.py")
GIB = 2**30


def values(experiment: Experiment, devices: int = 1) -> dict[str, Any]:
    """Return the value of every row by its name, which must be its own."""
    rows = describe(experiment, devices)
    assert len({row.what for row in rows}) == len(rows)
    return {row.what: row.value for row in rows}


def replaced(experiment: Experiment, section: str, **fields: Any) -> Experiment:
    return dataclasses.replace(experiment, **{section: dataclasses.replace(getattr(experiment, section), **fields)})


def test_14b_sizes_by_hand():
    found = values(PAPER, 64)
    n = 48 * (5120 * 128 * (40 + 8 + 8 + 40) + 3 * 5120 * 13_824) + 152_064 * 5120
    expected = {
        "parameters": n + 152_064 * 5120 + 48 * (7 * 1024 + 2 * 5120) + 5120,
        "parameters that a token is multiplied with (N)": n,
        "mesh: data x fsdp x tensor": "1 x 8 x 8 = 64 devices",
        "rollouts per step": 2048,
        "microbatches per step, at most": 128,
        "prompts per device": 32,
        "rollouts per device": 256,
        "tokens per device, microbatch": 20_480,
        "prompt tokens per step, at most": 256 * 4096,
        "response tokens per step, at most": 2048 * 8192,
        "trunk tokens per prompt, its samples sharing it: S + G*T": 69_632,
        "trunk tokens per prompt, were it not shared: G*(S + T)": 98_304,
        "trunk tokens, shared / not shared": pytest.approx(17 / 24),
        "bytes of a token's keys and values": 196_608,
        "bytes per device: keys and values of prompts": 3 * GIB,
        "bytes per device: keys and values of responses": 48 * GIB,
        "bytes per device: a layer's attention scores, prompts": 0,
        "bytes per device: a chunk of logits": 4096 * 152_064 * 4 // 8,
        "steps": 1000,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["parameters"] == pytest.approx(14.77e9, rel=1e-4)


def test_14b_compute_by_hand():
    found = values(PAPER, 64)
    n, tokens = 13_990_625_280, 256 * 69_632
    # Per layer and head, 2 FLOPs a dimension for the score of a pair and 2 for its value.
    pairs = 256 * (4096**2 + 8 * 8192 * (4096 + 8192))
    attention = 4 * 48 * 40 * 128 * pairs
    assert found["FLOPs of sampling: 2*N a token"] == pytest.approx(2 * n * tokens)
    assert found["FLOPs of the update: 6*N a token"] == pytest.approx(6 * n * tokens)
    assert found["FLOPs of sampling: attention"] == pytest.approx(attention)
    assert found["FLOPs of the update: attention"] == pytest.approx(3 * attention)
    step = 8 * n * tokens + 4 * attention
    assert found["FLOPs of a step, at most"] == pytest.approx(step)
    assert found["FLOPs of all steps, at most"] == pytest.approx(1000 * step)
    # Steps 500 to 1000 sample up to two times more.
    assert found["FLOPs of dynamic sampling on top, at most"] == pytest.approx(501 * 2 * (2 * n * tokens + attention))


def test_14b_memory_by_hand():
    found = values(PAPER, 64)
    share = 4 * 14_770_033_664 // 64
    assert found["bytes per device: parameters, and those of the start"] == 2 * share
    assert found["bytes per device: Adam's two moments"] == 2 * share
    assert found["bytes per device: gradients, sum and microbatch's"] == 2 * share
    # Whole on every 4 devices, for decoding: the layers' matrices in bfloat16, the rest in float32.
    matrices = 48 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 13_824)
    copy = 16 * share - 2 * matrices // 4
    assert found["bytes per device: parameters laid out for decoding"] == copy
    assert found["bytes per device in all while sampling, at least"] == 4 * share + copy + 51 * GIB
    # One prompt with two of its responses a device, in a row.
    other = 48 * 20_480 * 5120 * 2 + 20_480 * (5120 * (6 * 4 + 2 * 2) + 6 * 13_824 // 8 * 2)
    assert found["bytes per device: attention scores for the backward pass"] == 0
    assert found["bytes per device: other activations for it"] == other
    total = 6 * share + other + 4096 * 152_064 * 4 // 8
    assert found["bytes per device in all in the update, at least"] == total
    assert found["bytes of checkpoints on disk"] == 12 * 14_770_033_664 * PAPER.checkpoint.keep


def test_plain_attention_keeps_its_scores():
    """Of a prompt: five of the forty heads, in float32, and for the backward pass in bfloat16 too."""
    found = values(replaced(PAPER, "policy", attention="reference"), 64)
    assert found["bytes per device: a layer's attention scores, prompts"] == 32 * 5 * 4 * 4096**2
    assert found["bytes per device: attention scores for the backward pass"] == 5 * (4 + 2) * 20_480**2


def test_14b_label_says_what_describe_says():
    label = " ".join(ast.get_docstring(ast.parse((ROOT / "configs" / "rpt_14b.py").read_text())).split())
    found = values(PAPER, 64)
    sampling = round(found["bytes per device in all while sampling, at least"] / GIB)
    update = round(found["bytes per device in all in the update, at least"] / GIB)
    assert f"by arithmetic {sampling} GiB while sampling and {update} GiB in the update" in label
    disk = re.search(r"(\d+) GiB of disk", label)
    assert found["bytes of checkpoints on disk"] < int(disk[1]) * GIB


@pytest.mark.parametrize("devices", [1, 6, 64])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_described_on_any_machine(path: Path, devices: int):
    names = {*dict(leaves(Experiment())), *(field.name for field in dataclasses.fields(Experiment))}
    for row in describe(load(path), devices):
        assert isinstance(row.value, str) or (row.value >= 0 and math.isfinite(row.value)), row
        for name in re.findall(r"\b[a-z]+\.[a-z_0-9]+\*?", row.fields):
            assert fnmatch.filter(names, name), f"{row.what} is derived from {name}, which is no field"


def test_a_cold_start_is_pretraining_of_its_own():
    """Its rows stand beside those of the run, which they leave as they are."""
    suffix, rows = "; of the cold start", values(replaced(Experiment(), "cold_start", total_steps=7))
    own = {what.removesuffix(suffix): rows.pop(what) for what in list(rows) if what.endswith(suffix)}
    assert rows == values(Experiment())
    alone = values(replaced(dataclasses.replace(Experiment(), task="pretrain"), "training", total_steps=7))
    assert own.items() <= alone.items() and "FLOPs of all steps, at most" in own


def test_pretraining_by_hand():
    experiment = dataclasses.replace(Experiment(), task="pretrain")
    experiment = replaced(experiment, "data", max_document_tokens=100)
    experiment = replaced(
        experiment, "pretrain", documents_per_step=16, traces_per_document=9, rows_per_document=3, row_tokens=20
    )
    found = values(experiment, 8)
    n = 4 * (128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 384) + 1024 * 128
    pairs = 100 * 100 + 3 * 20 * (100 + 20)
    assert found["documents per device"] == 2
    assert found["traces per step, at most"] == 144
    assert found["tokens per step, at most"] == 16 * 160
    step = 16 * (6 * n * 160 + 3 * 4 * 4 * 128 * pairs)
    assert found["FLOPs of a step, at most: 6*N a token, and attention"] == pytest.approx(step)
    assert found["FLOPs of all steps, at most"] == pytest.approx(1000 * step)
    # Split over data alone, every device has all parameters, both moments and one gradient.
    others = [v for name, v in found.items() if "backward" in name or "for it" in name or "logits" in name]
    assert len(others) == 3
    assert found["bytes per device in all, at least"] == 4 * 4 * preset("tiny").parameters + sum(others)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_nearly_what_the_derivative_keeps(dtype: str):
    """Without rematerialization JAX can say what it keeps; the formula may forget small things, never invent any."""
    plain = replaced(Experiment(), "policy", dtype=dtype, attention="reference")
    experiment = replaced(plain, "training", microbatch_tokens=512)
    found = values(experiment)
    policy = Transformer(preset("tiny"), jnp.dtype(dtype), attention="reference")

    def kept(params: Any, tokens_NxW: jax.Array) -> Any:
        places_NxMxW = jnp.zeros((1, 3, 512), jnp.int32)
        rows = tokens_NxW[:, None], tokens_NxW[:, None], (), None, make_key_ranges(places_NxMxW, places_NxMxW + 1)
        return jax.vjp(lambda params: policy.apply({"params": params}, *rows)[0], params)[1]

    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))
    residuals = jax.tree.leaves(jax.eval_shape(kept, params, jax.ShapeDtypeStruct((1, 512), jnp.int32)))
    # Of four layers, what there is of every token.
    in_layers = sum(x.size * x.dtype.itemsize for x in residuals if x.shape[:1] == (4,) and 512 in x.shape)
    ours = found["bytes per device: attention scores for the backward pass"]
    ours += found["bytes per device: other activations for it"]
    assert 0.7 < ours / in_layers <= 1.0


def test_rematerialization_trades_memory_for_nothing_else():
    without, dots, with_it = (
        values(replaced(Experiment(), "policy", remat=remat, attention="reference"))
        for remat in ("none", "dots", "full")
    )
    differing = {name for name in without if without[name] != with_it[name]}
    activations = "bytes per device: other activations for it"
    assert with_it[activations] < dots[activations] < without[activations]
    assert differing == {
        "bytes per device: attention scores for the backward pass",
        "bytes per device: other activations for it",
        "bytes per device in all in the update, at least",
    }
    assert all(with_it[name] < without[name] for name in differing)


def test_several_minibatches_cost_another_forward_pass():
    found = values(replaced(PAPER, "training", minibatches_per_step=4), 64)
    one = values(PAPER, 64)
    assert found["FLOPs of the update: 8*N a token"] == pytest.approx(4 * one["FLOPs of sampling: 2*N a token"])
    assert found["FLOPs of the update: attention"] == pytest.approx(4 * one["FLOPs of sampling: attention"])


def test_what_the_objective_adds_by_hand():
    """A forward pass for KL; two of prompts and one of responses for information gain, whose average is kept; documents."""
    one, n, parameters = values(PAPER, 64), 13_990_625_280, 14_770_033_664
    objective = {"reward": "info_gain", "kl": "k3", "kl_weight": 1e-3, "document_weight": 0.1}
    found = values(replaced(PAPER, "objective", **objective), 64)
    assert found["FLOPs of the update: 8*N a token"] == pytest.approx(4 * one["FLOPs of sampling: 2*N a token"])
    prompt, responses = (4096, 4096**2), (8 * 8192, 8 * 8192 * (4096 + 8192))
    pairs = 4 * 48 * 40 * 128
    reward = sum(passes * (2 * n * tokens + pairs * p) for passes, (tokens, p) in ((2, prompt), (1, responses)))
    documents = 6 * n * 4096 + 3 * pairs * 4096**2
    assert found["FLOPs of the reward: forward passes"] == pytest.approx(256 * reward)
    assert found["FLOPs of the documents: 6*N a token, and attention"] == pytest.approx(256 * documents)
    sampled = one["FLOPs of sampling: 2*N a token"] + one["FLOPs of sampling: attention"]
    assert found["FLOPs of a step, at most"] == pytest.approx(5 * sampled + 256 * (reward + documents))
    average = found["bytes per device: moving average of the parameters"]
    assert average == found["bytes per device: parameters, and those of the start"] // 2
    for use in ("while sampling", "in the update"):
        name = f"bytes per device in all {use}, at least"
        assert found[name] == one[name] + average
    assert found["bytes of checkpoints on disk"] == 16 * parameters * PAPER.checkpoint.keep


def test_warmup_and_decay_are_shown():
    experiment = replaced(Experiment(), "optimizer", learning_rate=1e-3, warmup_steps=100, schedule="cosine")
    assert values(experiment)["learning rate"].startswith("0 in step 1, 0.001 in step 101, 0.0001")


@pytest.mark.parametrize(
    ("mesh", "devices", "text"),
    [
        (MeshConfig(-1, 1, 1), 8, "8 x 1 x 1 = 8 devices"),
        (MeshConfig(2, -1, 2), 8, "2 x 2 x 2 = 8 devices"),
        (MeshConfig(1, 1, 1), 1, "1 x 1 x 1 = 1 device"),
        (MeshConfig(1, -1, 8), 1, "1 x 1 x 8 = 8 devices; here are 1, so this will not run here"),
        (MeshConfig(1, -1, 4), 6, "1 x 1 x 4 = 4 devices; here are 6, so this will not run here"),
        (MeshConfig(1, 8, 8), 1, "1 x 8 x 8 = 64 devices; here are 1, so this will not run here"),
    ],
)
def test_mesh_is_resolved(mesh: MeshConfig, devices: int, text: str):
    assert values(dataclasses.replace(Experiment(), mesh=mesh), devices)["mesh: data x fsdp x tensor"] == text


def test_an_uneven_split_is_described_by_the_fullest_device():
    found = values(Experiment(), 6)
    assert (found["prompts per device"], found["rollouts per device"]) == (43, 43 * 8)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(-1, -1, 1), MeshConfig(0, 1, 1), MeshConfig(1, 1, -2), MeshConfig(1, 2, 2, 3)]
)
def test_impossible_mesh_is_refused(mesh: MeshConfig):
    with pytest.raises(UserError, match=rf"mesh\.tensor={mesh.tensor}"):
        describe(dataclasses.replace(Experiment(), mesh=mesh), 4)


def test_policy_on_disk_comes_before_the_preset(tmp_path: Path):
    experiment = replaced(PAPER, "policy", path=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json"):
        describe(experiment, 1)
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 48,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 13_824,
        "vocab_size": 152_064,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "policy: layers x width, vocabulary"
    assert values(experiment)[name] == values(PAPER)[name] == "48 x 5120, 152064"
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=rf"{tmp_path}.*'qwen2\.5-14b': layers 3 instead of 48\."):
        describe(experiment, 1)
    assert values(replaced(experiment, "policy", preset=""))[name] == "3 x 5120, 152064"
    with pytest.raises(UserError, match=r"policy\.preset='qwen2.5-14'.*Did you mean 'qwen2\.5-14b'"):
        describe(replaced(experiment, "policy", preset="qwen2.5-14"), 1)


def test_it_is_printed_with_units(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=out))
    print_description(PAPER, 64)
    lines = {
        cells[1].strip(): cells[2].strip() for line in out.getvalue().splitlines() if len(cells := line.split("|")) > 3
    }
    assert lines.keys() > values(PAPER, 64).keys()
    assert lines["parameters"] == "14,770,033,664"
    assert lines["bytes per device: keys and values of responses"] == "48 GiB"
    assert lines["bytes of a token's keys and values"] == "192 KiB"


def test_without_a_number_of_devices_it_is_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(rich, "get_console", Console)
    print_description(Experiment())
    assert "4 x 1 x 1 = 4 devices" in capsys.readouterr().out
