"""Token and FLOP counts against results by hand, and compile times."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rpt_jax.infra.accounting import BatchSize, Clock, CompileTimes, Counters, RolloutCost


def test_discarded_rollouts_are_counted_in_tokens_and_flops():
    """Two rounds of generation for one batch: discarded groups cost their share of the tokens."""
    counters = Counters()
    rounds = RolloutCost(100, 50, flops=7e6), RolloutCost(80, 40, flops=2e6)
    for cost in rounds:
        counters.count_rollouts(cost)
    counters.count_update(used=BatchSize(90, 60), generated=rounds[0].plus(rounds[1]), learned=30, flops=5e6)
    counters.count_flops(1e6)
    assert counters.scalars() == {
        "tokens/generated_total": 90,
        "tokens/discarded_total": 30,
        "tokens/learned_total": 30,
        "flops/train_total": 15e6,
        "flops/discarded_total": pytest.approx(9e6 * (270 - 150) / 270),
    }


def test_nothing_is_discarded_without_dynamic_sampling():
    counters = Counters()
    counters.count_update(used=BatchSize(9, 6), generated=RolloutCost(9, 6, flops=7.0), learned=3, flops=5.0)
    assert counters.discarded == counters.discarded_flops == 0


def test_counters_survive_a_checkpoint():
    counters, again = Counters(), Counters()
    counters.count_rollouts(RolloutCost(3, 4, flops=1e9))
    again.restore(json.loads(json.dumps(counters.state())))
    assert again.scalars() == counters.scalars()


def test_compilations_are_counted_between_start_and_stop_only():
    array = jax.device_put(np.ones(3, np.float32))
    compile_times = CompileTimes()

    def compile_program(factor: float) -> None:
        jax.jit(lambda x: factor * x - 7.25)(array)

    compile_program(2.0)
    with compile_times:
        clock = Clock(compile_times)
        compile_program(3.0)
        clock.lap("update")
        scalars = clock.scalars()
        assert scalars["time/compiled_programs"] >= 1 and scalars["time/compile"] > 0
        assert clock.scalars()["time/compiled_programs"] == 0
    compile_program(4.0)
    assert compile_times.take() == {"time/compile": 0, "time/compiled_programs": 0}
