"""Token and FLOP counts against results by hand, and compile times."""

from __future__ import annotations

import json

import jax
import numpy as np

from rpt_jax.infra.accounting import BatchSize, Clock, CompileTimes, Counters

N = 10


def test_discarded_rollouts_are_counted_in_tokens_and_flops():
    """Two rounds of generation for one batch: discarded groups cost their prefill and decoding."""
    counters = Counters(N)
    first = counters.count_rollouts(BatchSize(100, 50))
    generated = first.plus(counters.count_rollouts(BatchSize(80, 40)))
    assert generated == (180, 90)
    counters.count_update(BatchSize(90, 60), learned=30, trunk=75, generated=generated)
    assert counters.scalars() == {
        "tokens/generated_total": 90,
        "tokens/discarded_total": 30,
        "tokens/learned_total": 30,
        "flops/train_total": 2 * N * (180 + 90) + 6 * N * 75,
        "flops/discarded_total": 2 * N * (90 + 30),
    }


def test_the_passes_of_the_objective_are_counted():
    """Three passes over prompts and two over responses before the update, two more forward passes in it, and documents."""
    counters = Counters(N, BatchSize(3, 2), update_forward=2)
    size = counters.count_rollouts(BatchSize(100, 50))
    assert counters.flops == 2 * N * (300 + 100)
    counters.count_update(size, learned=50, trunk=150, generated=size, document_tokens=7)
    assert counters.flops == 2 * N * 400 + 10 * N * 150 + 6 * N * 7
    assert counters.discarded == counters.discarded_flops == 0


def test_counters_survive_a_checkpoint():
    counters, again = Counters(N, BatchSize(2, 1)), Counters(N, BatchSize(2, 1))
    counters.count_rollouts(BatchSize(3, 4))
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
