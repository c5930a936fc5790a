"""Derived sizes against arithmetic by hand, and against the arrays that JAX saves."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import rich
from flax import linen as nn
from rich.console import Console

from rpt_jax import describe
from rpt_jax.config import Experiment, LoraConfig, MeshConfig, from_config_dict, load_config_file
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.describe import derive, print_description, render
from rpt_jax.errors import UserError
from rpt_jax.model.attention.key_ranges import make_key_ranges
from rpt_jax.model.model_config import ModelConfig, preset
from rpt_jax.model.transformer import Transformer
from tests.helpers.flops import token_flops
from tests.helpers.parameters import mostly_slow
from tests.helpers.paths import CONFIGS, EXPERIMENTS

GIB = 2**30


def load(path: Path) -> Experiment:
    return from_config_dict(load_config_file(str(path)))


def replaced(experiment: Experiment, section: str, **fields: Any) -> Experiment:
    return dataclasses.replace(experiment, **{section: dataclasses.replace(getattr(experiment, section), **fields)})


PAPER = replaced(load(CONFIGS / "rpt_14b.py"), "policy", remat="full")


def with_task(task: str) -> Experiment:
    return dataclasses.replace(Experiment(), task=task)


def numbers_in(sizes: Any) -> Iterator[tuple[str, float]]:
    """Yield every number of a tree of dataclasses with its field, properties included."""
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers_in(value)
        elif isinstance(value, int | float):
            yield field.name, value
    for name, attribute in vars(type(sizes)).items():
        if isinstance(attribute, property):
            yield name, getattr(sizes, name)


def test_14b_sizes_by_hand():
    derived = derive(PAPER, 64)
    n = 48 * (5120 * 128 * (40 + 8 + 8 + 40) + 3 * 5120 * 13_824) + 152_064 * 5120
    assert derived.policy.matmul_parameters == n
    assert derived.policy.parameters == n + 152_064 * 5120 + 48 * (7 * 1024 + 2 * 5120) + 5120
    assert derived.policy.parameters == pytest.approx(14.77e9, rel=1e-4)
    assert (derived.mesh.data, derived.mesh.fsdp, derived.mesh.tensor) == (1, 8, 8)
    assert derived.mesh.devices == derived.mesh.available == 64
    batch, tokens = derived.rpt.batch, derived.rpt.tokens
    assert batch.rollouts_per_step == 2048
    assert batch.max_microbatches_per_step == 128
    assert batch.prompts_per_device == 32
    assert batch.rollouts_per_device == 256
    assert batch.microbatch_tokens_per_device == 20_480
    assert tokens.prompt_tokens_per_step == 256 * 4096
    assert tokens.response_tokens_per_step == 2048 * 8192
    assert tokens.shared_tokens_per_prompt == 69_632
    assert tokens.unshared_tokens_per_prompt == 98_304
    assert tokens.sharing_ratio == pytest.approx(17 / 24)
    sampling = derived.rpt.memory.sampling
    assert sampling.kv_per_token == 196_608
    assert sampling.prompt_kv == 3 * GIB
    assert sampling.response_kv == 48 * GIB
    assert sampling.prompt_attention_scores == 0
    assert derived.rpt.memory.update.backward.logit_chunk == 4096 * 152_064 * 4 // 8
    assert derived.run.total_steps == 1000


def sampling_by_hand(config: ModelConfig, prompt: int, response: int, samples: int) -> int:
    """Return the FLOPs of sampling, token by token: the prompt once, and all but the last token of each response."""
    before = sum(token_flops(config, keys, head=False, only_cache=True) for keys in range(1, prompt))
    last = token_flops(config, prompt, head=True)
    return before + last + samples * sum(token_flops(config, prompt + t, head=True) for t in range(1, response))


def update_by_hand(config: ModelConfig, prompt: int, response: int, samples: int) -> int:
    """Return the FLOPs of a forward pass, token by token: the head sees response positions only."""
    before = sum(token_flops(config, keys, head=False) for keys in range(1, prompt))
    return before + samples * sum(token_flops(config, prompt + t, head=True) for t in range(response))


def test_14b_compute_by_hand():
    flops = derive(PAPER, 64).rpt.flops
    config = preset("qwen2.5-14b")
    sampling = 256 * sampling_by_hand(config, 4096, 8192, 8)
    update = 3 * 256 * update_by_hand(config, 4096, 8192, 8)
    assert flops.sampling == pytest.approx(sampling, rel=1e-12)
    assert flops.update == pytest.approx(update, rel=1e-12)
    # Attention, of which sampling lacks the last token of every response, and the last layer of prompts.
    pairs = 4095 * 4096 // 2 + 8 * (8192 * 4095 + 8192 * 8193 // 2)
    assert flops.update_attention == pytest.approx(3 * 256 * 4 * 48 * 40 * 128 * pairs)
    assert flops.sampling_attention == pytest.approx(flops.update_attention / 3, rel=1e-3)
    assert flops.run == 1000 * flops.step == pytest.approx(1000 * (sampling + update))
    # Steps 500 to 1000 sample up to two more times.
    assert flops.dynamic_sampling == pytest.approx(501 * 2 * sampling)


def test_14b_memory_by_hand():
    derived = derive(PAPER, 64)
    memory = derived.rpt.memory
    shard = 4 * 14_770_033_664 // 64
    assert memory.state.parameters_and_reference == 2 * shard
    assert memory.state.adam_moments == 2 * shard
    assert memory.update.gradients == 2 * shard
    # The copy for decoding is split over 4 devices: matrices, embedding and head in bfloat16, the rest in float32.
    matrices = 48 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 13_824) + 2 * 152_064 * 5120
    copy = 16 * shard - 2 * matrices // 4
    assert memory.sampling.resharded_parameters == copy
    assert memory.sampling_total == 4 * shard + copy + 51 * GIB
    # A row holds one prompt with two of its responses.
    activations = 48 * 20_480 * 5120 * 2 + 20_480 * (5120 * (6 * 4 + 2 * 2) + 6 * 13_824 // 8 * 2)
    assert memory.update.backward.attention_scores == 0
    assert memory.update.backward.other_activations == activations
    assert memory.update_total == 6 * shard + activations + 4096 * 152_064 * 4 // 8
    assert derived.run.checkpoint_bytes == 12 * 14_770_033_664 * PAPER.checkpoint.keep
    assert derived.peak_bytes_per_device == max(memory.sampling_total, memory.update_total)


def test_14b_with_adapters_by_hand():
    """The frozen matrices are stored in bfloat16, everything else in float32; only adapters have gradients and moments."""
    with_adapters = replaced(PAPER, "policy", lora=LoraConfig(rank=16, targets="q_proj,down_proj"))
    derived = derive(with_adapters, 64)
    adapters = 48 * 16 * (5120 + 5120 + 13_824 + 5120)
    matrices = 48 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 13_824) + 2 * 152_064 * 5120
    state = derived.rpt.memory.state
    assert derived.policy.trained_parameters == adapters
    assert state.frozen == (4 * 14_770_033_664 - 2 * matrices) // 64
    assert state.parameters_and_reference == state.adam_moments == 2 * (4 * adapters // 64)
    assert derived.rpt.memory.update.gradients == 2 * (4 * adapters // 64)
    assert derived.run.checkpoint_bytes == 12 * adapters * PAPER.checkpoint.keep
    # The backward pass has no gradients of matrices, so it takes one forward pass where it takes two otherwise.
    dense = derive(PAPER, 64).rpt.flops
    matmul = (dense.update - dense.update_attention) / 3
    assert derived.rpt.flops.update == pytest.approx(2 * matmul + dense.update_attention)


def test_reference_attention_stores_its_scores():
    """In float32 for a prompt, since one is prefilled at a time, on four devices; in bfloat16 as well for the backward pass."""
    memory = derive(replaced(PAPER, "policy", attention="reference"), 64).rpt.memory
    assert memory.sampling.prompt_attention_scores == 10 * 4 * 4096**2
    assert memory.update.backward.attention_scores == 5 * (4 + 2) * 20_480**2


@pytest.mark.parametrize("devices", mostly_slow([1, 6, 64], 64))
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_config_is_described_on_any_machine(path: Path, devices: int):
    derived = derive(load(path), devices, 20 * GIB)
    assert all(value >= 0 and math.isfinite(value) for _, value in numbers_in(derived))
    names = {*dict(leaves(Experiment())), *(field.name for field in dataclasses.fields(Experiment))}
    rows = render(derived)
    assert len({row.quantity for row in rows}) == len(rows)
    for row in rows:
        for name in re.findall(r"\b[a-z]+\.[a-z_0-9]+\*?", row.derived_from):
            assert fnmatch.filter(names, name), f"{row.quantity} is derived from {name}, which is not a config field"


def test_a_cold_start_is_described_like_pretraining():
    """It is added to the description of the run, whose other sizes do not change."""
    experiment = replaced(
        Experiment(), "training", logit_chunk_tokens=4096
    )  # A plan also depends on the rows of the update.
    derived = derive(replaced(experiment, "cold_start", total_steps=7), 1)
    alone = derive(replaced(dataclasses.replace(experiment, task="pretrain"), "training", total_steps=7), 1)
    assert derived.cold_start == alone.pretrain
    without = derive(experiment, 1)
    assert dataclasses.replace(derived, cold_start=None, plan=without.plan) == without
    assert {f"cold start: {row.quantity}" for row in render(alone)} & {row.quantity for row in render(derived)}


def test_pretraining_by_hand():
    experiment = replaced(with_task("pretrain"), "data", max_document_tokens=100)
    experiment = replaced(
        experiment, "pretrain", windows_per_step=16, traces_per_window=9, rows_per_window=3, row_tokens=20
    )
    sizes = derive(experiment, 8).pretrain
    n = 4 * (128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 384) + 1024 * 128
    pairs = 100 * 101 // 2 + 3 * (20 * 100 + 20 * 21 // 2)
    assert sizes.windows_per_device == 2
    assert sizes.traces_per_step == 144
    assert sizes.tokens_per_step == 16 * 160
    step = 16 * (6 * n * 160 + 3 * 4 * 4 * 128 * pairs)
    assert sizes.flops_per_step == step
    assert sizes.run_flops == 1000 * step
    # Split over data alone, every device has all parameters, both moments and one gradient.
    assert sizes.memory.total == 4 * 4 * preset("tiny").parameters + sizes.memory.backward.total
    backward = sizes.memory.backward
    assert backward.total == backward.attention_scores + backward.other_activations + backward.logit_chunk


def test_scoring_by_hand():
    experiment = replaced(with_task("score"), "data", max_document_tokens=100, score_batch_windows=16)
    sizes = derive(experiment, 8).score
    n = 4 * (128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 384) + 1024 * 128
    assert sizes.tokens_per_batch == 1600
    assert sizes.windows_per_device == 2
    assert sizes.flops_per_token == pytest.approx(2 * n + 4 * 4 * 128 * 101 / 2)
    assert sizes.parameter_bytes == 4 * preset("tiny").parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_nearly_those_that_jax_saves_for_the_derivative(dtype: str):
    """Without rematerialization JAX reports what it saves; the formula may miss small arrays but never invents any."""
    plain = replaced(Experiment(), "policy", dtype=dtype, attention="reference")
    derived = derive(replaced(plain, "training", microbatch_tokens=512), 1)
    policy = Transformer(preset("tiny"), jnp.dtype(dtype), attention="reference")

    def saved(params: Any, tokens_NxW: jax.Array) -> Any:
        positions_NxMxW = jnp.zeros((1, 3, 512), jnp.int32)
        ranges = make_key_ranges(positions_NxMxW, positions_NxMxW + 1)
        rows = tokens_NxW[:, None], tokens_NxW[:, None], (), None, ranges
        return jax.vjp(lambda params: policy.apply({"params": params}, *rows)[0], params)[1]

    one = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(lambda: nn.meta.unbox(policy.init(jax.random.key(0), one, one)["params"]))
    residuals = jax.tree.leaves(jax.eval_shape(saved, params, jax.ShapeDtypeStruct((1, 512), jnp.int32)))
    # Arrays of all four layers that have an axis of tokens.
    in_layers = sum(x.size * x.dtype.itemsize for x in residuals if x.shape[:1] == (4,) and 512 in x.shape)
    backward = derived.rpt.memory.update.backward
    assert 0.7 < (backward.attention_scores + backward.other_activations) / in_layers <= 1.0


def test_rematerialization_changes_activation_memory_only():
    none, dots, full = (
        derive(replaced(Experiment(), "policy", remat=remat, attention="reference"), 1)
        for remat in ("none", "dots", "full")
    )
    activations = [derived.rpt.memory.update.backward.other_activations for derived in (full, dots, none)]
    assert activations == sorted(set(activations))
    assert full.rpt.memory.update_total < none.rpt.memory.update_total
    assert full.rpt.memory.update.backward.attention_scores < none.rpt.memory.update.backward.attention_scores
    full_backward = full.rpt.memory.update.backward
    update = dataclasses.replace(none.rpt.memory.update, backward=full_backward)
    memory = dataclasses.replace(none.rpt.memory, update=update)
    assert dataclasses.replace(none, rpt=dataclasses.replace(none.rpt, memory=memory), plan=full.plan) == full


def test_several_minibatches_cost_another_forward_pass():
    one, several = (derive(replaced(PAPER, "training", minibatches_per_step=n), 64).rpt.flops for n in (1, 4))
    assert several.update_forward_passes == 4
    assert several.update == pytest.approx(one.update * 4 / 3)
    assert several.update_attention == pytest.approx(one.update_attention * 4 / 3)


def test_several_minibatches_keep_the_state_before_the_step():
    """All but the reference parameters, which no step changes."""
    one = derive(PAPER, 64).rpt.memory
    several = derive(replaced(PAPER, "training", minibatches_per_step=4), 64).rpt.memory
    assert one.update.state_before_step == 0
    assert several.update.state_before_step == several.state.total - several.state.parameters_and_reference // 2


def test_costs_of_the_objective_by_hand():
    """A forward pass for KL; two of prompts and one of responses for info_gain, with a moving average; and documents."""
    one, parameters, config = derive(PAPER, 64), 14_770_033_664, preset("qwen2.5-14b")
    objective = {"reward": "info_gain", "kl": "k3", "kl_weight": 1e-3, "document_weight": 0.1}
    derived = derive(replaced(PAPER, "objective", **objective), 64)
    flops = derived.rpt.flops
    assert flops.update == pytest.approx(one.rpt.flops.update * 4 / 3)
    prompt = sum(token_flops(config, keys, head=False) for keys in range(1, 4097))
    response = sum(token_flops(config, 4096 + t, head=False) for t in range(1, 8193))
    document = sum(token_flops(config, keys, head=True) for keys in range(1, 4097))
    assert flops.reward == pytest.approx(256 * (2 * prompt + 8 * response), rel=1e-12)
    assert flops.documents == pytest.approx(256 * 3 * document, rel=1e-12)
    assert flops.step == flops.sampling + flops.update + flops.reward + flops.documents
    memory = derived.rpt.memory
    average = memory.state.moving_average
    assert average == memory.state.parameters_and_reference // 2
    assert memory.sampling_total == one.rpt.memory.sampling_total + average
    assert memory.update_total == one.rpt.memory.update_total + average
    assert derived.run.checkpoint_bytes == 16 * parameters * PAPER.checkpoint.keep


def test_a_budget_of_flops_is_said_in_steps_of_the_greatest_length():
    experiment = load(CONFIGS / "rpt_tiny.py")
    steps = experiment.training.total_steps
    free = derive(experiment, devices=1)
    assert free.rpt and free.run and free.run.budget_steps is None
    largest = free.rpt.flops.step + free.rpt.flops.dynamic_sampling / max(
        1, steps + 1 - max(1, experiment.training.dynamic_sampling_from)
    )
    cold_start = free.cold_start.run_flops if free.cold_start else 0.0

    def budget_steps(flops: float) -> int | None:
        limited = replaced(experiment, "training", flops_budget=flops)
        run = derive(limited, devices=1).run
        return run and run.budget_steps

    assert budget_steps(cold_start + 2.5 * largest) == 3
    assert budget_steps(cold_start + 2 * steps * largest) == steps


def test_learning_rate_is_given_at_warmup_and_at_the_end():
    experiment = replaced(Experiment(), "optimizer", learning_rate=1e-3, warmup_steps=100, schedule="cosine")
    rates = derive(experiment, 1).run.learning_rates
    assert [step for step, _ in rates] == [1, 101, 1000]
    assert [rate for _, rate in rates] == pytest.approx([1e-3 / 101, 1e-3, 1e-4], rel=1e-2)


def test_a_step_with_several_minibatches_takes_several_steps_of_the_schedule():
    training = {"minibatches_per_step": 8, "prompts_per_step": 8, "total_steps": 20}
    experiment = replaced(Experiment(), "training", **training)
    experiment = replaced(experiment, "optimizer", learning_rate=1e-3, warmup_steps=20, schedule="cosine")
    derived = derive(experiment, 8)
    assert [step for step, _ in derived.run.learning_rates] == [1, 3, 20]
    assert [rate for _, rate in derived.run.learning_rates] == pytest.approx([1e-3 / 21, 1e-3, 1e-4], rel=1e-2)
    # A minibatch of one prompt takes a microbatch, on whichever device.
    assert derived.rpt.batch.max_microbatches_per_step == 8


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshConfig(-1, 1, 1), 8, (8, 1, 1)),
        (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
        (MeshConfig(1, 1, 1), 1, (1, 1, 1)),
        (MeshConfig(1, -1, 8), 1, (1, 1, 8)),
        (MeshConfig(1, -1, 4), 6, (1, 1, 4)),
        (MeshConfig(1, 8, 8), 1, (1, 8, 8)),
    ],
)
def test_mesh_is_resolved(mesh: MeshConfig, devices: int, sizes: tuple[int, int, int]):
    derived = derive(dataclasses.replace(Experiment(), mesh=mesh), devices)
    found = derived.mesh
    assert (found.data, found.fsdp, found.tensor) == sizes
    assert found.devices == math.prod(sizes) and found.available == devices
    (row,) = (row for row in render(derived) if row.quantity.startswith("mesh"))
    assert ("will not run here" in str(row.value)) == (found.devices != devices)


def test_an_uneven_split_is_described_by_the_fullest_device():
    batch = derive(Experiment(), 6).rpt.batch
    assert (batch.prompts_per_device, batch.rollouts_per_device) == (43, 43 * 8)


@pytest.mark.parametrize(
    ("mesh", "field"),
    [
        (MeshConfig(-1, -1, 1), "mesh.fsdp"),
        (MeshConfig(0, 1, 1), "mesh.data"),
        (MeshConfig(1, 1, -2), "mesh.tensor"),
        (MeshConfig(1, 2, 2, 3), "mesh.rollout_tensor"),
    ],
)
def test_impossible_mesh_is_refused(mesh: MeshConfig, field: str):
    with pytest.raises(UserError) as raised:
        derive(dataclasses.replace(Experiment(), mesh=mesh), 4)
    assert raised.value.field == field


def test_policy_on_disk_comes_before_the_preset(tmp_path: Path):
    experiment = replaced(PAPER, "policy", path=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json"):
        derive(experiment, 1)
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
    policy = derive(experiment, 1).policy
    assert (policy.layers, policy.width, policy.vocab) == (48, 5120, 152_064)
    assert str(tmp_path) in policy.source
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=rf"{tmp_path}.*'qwen2\.5-14b': layers 3 instead of 48\."):
        derive(experiment, 1)
    assert derive(replaced(experiment, "policy", preset=""), 1).policy.layers == 3


def test_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UserError) as raised:
        derive(replaced(PAPER, "policy", preset="qwen2.5-14"), 1)
    assert raised.value.field == "policy.preset"


def test_the_description_is_printed_with_units(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=out))
    monkeypatch.setattr(describe, "device_memory", lambda: 24 * GIB)
    print_description(PAPER, 64)
    lines = {
        cells[1].strip(): cells[2].strip() for line in out.getvalue().splitlines() if len(cells := line.split("|")) > 3
    }
    assert lines.keys() > {row.quantity for row in render(derive(PAPER, 64))}
    # The memory of this machine does not hold all rollouts of 14B parameters, so they are not assumed to be live.
    assert lines["rollout.decode_slots"] == "192"
    assert lines["per device: keys and values of responses"] == "4.5 GiB"  # 12 slots of 8,192 tokens on each replica.
    assert lines["parameters"] == "14,770,033,664"
    assert lines["per token: keys and values"] == "192 KiB"
    assert max(map(len, out.getvalue().splitlines())) <= 120


def test_the_devices_of_this_machine_are_the_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(rich, "get_console", Console)
    print_description(Experiment())
    assert "4 x 1 x 1 = 4 devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mesh", "data", "field"),
    [
        (MeshConfig(tensor=16), {}, "mesh.tensor"),
        (MeshConfig(fsdp=8), {"score_batch_windows": 12}, "data.score_batch_windows"),
        (MeshConfig(tensor=2, rollout_tensor=4, fsdp=8), {}, ""),
    ],
)
def test_a_mesh_that_a_run_would_refuse_is_not_described(mesh: MeshConfig, data: dict[str, int], field: str) -> None:
    """The policy has 8 kv heads."""
    paper = dataclasses.replace(PAPER, mesh=mesh, data=dataclasses.replace(PAPER.data, **data))
    if not field:
        print_description(paper, 16)
        return
    with pytest.raises(UserError) as raised:
        print_description(paper, 16)
    assert raised.value.field == field


def test_a_context_that_is_too_short_is_said(caplog: pytest.LogCaptureFixture) -> None:
    experiment = from_config_dict({"prompt": {"max_tokens": 32_768}, "policy": {"preset": "tiny"}})
    print_description(experiment, devices=1)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("prompt.max_tokens + rollout.max_new_tokens = 32,816 tokens")


def test_a_policy_that_is_missing_is_named_where_no_preset_is() -> None:
    experiment = from_config_dict({"policy": {"path": "no/such", "preset": ""}})
    with pytest.raises(UserError) as raised:
        derive(experiment, devices=1)
    assert raised.value.field == "policy.path"
