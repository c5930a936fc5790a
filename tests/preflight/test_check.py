"""Checks of compiled programs: memory, resident arrays, and advice for those that do not fit."""

from __future__ import annotations

import json
import types

import jax
import pytest

from rpt_jax.errors import UserError
from rpt_jax.model.attention.platform import target_platform
from rpt_jax.preflight.check import Memory, ProgramReport, advise, as_record, check_programs
from rpt_jax.preflight.programs import Program, bytes_per_device
from rpt_jax.preflight.report import check_mesh
from rpt_jax.preflight.topology import parse_topology
from tests.helpers.preflight import SmallStep, check_small_step, make_small_step, small_experiment


@pytest.fixture(scope="module")
def small() -> SmallStep:
    return make_small_step()


def test_compiled_programs_are_checked(small: SmallStep):
    reports = check_small_step(small, "score", "reward")
    assert list(reports) == ["score", "reward"]
    assert all(report.fits and report.memory.total < 10**9 for report in reports.values())
    config, score = small.step.policy.config, reports["score"]
    assert score.memory.arguments > 4 * config.parameters
    assert score.flops > 2 * 2 * 32 * config.matmul_parameters  # Two documents of 32 tokens, and attention.
    assert json.loads(json.dumps(as_record(score)))["fits"] is True
    assert not score._replace(limit=score.memory.total - 1).fits
    assert not score._replace(traffic=None).fits


def test_a_program_that_the_run_does_not_have_is_an_error(small: SmallStep):
    with pytest.raises(UserError) as raised:
        check_mesh(small.experiment, parse_topology("h100:1"), small.mesh, ("update", "reshard"))
    assert raised.value.field == "--programs"


def test_arrays_that_are_not_arguments_are_resident(small: SmallStep):
    parameters = bytes_per_device(small.step.params)
    assert parameters == 4 * small.step.policy.config.parameters
    resident = {program.name: program.resident_bytes for program in small.step.programs}
    assert list(resident) == ["score", "sample", "reward", "update"]  # Nothing to reshard on one device.
    # Sampling has the parameters as its argument: the reference parameters and two moments are resident. The reward has none
    # of the four as an argument. The update has the state: the reference parameters and the batch are resident.
    assert resident["sample"] == pytest.approx(3 * parameters, rel=1e-3)
    assert resident["reward"] == pytest.approx(4 * parameters, rel=1e-3)
    assert resident["update"] == pytest.approx(parameters, rel=1e-2)


@pytest.mark.parametrize(
    ("program", "overrides", "advice"),
    [
        ("sample", [], "rollout.decode_slots=3 instead of 4"),
        ("update", [], "policy.remat='full' instead of 'none'"),
        ("update", ["policy.remat=full"], "training.microbatch_tokens=48 instead of 64"),
        ("score", ["data.score_batch_windows=4"], "data.score_batch_windows=3 instead of 4"),
        ("reshard", [], "mesh.tensor=2 or mesh.fsdp=2"),
    ],
)
def test_advice_names_the_field_that_makes_a_program_fit(
    small: SmallStep, program: str, overrides: list[str], advice: str
):
    report = ProgramReport(
        program=program,
        compile_seconds=0.0,
        memory=Memory(arguments=0, results=0, temporaries=1000, code=0, resident=0),
        limit=751.0,
        flops=0.0,
        traffic=None,
        times=None,
        least_memory=None,
        advice="",
    )
    assert not report.fits
    assert advice in advise(small_experiment(*overrides), small.step, report)


def test_programs_are_traced_for_the_platform_of_their_mesh():
    assert target_platform() == jax.default_backend() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_platform() == "tpu"


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * 2**30,
        ),
        ("the total memory required for HLO temporaries (400.00G) exceeds available HBM (30.75G).", 400 * 2**30),
    ],
)
def test_a_program_too_large_for_the_compiler_does_not_fit(small: SmallStep, message: str, size: float):
    """Both messages are those of libtpu 0.0.42.1."""

    def refuse():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    lowered = types.SimpleNamespace(compile=refuse)
    program = Program(name="score", lower=lambda: lowered, resident_bytes=5)
    step = small.step._replace(programs=(program,))
    (report,) = check_programs(small.experiment, step, parse_topology("v5e:1x1"), {}, {})
    assert not report.fits
    assert report.memory.total == size + 5
    assert report.advice and as_record(report)["fits"] is False


def test_other_compiler_errors_are_raised(small: SmallStep):
    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    lowered = types.SimpleNamespace(compile=refuse)
    step = small.step._replace(programs=(Program(name="score", lower=lambda: lowered, resident_bytes=0),))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        check_programs(small.experiment, step, parse_topology("v5e:1x1"), {}, {})
