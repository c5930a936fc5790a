"""The benches: what they count, what they write, and that a deep policy compiles to no more than a shallow one."""

from __future__ import annotations

import argparse
import json

import pytest

from rpt_jax.bench import __main__ as bench
from rpt_jax.bench import update
from rpt_jax.bench.measure import interleaved

SMALL = [
    "--layers=1",
    "--width=16",
    "--heads=2",
    "--kv-heads=1",
    "--head-size=8",
    "--ffn=16",
    "--vocab=32",
    "--batch=2",
]


def figures(tmp_path, *arguments):
    out = tmp_path / "out.json"
    assert bench.main(["bench", *arguments, f"--json={out}"]) == 0
    written = json.loads(out.read_text())
    assert {"device", "cores", "jax", "load"} <= set(written["machine"])
    return written["figures"]


def test_policy_prints_and_writes_the_same(tmp_path, capsys):
    rows = figures(tmp_path, "policy", *SMALL, "--length=16", "--repeats=2")
    assert [row["program"] for row in rows] == ["forward", "forward and backward", "prefill", "ceiling"]
    # By hand: matrices 16·8·(2·2 + 2·1) + 3·16·16 + 32·16 = 2048, and causal attention over 136 pairs a sequence.
    forward = 2 * (2048 * 32 + 2 * 2 * 8 * 2 * 136)
    counted = {"forward": forward, "forward and backward": 3 * forward, "prefill": forward - 2 * 32 * 16 * 32}
    printed = capsys.readouterr().out
    for row in rows:
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        if row["program"] in counted:
            assert row["GFLOP/s"] * row["seconds"] == pytest.approx(counted[row["program"]] / 1e9, rel=0.01)
            assert row["tokens/s"] * row["seconds"] == pytest.approx(32, rel=0.01)
        assert row["program"] in printed


def test_a_deep_policy_lowers_to_no_more_than_a_shallow_one(tmp_path):
    rows = figures(tmp_path, "compile", "--depths", "7", "48", "--width=32", "--batch=1", "--length=16")
    assert [row["layers"] for row in rows] == [7, 48]
    small, large = (row["bytes of the lowered program"] for row in rows)
    assert large < 1.01 * small


def test_reward_is_read_alike_by_kernel_and_loop(tmp_path):
    rows = figures(tmp_path, "reward", "--responses=8", "--length=64", "--vocab=300", "--python=4", "--repeats=1")
    kernel, loop = rows
    assert kernel["times as fast as the loop"] == pytest.approx(loop["seconds"] / kernel["seconds"], rel=0.01)
    assert loop["of a step's time"] == pytest.approx(
        kernel["of a step's time"] * loop["seconds"] / kernel["seconds"], rel=0.01
    )


def test_update_with_and_without_sharing(tmp_path):
    sizes = ["--prompts=2", "--samples=2", "--context=8", "--response=4", "--microbatch-tokens=24", "--repeats=1"]
    shared, alone, _ = figures(tmp_path, "update", *(x for x in SMALL if "batch" not in x), *sizes)
    # By hand: matrices 1536 in the trunk and 512 in the head; causal attention of 8 prompt and 4 response tokens.
    for row, runs in ((shared, 1), (alone, 2)):
        tokens, pairs = 8 * runs + 2 * 4, 36 * runs + 2 * (4 * 8 + 10)
        flops = 2 * (6 * (1536 * tokens + 512 * 2 * 4) + 3 * 4 * 2 * 8 * pairs)
        assert row["GFLOP/s"] * row["seconds"] == pytest.approx(flops / 1e9, rel=0.01)
        assert row["response tokens/s"] * row["seconds"] == pytest.approx(16, rel=0.01)


def test_an_update_of_repeated_prompts_is_the_same(tmp_path):
    """What is compared is one computation: sharing changes no gradient."""
    options = bench_options("--prompts=2", "--samples=2", "--context=8", "--response=4", "--microbatch-tokens=24")
    shape = update.chosen_shape(options)
    batch = update.make_batch(options, shape)
    norms = [float(update.update_call(options, shape, part)()) for part in (batch, update.unshared(batch))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def bench_options(*arguments):
    parser = argparse.ArgumentParser()
    update.add_options(parser)
    return parser.parse_args([*(x for x in SMALL if "batch" not in x), *arguments])


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved(calls, repeats=2)
    assert "".join(order) == "ab" + "abab"
    assert all(0 <= s.low <= s.median <= s.high for s in seconds.values())


def test_what_does_not_run_here_is_a_sentence(capsys):
    assert bench.main(["bench", "policy", *SMALL, "--attention=splash"]) == 2
    assert "policy.attention='splash' is for a tpu" in capsys.readouterr().err
