"""The benches: FLOPs that they count, figures that they write, and the baselines that they compare with."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from rpt_jax.bench import __main__ as bench
from rpt_jax.bench.measure import interleaved
from rpt_jax.bench.rollout import keys_read
from rpt_jax.rollout.prefix_sharing import separate
from tests.helpers.benches import MODEL, run_bench


def test_policy_prints_and_writes_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = run_bench(tmp_path, "policy", *MODEL, "--batch=2", "--length=16", "--repeats=2")
    assert [row["program"] for row in rows] == ["forward", "forward and backward", "prefill", "peak matmul"]
    # By hand: matrices 16·8·(2·2 + 2·1) + 3·16·16 + 32·16 = 2048, and causal attention over 136 pairs per sequence.
    forward = 2 * (2048 * 32 + 2 * 2 * 8 * 2 * 136)
    counted = {"forward": forward, "forward and backward": 3 * forward, "prefill": forward - 2 * 32 * 16 * 32}
    printed = capsys.readouterr().out
    for row in rows:
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        if row["program"] in counted:
            assert row["GFLOP/s"] * row["seconds"] == pytest.approx(counted[row["program"]] / 1e9, rel=0.01)
            assert row["tokens/s"] * row["seconds"] == pytest.approx(32, rel=0.01)
        assert row["program"] in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reward", "--length=16"), "at least 48"),
        (("reward", "--vocab=4"), "at least 5"),
        (("routing", "--max-new-tokens=1"), "at least 2"),
        (("compile", "--width=12"), "multiple of 8"),
        (("policy", "--heads=5", "--kv-heads=2"), "--kv-heads=2"),
        (("policy", "--head-size=7"), "must be even"),
        (("reward", "--json=no/such/folder.json"), "the folder no/such does not exist"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
):
    try:
        code = bench.main(["bench", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and words in capsys.readouterr().err


def test_every_decode_step_reads_the_keys_of_the_prompt_once():
    """The first token of a response comes from the prefill, and is read by the steps after it."""
    prompts = separate(np.ones((2, 10), np.int32), np.full(2, 10, np.int32), np.arange(2, dtype=np.int32))
    assert keys_read(np.array([[1, 1], [1, 1]]), prompts) == 0
    # One step of a prompt, which two responses share, and the own token of each.
    assert keys_read(np.array([[2, 2], [1, 1]]), prompts) == 10 + 2
    assert keys_read(np.array([[4, 1], [3, 2]]), prompts) == 3 * 10 + (1 + 2 + 3) + 2 * 10 + (1 + 2) + 1


def test_the_lowered_program_does_not_grow_with_depth(tmp_path: Path):
    rows = run_bench(tmp_path, "compile", "--depths", "7", "48", "--width=32", "--batch=1", "--length=16")
    assert [row["layers"] for row in rows] == [7, 48]
    small, large = (row["bytes of the lowered program"] for row in rows)
    assert large < 1.01 * small


def test_the_reward_kernel_is_compared_with_python(tmp_path: Path):
    rows = run_bench(tmp_path, "reward", "--responses=8", "--length=64", "--vocab=300", "--python=4", "--repeats=1")
    kernel, python = rows
    assert python["reward"] == "Python, extrapolated from 4 responses"
    ratio = python["seconds"] / kernel["seconds"]
    assert kernel["speedup over Python"] == pytest.approx(ratio, rel=0.01)
    fraction = "fraction of a step of qwen2.5-14b"
    assert python[fraction] == pytest.approx(kernel[fraction] * ratio, rel=0.01)


@pytest.mark.parametrize(
    "arguments",
    (
        "rollout --samples=0",
        "rollout --max-new-tokens=0",
        "rollout --decode-slots=-1",
        "rollout --temperature=0",
        "policy --layers=x",
        "compile --depths 0",
        "reward --responses=0",
        "data --megabytes=inf",
    ),
)
def test_an_impossible_number_is_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main(["bench", *arguments.split()])
    assert raised.value.code == 2
    option = arguments.split()[1].partition("=")[0]
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["bench", "update", "--json=/no/such/folder/figures.json"]) == 2
    assert "/no/such/folder" in capsys.readouterr().err


def test_what_is_missing_is_named_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    for option, arguments in {
        "--model='nowhere'": ["rollout", "--model=nowhere"],
        "--policy='nowhere'": ["data", "--policy=nowhere"],
        "--tokenizer='nowhere'": ["data", "--tokenizer=nowhere"],
        "--preset='nowhere'": ["update", "--preset=nowhere"],
    }.items():
        assert bench.main(["bench", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option} ")


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved(calls, repeats=2)
    assert "".join(order) == "ab" + "abab"
    assert all(0 <= s.fastest <= s.median <= s.slowest for s in seconds.values())


def test_an_unavailable_choice_is_an_error_without_a_traceback(capsys: pytest.CaptureFixture[str]):
    assert jax.default_backend() == "cpu"
    assert bench.main(["bench", "policy", *MODEL, "--attention=tpu_kernels"]) == 2
    assert capsys.readouterr().err.startswith("error: policy.attention='tpu_kernels'")


@pytest.mark.parametrize(
    ("arguments", "new"),
    [(["policy", "--beside=transformers"], "--compare"), (["data", "--tokens=3"], "--max-document-tokens")],
)
def test_a_renamed_option_is_refused_with_its_new_name(
    arguments: list[str], new: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        bench.main(["bench", *arguments])
    assert ended.value.code == 2 and f"was renamed to {new}" in capsys.readouterr().err
