"""Estimates of preflight: rows of an update, trip counts of loops, and times."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.infra.chips import CHIPS
from rpt_jax.preflight.costs import (
    DecodeLoop,
    decode_loops,
    estimate_times,
    full_row,
    kernel_bytes,
    least_sampling_bytes,
    minibatch_rows,
    trip_counts,
)
from rpt_jax.preflight.hlo import Collective, Traffic
from rpt_jax.preflight.programs import make_step
from tests.helpers.preflight import make_small_step, small_experiment

# The scopes of data-dependent loops in each program.
SCOPES = {
    "score": {"key_blocks"},
    "sample": {
        "decode_loop",
        "own_cache_blocks",
        "shared_cache_blocks",
        "prefill_rows",
        "prefill_chunks",
        "key_blocks",
    },
    "reward": {"read_box"},
    "training reward": {"key_blocks"},
    "update": {"policy_gradient", "old_logprobs", "packed_attention", "packed_key_blocks"},
}


def test_the_longest_part_is_the_bound():
    moved = Traffic(
        memory=3350e9,
        sources=(),
        sent={
            Collective(kind="all-reduce", size=8, in_host=True): 45e9,
            Collective(kind="all-gather", size=16, in_host=False): 100e9,
        },
        runs={},
        unknown_loops=frozenset(),
    )
    times = estimate_times(CHIPS["h100"], 989e12 / 2, moved)
    np.testing.assert_allclose(times, (0.5, 1.0, 2.1))
    assert times.bound == "network"
    assert times.seconds == pytest.approx(2.1)


def test_a_full_row_attends_as_prompts_and_responses_do():
    """Prompts of 16 tokens with two responses of 8: a row of 128 tokens holds four groups, and four tokens are left over."""
    row = full_row(small_experiment())
    group = sum(range(1, 16)) + 2 * sum(range(16, 24))
    keys_W = np.asarray(row.end_NxMxW - row.begin_NxMxW).sum(axis=1)[0]
    assert keys_W.shape == (128,) and keys_W.sum() == 4 * group + 4
    # A row that holds fewer responses than a prompt has: one prompt and five responses.
    row = full_row(small_experiment("rollout.samples_per_prompt=32", "rollout.max_new_tokens=20"))
    keys_W = np.asarray(row.end_NxMxW - row.begin_NxMxW).sum(axis=1)[0]
    assert keys_W.sum() == sum(range(1, 16)) + 5 * sum(range(16, 36)) + 128 - 15 - 5 * 20


def test_trip_counts_are_those_of_full_lengths():
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    for slots, waves in ((4, 1), (2, 2)):
        experiment = small_experiment(f"rollout.decode_slots={slots}")
        with use_mesh(mesh):
            counts = trip_counts(experiment, make_step(experiment, mesh))
        assert counts["decode_loop"] == (waves * 7,)
        assert counts["policy_gradient"] == (1,)


# Responses have 7 tokens after the first one.
@pytest.mark.parametrize(("steps_per_check", "trips"), [(1, 7), (3, 3), (7, 1)])
def test_the_last_rollouts_are_decoded_in_the_smallest_batch_that_holds_them(steps_per_check, trips):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])

    def loops(samples: int, prompts: int) -> tuple[DecodeLoop, ...]:
        experiment = small_experiment(
            "rollout.decode_slots=33", f"rollout.samples_per_prompt={samples}", f"training.prompts_per_step={prompts}"
        )
        with use_mesh(mesh):
            step = make_step(experiment, mesh)
            decoding = dataclasses.replace(step.decoding, steps_per_check=steps_per_check)
            return decode_loops(experiment, step._replace(decoding=decoding))

    # 72 rollouts: 33 of five prompts, 33 of five, and six of one prompt in the smallest batch.
    assert loops(samples=8, prompts=9) == (
        DecodeLoop(trips=2 * trips, slots=33, live=33, prompts=5),
        DecodeLoop(trips=trips, slots=8, live=6, prompts=1),
    )
    # 64 rollouts: first 33, then 31, which do not fit in a smaller batch.
    [first, *others] = loops(samples=2, prompts=32)
    assert first == DecodeLoop(trips=2 * trips, slots=33, live=33, prompts=17)
    assert not any(loop.trips for loop in others)


def test_sampling_has_to_read_the_weights_and_the_filled_keys_in_every_decode_step():
    small = make_small_step("rollout.decode_slots=4", "policy.dtype=bfloat16", "policy.head_precision=bfloat16")
    config = small.step.policy.config
    with use_mesh(small.mesh):
        least = least_sampling_bytes(small.experiment, small.step)
    # Two prompts of 16 tokens with two responses of 8 each, of which half of 7 tokens have keys on average.
    token = 2 * config.layers * config.kv_heads * config.head_size
    numbers = config.layer_matrix_parameters + config.vocab * config.width + token * (2 * 16 + 4 * 3.5)
    assert least == 7 * 2 * numbers


def test_the_kernels_of_a_decode_step_read_blocks_and_what_the_slots_have():
    """Two prompts of 16 tokens with two responses each, of which 7 tokens have keys: one block of 16 keys for each."""
    small = make_small_step("rollout.decode_slots=4", "policy.dtype=bfloat16", "policy.head_precision=bfloat16")
    config = small.step.policy.config
    tpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]), shape=small.mesh.shape)
    with use_mesh(small.mesh):
        known = kernel_bytes(small.experiment, small.step._replace(mesh=tpu))
    # Keys and values fill 128 lanes together, and queries 8 sublanes. Queries are bfloat16, partial results float32 with two rows
    # of statistics, and the new keys take 512 bytes.
    assert config.head_size <= 64 and config.heads // config.kv_heads <= 8
    block = 16 * 128 * 2
    queries, partial = 8 * 128 * 2, (8 + 2) * 128 * 4
    assert known["shared_cache_blocks"](4) == config.kv_heads * (2 * block + 4 * (queries + partial))
    assert known["own_cache_blocks"](4) == config.kv_heads * (4 * block + 4 * (2 * queries + partial + 512))
    assert known["own_cache_blocks"](3) == 0, "no loop has three slots"


def test_every_scope_with_a_trip_count_is_found_in_its_programs():
    """Renaming or removing a scope would silently drop its loops from the estimates."""
    # Two minibatches need the old log-probabilities, info_gain runs the policy for the training reward, and attention over short
    # sequences has no blocks.
    small = make_small_step(
        "training.minibatches_per_step=2",
        "objective.reward=info_gain",
        "policy.attention=blockwise",
        "data.max_document_tokens=1024",
        "prompt.max_tokens=1024",
        "training.microbatch_tokens=2048",
    )
    with use_mesh(small.mesh):
        counts = trip_counts(small.experiment, small.step)
        texts = {p.name: p.lower().as_text(debug_info=True) for p in small.step.programs}
    assert texts.keys() == SCOPES.keys()
    assert set().union(*SCOPES.values()) == counts.keys()
    for name, scopes in SCOPES.items():
        missing = {scope for scope in scopes if not re.search(rf"\b{scope}\b", texts[name])}
        assert not missing, f"program '{name}' has no scope {missing}"


@pytest.mark.parametrize(("tokens", "rows"), [(64, 1), (32, 2), (24, 4), (63, 2)])
def test_an_update_packs_whole_groups_or_single_responses(tokens: int, rows: int):
    """Two prompts of 16 tokens with two responses of 8 each: both in one row, one per row, or a row for each response."""
    assert minibatch_rows(small_experiment(f"training.microbatch_tokens={tokens}")) == rows


def test_the_loops_of_an_update_are_those_of_a_minibatch():
    """The compiler knows how often a minibatch is repeated."""
    overrides = ("training.prompts_per_step=8", "training.microbatch_tokens=64")
    for minibatches, passes in ((1, 4), (2, 2), (8, 1)):
        small = make_small_step(*overrides, f"training.minibatches_per_step={minibatches}")
        with use_mesh(small.mesh):
            counts = trip_counts(small.experiment, small.step)
        assert counts["policy_gradient"] == counts["old_logprobs"] == (passes,)
