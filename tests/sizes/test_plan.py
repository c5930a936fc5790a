"""Memory fields planned from the policy and the memory of a device."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from rpt_jax.config import EvaluationConfig, Experiment, RolloutConfig, from_config_dict, load_config_file
from rpt_jax.errors import UserError
from rpt_jax.infra.chips import CHIPS
from rpt_jax.model.model_config import preset
from rpt_jax.rollout.memory import USABLE, machine_memory
from rpt_jax.setup import mesh_from_config
from rpt_jax.sizes import plan as plan_module
from rpt_jax.sizes.limits import short_response_warnings
from rpt_jax.sizes.memory import rollout_bytes, rpt_memory
from rpt_jax.sizes.mesh import MeshSizes
from rpt_jax.sizes.plan import Plan, check_slots, plan_evaluation, plan_memory
from tests.helpers.paths import CONFIGS

GIB = 2**30
ONE_DEVICE = MeshSizes(data=1, fsdp=1, tensor=1, rollout_tensor=1, available=1)
REMATS = ["none", "dots", "full"]


def load(name: str, *overrides: str) -> Experiment:
    return from_config_dict(load_config_file(str(CONFIGS / f"{name}.py")), list(overrides))


# A reasoning model of 1.5 billion parameters with room to think.
REASONING = load("rpt_1b5", "mesh.tensor=1", "mesh.rollout_tensor=1", "training.microbatch_tokens=0")
REASONING = dataclasses.replace(REASONING, policy=dataclasses.replace(REASONING.policy, remat="auto"))


def plan(memory: float, experiment: Experiment = REASONING, mesh: MeshSizes = ONE_DEVICE) -> Plan:
    return plan_memory(experiment, preset(experiment.policy.preset), mesh, memory)


def values(planned: Plan) -> tuple[Any, ...]:
    experiment = planned.experiment
    return (experiment.policy.remat, experiment.training.microbatch_tokens, experiment.rollout.decode_slots)


def test_the_update_of_a_reasoning_model_fits_one_accelerator():
    """The planned update is within the memory of an H100, and a device with more memory recomputes less."""
    memory = USABLE * CHIPS["h100"].memory
    planned = plan(memory)
    assert not planned.warnings
    assert rpt_memory(planned.experiment, preset("qwen2.5-1.5b"), ONE_DEVICE).update_total < memory
    assert planned.experiment.training.microbatch_tokens >= 8192
    larger = plan(USABLE * CHIPS["b200"].memory)
    assert REMATS.index(larger.experiment.policy.remat) < REMATS.index(planned.experiment.policy.remat)


def test_more_memory_never_makes_a_plan_slower():
    plans = [plan(memory * GIB) for memory in (40, 48, 56, 64, 80, 120, 200, 400, 1000)]
    for less, more in zip(plans[:-1], plans[1:], strict=True):
        remat, rows, slots = zip(values(less), values(more), strict=True)
        assert REMATS.index(remat[1]) <= REMATS.index(remat[0]) and slots[1] >= slots[0]
        assert rows[1] >= rows[0] or remat[0] != remat[1]
    assert values(plans[-1]) == values(plan(float("inf")))


def test_all_logits_of_a_row_are_kept_where_they_take_a_small_part_of_the_memory():
    small = load(
        "rpt_smollm2", "training.microbatch_tokens=0", "training.logit_chunk_tokens=0", "rollout.max_new_tokens=512"
    )
    ours, less = (plan(memory * GIB, small).experiment.training for memory in (120, 24))
    assert ours.logit_chunk_tokens == ours.microbatch_tokens > 4096
    assert less.logit_chunk_tokens == 4096 < less.microbatch_tokens


def test_a_plan_is_a_function_of_config_and_memory():
    assert plan(70 * GIB) == plan(70 * GIB)


def test_fields_that_the_config_sets_are_kept():
    experiment = load("rpt_14b", "policy.remat=full", "training.logit_chunk_tokens=77", "rollout.decode_slots=64")
    mesh = MeshSizes(data=1, fsdp=8, tensor=8, rollout_tensor=4, available=64)
    planned = plan_memory(experiment, preset("qwen2.5-14b"), mesh, 28 * GIB)
    assert planned.fields == () and planned.experiment == experiment


def test_slots_are_those_of_the_compiled_run():
    """Preflight compiled 336 slots for a v6e, with the head that the config had then (docs/results/preflight.md)."""
    mesh = MeshSizes(data=1, fsdp=8, tensor=8, rollout_tensor=4, available=64)
    planned = plan_memory(
        load("rpt_14b", "policy.head_precision=tensorfloat32"),
        preset("qwen2.5-14b"),
        mesh,
        USABLE * CHIPS["v6e"].memory,
    )
    assert planned.experiment.rollout.decode_slots == 336
    assert [field.field for field in planned.fields] == ["policy.remat", "rollout.decode_slots"]


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("rpt", {"policy.remat", "training.microbatch_tokens", "training.logit_chunk_tokens", "rollout.decode_slots"}),
        ("pretrain", {"policy.remat", "training.logit_chunk_tokens"}),
        ("score", {"training.logit_chunk_tokens"}),
    ],
)
def test_open_fields_are_planned_that_the_task_uses(task: str, fields: set[str]):
    experiment = dataclasses.replace(Experiment(), task=task)
    planned = plan_memory(experiment, preset("tiny"), ONE_DEVICE, 4 * GIB)
    assert {field.field for field in planned.fields} == fields and all(field.value for field in planned.fields)
    assert plan_memory(planned.experiment, preset("tiny"), ONE_DEVICE, 4 * GIB).fields == ()


def test_a_cold_start_has_a_say_in_what_is_recomputed():
    """Its batch of documents needs more memory than a row of the update."""
    experiment = dataclasses.replace(
        Experiment(), cold_start=dataclasses.replace(Experiment().cold_start, total_steps=5)
    )
    experiment = dataclasses.replace(
        experiment, pretrain=dataclasses.replace(experiment.pretrain, windows_per_step=4096)
    )
    alone, both = (plan_memory(e, preset("tiny"), ONE_DEVICE, 8 * GIB) for e in (Experiment(), experiment))
    assert (alone.experiment.policy.remat, both.experiment.policy.remat) == ("none", "full")


def test_rows_hold_a_prompt_and_a_response_and_divide_over_a_tensor_group():
    mesh = MeshSizes(data=1, fsdp=1, tensor=6, rollout_tensor=6, available=6)
    planned = plan(12 * GIB, mesh=mesh)
    assert planned.experiment.training.microbatch_tokens % 6 == 0
    assert planned.experiment.training.microbatch_tokens >= 2048 + 4096


@pytest.mark.parametrize(("slots", "warns"), [(2048, False), (2049, True)])
def test_slots_beyond_the_rollouts_of_a_step_are_announced(slots: int, warns: bool):
    """256 prompts of 8 responses each are 2,048 rollouts."""
    experiment = dataclasses.replace(Experiment(), rollout=RolloutConfig(decode_slots=slots))
    warnings = plan_memory(experiment, preset("tiny"), ONE_DEVICE, 64 * GIB).warnings
    assert ["rollout.decode_slots" in warning for warning in warnings] == [True] * warns


def test_a_policy_that_does_not_fit_is_announced():
    planned = plan(16 * GIB)
    assert "mesh.fsdp" in planned.warnings[0] and planned.experiment.policy.remat == "full"
    with pytest.raises(UserError) as raised:
        check_slots(planned.experiment, preset("qwen2.5-1.5b"), ONE_DEVICE, 16 * GIB)
    assert raised.value.field == "rollout.decode_slots"


@pytest.mark.parametrize(
    ("name", "tokens", "warned"), [("qwen2.5-1.5b", 48, True), ("qwen2.5-1.5b", 4096, False), ("tiny", 48, False)]
)
def test_a_reasoning_model_without_room_to_reason_is_announced(name: str, tokens: int, warned: bool):
    rollout = dataclasses.replace(Experiment().rollout, max_new_tokens=tokens)
    experiment = dataclasses.replace(Experiment(), rollout=rollout)
    found = short_response_warnings(experiment, preset(name))
    assert bool(found) == warned and all("rollout.max_new_tokens=48" in sentence for sentence in found)


def test_a_container_limits_the_memory_of_its_machine(tmp_path: Path):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert machine_memory(tmp_path) == 2**30


def test_longer_responses_of_an_evaluation_get_fewer_decode_slots(monkeypatch: pytest.MonkeyPatch):
    experiment = load("rft_tiny", "rollout.decode_slots=256", "training.microbatch_tokens=512")
    mesh = mesh_from_config(experiment.mesh, jax.devices()[:1])
    assert plan_evaluation(experiment, mesh) == experiment, "sampled as in training"

    monkeypatch.setattr(plan_module, "device_memory", lambda: GIB)
    longer = dataclasses.replace(experiment, evaluation=EvaluationConfig(samples=4, max_new_tokens=32_000))
    rollout = plan_evaluation(longer, mesh).rollout
    assert 1 <= rollout.decode_slots < 256 and rollout.max_new_tokens == 32_000 and rollout.samples_per_prompt == 4


def test_sampling_alone_has_no_memory_for_a_reference_and_an_optimizer():
    experiment = load("rpt_7b", "mesh.tensor=1", "mesh.rollout_tensor=1", "training.prompts_per_step=32")
    rollout = dataclasses.replace(experiment.rollout, samples_per_prompt=8, max_new_tokens=2048, decode_slots=0)
    prompt = dataclasses.replace(experiment.prompt, max_tokens=512)
    experiment = dataclasses.replace(experiment, task="difficulty", prompt=prompt, rollout=rollout)
    config = preset("qwen2.5-7b")
    planned = plan_memory(experiment, config, ONE_DEVICE, 60 * GIB)
    slots = planned.experiment.rollout.decode_slots
    memory = rollout_bytes(planned.experiment, config, ONE_DEVICE)
    # The parameters in float32, and at most all of them in bfloat16.
    assert not planned.warnings and 1 < slots < 256
    assert 0 < 60 * GIB - 4 * config.parameters - memory.fixed - slots * memory.per_slot < 3 * config.parameters
    [warning] = plan_memory(experiment, config, ONE_DEVICE, 30 * GIB).warnings
    assert "mesh.rollout_tensor" in warning
