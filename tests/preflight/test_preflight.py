"""Preflight: what it reads of topologies and of HLO, what it says of programs that fit or not, and whole compilations."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.distributed.mesh import make_mesh, use_mesh
from rpt_jax.errors import UserError
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.preflight import hlo, scaling, topology
from rpt_jax.preflight.costs import flops_a_chip, times, turns, update_rows
from rpt_jax.preflight.hlo import Collective, Traffic, traffic
from rpt_jax.preflight.programs import Program, bytes_a_device, make_step
from rpt_jax.preflight.topology import CHIPS, parse_topology, prepare_process
from rpt_jax.preflight.verdict import Memory, Verdict, advise, as_record, judge_step
from tests.helpers.paths import ROOT

SMALL = [
    "policy.path=",
    "data.max_document_tokens=32",
    "prompt.max_tokens=16",
    "rollout.max_new_tokens=8",
    "rollout.samples_per_prompt=2",
    "training.prompts_per_step=2",
    "training.microbatch_tokens=64",
    "data.score_batch_windows=2",
]
# Four devices. A loop of three turns gathers 16 numbers of four bytes from pairs of them, then sums 64 over all; a loop whose end
# nobody wrote down passes 8 on; and a fused computation takes one of four rows of a matrix.
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "/home/me/rpt_jax/rollout/engine.py"

FunctionNames
1 "decode_until"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%row (p.0: f32[4,16], p.1: s32[]) -> f32[1,16] {
  %p.0 = f32[4,16]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice = f32[1,16]{1,0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,16}
}

%three (c: (s32[], f32[16])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%turn (b: (s32[], f32[16])) -> (s32[], f32[16]) {
  %b = (s32[]{:T(128)}, f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%b), index=1
  %gathered = f32[32]{0} all-gather(%x), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %wide = f32[64]{0} broadcast(%x), dimensions={}
  %sum = f32[64]{0} all-reduce(%wide), channel_id=2, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[16]{0}) tuple(%i, %x)
}

%open (c.1: (s32[], s32[])) -> pred[] {
  %c.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %n.1 = s32[] get-tuple-element(%c.1), index=1
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%pass (b.1: (s32[], s32[])) -> (s32[], s32[]) {
  %b.1 = (s32[], s32[]) parameter(0)
  %y = f32[8]{0} constant({...})
  %passed = f32[8]{0} collective-permute(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %out.1 = (s32[], s32[]) tuple(%i.1, %n.1)
}

ENTRY %main (a: f32[4,16], k: s32[]) -> f32[1,16] {
  %a = f32[4,16]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %t = (s32[], f32[16]{0}) tuple(%k, %a)
  %loop = (s32[], f32[16]{0}) while(%t), condition=%three, body=%turn
  %t.1 = (s32[], s32[]) tuple(%k, %k)
  %first = (s32[], s32[]) while(%t.1), condition=%open, body=%pass, metadata={op_name="jit(f)/while" stack_frame_id=1}
  %second = (s32[], s32[]) while(%first), condition=%open, body=%pass, metadata={op_name="jit(f)/while" stack_frame_id=1}
  ROOT %taken = f32[1,16]{1,0} fusion(%a, %k), kind=kLoop, calls=%row
}
"""


@pytest.mark.parametrize(
    "text, kind, count",
    [("v5p:4x4x4", "v5p", 64), ("v6e:8x8", "v6e", 64), ("v4:2x2x2", "v4", 8), ("h100:8", "h100", 8)],
)
def test_topologies(text, kind, count):
    parsed = parse_topology(text)
    assert (parsed.kind, parsed.count, parsed.name) == (kind, count, text)
    assert parsed.is_compiled_for == (CHIPS[kind].platform == "tpu")


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5q:4x4x4", "Did you mean 'v5"),
        ("v5p", "3 numbers, as in v5p:2x2x4"),
        ("v5e:4x4x4", "2 numbers, as in v5e:4x4"),
        ("h100:2x4", "a number, as in h100:8"),
        ("v6e:0x4", "2 numbers"),
    ],
)
def test_topologies_that_are_none(text, said):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert f"--topology={text}" in str(error.value) and said in str(error.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]'):
        prepare_process(parse_topology("v5e:2x2"))


def test_gpus_are_simulated_cpu_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    prepare_process(parse_topology("h100:8"))
    assert os.environ["XLA_FLAGS"] == "--xla_of_the_user=1 --xla_force_host_platform_device_count=8"


def test_collectives_as_often_as_their_loops_go_round():
    moved = traffic(PROGRAM, {"engine.decode_until": (5, 0)}, hosts=[0, 0, 1, 1])
    gather, everywhere, passing = (
        Collective("all-gather", 2, True),
        Collective("all-reduce", 4, False),
        Collective("collective-permute", 2, True),
    )
    # A gather of 64 bytes sends them to the one other; a sum of 256 passes three quarters of them on, twice.
    assert moved.sent == {gather: 3 * 64, everywhere: 3 * 2 * 256 * 3 / 4, passing: 5 * 32}
    assert moved.runs == {gather: 3, everywhere: 3, passing: 5}
    assert not moved.guessed


def test_loops_that_nobody_knows_are_counted_once_and_named():
    moved = traffic(PROGRAM, {}, hosts=[0] * 4)
    assert moved.guessed == {"engine.decode_until"}
    assert moved.runs[Collective("collective-permute", 2, True)] == 2


def test_of_an_array_that_is_sliced_the_slice_is_read():
    # A row of 64 bytes read and written, an index of 4 read; in each of three turns, a gather (64 + 128), a broadcast (64 + 256)
    # and a sum (256 + 256), and the comparison of two numbers of 4 bytes to 1.
    alone = traffic(PROGRAM, {"engine.decode_until": (0,)}, hosts=[0] * 4)
    assert alone.memory == 64 + 64 + 4 + 3 * (192 + 320 + 512 + 9)


def test_a_compiled_loop_reads_its_own_weights_each_turn():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jnp.zeros((256, 256)), jnp.zeros((20, 256, 256))
    moved = traffic(jax.jit(run).lower(x, w).compile().as_text(), {}, hosts=[0]).memory
    # What goes in, the weights of the turn, what comes out; and as much again where XLA copies.
    assert 20 * 3 * x.nbytes <= moved <= 2.5 * 20 * 3 * x.nbytes


def test_without_loops_it_counts_as_xla_does():
    x, w = jnp.zeros((128, 256)), jnp.zeros((256, 256))
    compiled = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w[:128].T).lower(x, w).compile()
    assert traffic(compiled.as_text(), {}, hosts=[0]).memory == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.1
    )


@pytest.mark.parametrize(
    "written, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [0, 2]),
        ("replica_groups={}, x", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_of_devices(written, group):
    assert hlo._group(written, 8) == group


def test_the_longest_part_is_the_bound():
    chip = CHIPS["h100"]
    moved = Traffic(
        3350e9, {Collective("all-reduce", 8, True): 45e9, Collective("all-gather", 16, False): 100e9}, {}, frozenset()
    )
    seconds = times(chip, 989e12 / 2, moved)
    np.testing.assert_allclose(seconds, (0.5, 1.0, 2.1))
    assert seconds.bound == "network" and seconds.seconds == pytest.approx(2.1)


def small(*overrides):
    return from_config_dict(load_config_file(str(ROOT / "configs" / "rpt_tiny.py")), [*SMALL, *overrides])


@pytest.fixture(scope="module")
def made():
    """A small step on this machine's CPU, and its mesh."""
    experiment, mesh = small(), make_mesh(1, 1, 1, jax.devices()[:1])
    with use_mesh(mesh):
        return experiment, make_step(experiment, mesh, 10**9), mesh


def judged(made, *names):
    """Programs of the small step, compiled as if for an H100."""
    experiment, step, mesh = made
    chosen = step._replace(programs=tuple(p for p in step.programs if p.name in names))
    with use_mesh(mesh):
        flops = flops_a_chip(experiment, step)
        return {v.program: v for v in judge_step(experiment, chosen, parse_topology("h100:1"), flops)}


def test_programs_are_compiled_and_judged(made):
    verdicts = judged(made, "score", "reward")
    assert list(verdicts) == ["score", "reward"]
    assert all(v.fits and v.memory.total < 10**9 for v in verdicts.values())
    shape = made[1].setup.policy.config
    assert verdicts["score"].memory.arguments > 4 * shape.parameters
    assert verdicts["score"].flops > 2 * 2 * 32 * shape.matmul_parameters  # Two documents of 32 tokens, and attention.
    assert json.loads(json.dumps(as_record(verdicts["score"])))["fits"] is True
    tight = verdicts["score"].memory.total - 1
    assert not verdicts["score"]._replace(limit=tight).fits
    assert not verdicts["score"]._replace(moved=None).fits


@pytest.mark.slow
def test_a_step_reads_its_weights_for_every_token(made):
    verdicts = judged(made, "sample", "update")
    assert verdicts["update"].flops == pytest.approx(3 * verdicts["sample"].flops)
    # Seven steps of decoding after the first token.
    assert verdicts["sample"].moved.memory > 7 * 4 * made[1].setup.policy.config.matmul_parameters


def test_what_lives_beside_a_program_is_counted(made):
    _, step, _ = made
    parameters = bytes_a_device(step.setup.params)
    assert parameters == 4 * step.setup.policy.config.parameters
    beside = {program.name: program.beside for program in step.programs}
    assert list(beside) == ["score", "sample", "reward", "update"]  # Nothing to reshard on one device.
    # Those of the start and two moments beside the parameters that are sampled from; all four beside the reward; and of the
    # update, whose state is its argument, those of the start and the batch.
    assert beside["sample"] == pytest.approx(3 * parameters, rel=1e-3)
    assert beside["reward"] == pytest.approx(4 * parameters, rel=1e-3)
    assert beside["update"] == pytest.approx(parameters, rel=1e-2)


@pytest.mark.parametrize(
    "program, overrides, said",
    [
        ("sample", [], "set rollout.decode_slots=3 in place of 4"),
        ("update", [], "policy.remat='full' in place of 'none'"),
        ("update", ["policy.remat=full"], "training.microbatch_tokens=48 in place of 64"),
        ("score", ["data.score_batch_windows=4"], "data.score_batch_windows=3 in place of 4"),
        ("reshard", [], "mesh.tensor=2 or mesh.fsdp=2"),
    ],
)
def test_what_does_not_fit_is_told_what_to_change(made, program, overrides, said):
    memory = Memory(0, 0, 1000, 0, 0)
    verdict = Verdict(program, 0.0, memory, 751.0, 0.0, None, None, "")
    assert not verdict.fits
    assert said in advise(small(*overrides), made[1], verdict)


def test_loops_go_round_as_often_as_full_lengths_take():
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    for slots, waves in ((4, 1), (2, 2)):
        experiment = small(f"rollout.decode_slots={slots}")
        with use_mesh(mesh):
            step = make_step(experiment, mesh, 10**9)
            found = turns(experiment, step)
        assert found["engine.decode_until"] == (waves * 7, 0)
        assert found["gradient.policy_gradient"] == (1,)


@pytest.mark.parametrize("tokens, rows", [(64, 1), (32, 2), (24, 4), (63, 2)])
def test_rows_of_an_update(tokens, rows):
    """Two prompts of 16 tokens with two responses of 8 each: both in one row, one a row, or a row for each response."""
    assert update_rows(small(f"training.microbatch_tokens={tokens}")) == rows


def test_programs_are_traced_for_their_mesh():
    assert target_platform() == jax.default_backend() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_platform() == "tpu"


@pytest.mark.parametrize(
    "said, size",
    [
        (
            "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * 2**30,
        ),
        ("the total memory required for HLO temporaries (400.00G) exceeds available HBM (30.75G).", 400 * 2**30),
    ],
)
def test_what_the_compiler_says_is_too_large(made, said, size):
    def refuse():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    too_large = types.SimpleNamespace(compile=refuse)
    step = made[1]._replace(programs=(Program("score", lambda: too_large, beside=5),))
    verdict = judge_step(made[0], step, parse_topology("v5e:1x1"), {})[0]
    assert not verdict.fits and verdict.memory.total == size + 5
    assert verdict.advice and as_record(verdict)["fits"] is False


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_OPTIMIZATION_LEVEL": "O0"}
    overrides = [f"--config.{field}" for field in SMALL]
    command = [sys.executable, "-m", "rpt_jax.preflight", "--config=configs/rpt_tiny.py", *overrides, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_what_is_to_mend_ends_with_2(tmp_path):
    done = run("--topology=v9:2x2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology=v9:2x2") and "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is False and result["error"].startswith("--topology=v9:2x2")


@pytest.mark.slow
def test_gpus_by_count(tmp_path):
    done = run("--topology=h100:2", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] is True and result["compiled_for"] == "simulated CPU devices"
    assert "simulated CPU devices" in done.stdout and "It fits." in done.stdout
    assert {p["program"] for p in result["programs"]} == {"score", "sample", "reward", "update"}


def test_numbers_of_chips_side_by_side(tmp_path, capsys):
    def record(chips, prompts):
        collective = {"kind": "all-gather", "size": 4, "in_host": True, "sent_bytes": 3e12, "runs": 1}
        program = {"flops": 2e12 * prompts / chips, "memory_traffic_bytes": 5e12, "collectives": [collective]}
        programs = [program | {"program": name} for name in ("score", "sample", "update")]
        found = {"topology": f"v6e:{chips}", "chips": chips, "prompts_per_step": prompts, "programs": programs}
        path = tmp_path / f"{chips}-{prompts}.json"
        path.write_text(json.dumps(found | {"estimated_step_seconds": 7.0}))
        return str(path)

    runs = [record(*sizes) for sizes in ((16, 256), (64, 256), (64, 1024), (256, 4096))]
    assert scaling.main(["scaling", *runs, f"--plot={tmp_path / 'plot.png'}"]) == 0
    out = capsys.readouterr().out
    # Two programs belong to a step; of 256 prompts, 64 chips have a quarter of the FLOPs that 16 have.
    for row in ("v6e:16 | 16 | 256 | 64 | 10 | 6 | 7", "v6e:64 | 64 | 256 | 16 | 10 | 6 | 7"):
        assert row in re.sub(r" +", " ", out)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [len(scaling.alike([scaling.read(Path(r)) for r in runs], key)) for key in scaling.LINES.values()] == [2, 3]


def test_files_that_preflight_did_not_write(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert scaling.main(["scaling", str(tmp_path / "other.json")]) == 2
    assert "other.json is not what preflight writes" in capsys.readouterr().err


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_slice(tmp_path):
    done = run(
        "--topology=v5e:2x2",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        f"--json={tmp_path / 'o'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "o").read_text())
    assert result["fits"] is True and result["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2, "rollout_tensor": 2}
    by_name = {p["program"]: p for p in result["programs"]}
    assert set(by_name) == {"score", "reshard", "sample", "reward", "update"}
    assert by_name["reshard"]["collectives"] and by_name["update"]["collectives"]
    assert by_name["update"]["memory_bytes"]["limit"] == int(15.75 * 2**30)


@pytest.mark.slow
@needs_libtpu
def test_a_sweep_recommends_a_mesh_that_fits(tmp_path):
    done = run("--topology=v5e:1x1", "--sweep", f"--json={tmp_path / 'o'}")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "o").read_text())
    assert result["fits"] is True and result["recommended"]["mesh"] == {
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
        "rollout_tensor": 1,
    }
    assert "Recommended: --config.mesh.data=1" in done.stdout
