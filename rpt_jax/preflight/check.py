"""Compile each program of a step, check whether it fits a chip, and suggest which config field to change if it does not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rpt_jax.config import Experiment
from rpt_jax.distributed.mesh import DECODING, mesh_fields, num_batch_shards
from rpt_jax.preflight.costs import Times, estimate_times, least_sampling_bytes, trip_counts
from rpt_jax.preflight.hlo import Traffic, traffic
from rpt_jax.preflight.programs import Program, ProgramName, Step
from rpt_jax.preflight.topology import Topology
from rpt_jax.rollout.memory import rollout_memory

GIB = 2**30
# The two messages of libtpu 0.0.42.1 (jax 0.10.2) for a program that needs more memory than a chip has: "Used 20.5G of 15.75G
# hbm" and "HLO temporaries (400.00G) exceeds available HBM". Any other message is raised as an error.
_OUT_OF_MEMORY = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\)? (?:of|exceeds)")
# Places in a program of which the JSON record says how much memory traffic they cause.
_RECORDED_SOURCES = 20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes per chip while a program runs.

    Attributes:
      arguments: arguments of the program.
      results: results that do not reuse the memory of an argument.
      temporaries: temporaries at the program's peak.
      code: the compiled program.
      resident: other arrays of the run that stay in memory meanwhile.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    resident: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


class ProgramReport(NamedTuple):
    """Memory, FLOPs, traffic and estimated time of one program of a step on a topology.

    Attributes:
      program: name of the program.
      compile_seconds: seconds to trace and compile it.
      memory: bytes per chip; for a program that is too large for the compiler, all of them are `temporaries`.
      limit: bytes that a chip has.
      flops: FLOPs per chip, by formula.
      traffic: data moved per chip, None if the program did not compile.
      times: estimated time, None if the program did not compile.
      least_memory: bytes that the program has to read, None if that is not known.
      advice: what to change if the program does not fit, else "".
    """

    program: str
    compile_seconds: float
    memory: Memory
    limit: float
    flops: float
    traffic: Traffic | None
    times: Times | None
    least_memory: float | None
    advice: str

    @property
    def fits(self) -> bool:
        """Whether the program compiles and its memory is within the limit."""
        return self.traffic is not None and self.memory.total <= self.limit


def check_programs(
    experiment: Experiment,
    step: Step,
    topology: Topology,
    flops: Mapping[str, float],
    kernel_bytes: Mapping[str, Callable[[int], float]],
) -> list[ProgramReport]:
    """Compile all programs of a step in the context of their mesh and print a line for each.

    Args:
      experiment: the experiment of the step.
      step: the programs.
      topology: the chips that they are compiled for.
      flops: FLOPs per chip, by program.
      kernel_bytes: see `costs.kernel_bytes`.
    """
    counts = trip_counts(experiment, step)
    devices = step.mesh.devices.flat
    if topology.has_compiler:
        hosts = [device.process_index for device in devices]
    else:
        # Simulated devices all belong to one process: assign them to hosts by number.
        hosts = [index // topology.chip.devices_per_host for index, _ in enumerate(devices)]
    reports = []
    for program in step.programs:
        start = time.perf_counter()
        memory, text = _compile(program)
        seconds = time.perf_counter() - start
        program_flops = flops.get(program.name, 0.0)
        program_traffic = traffic(text, counts, hosts, kernel_bytes) if text is not None else None
        report = ProgramReport(
            program=program.name,
            compile_seconds=seconds,
            memory=memory,
            limit=topology.chip.memory,
            flops=program_flops,
            traffic=program_traffic,
            times=estimate_times(topology.chip, program_flops, program_traffic) if program_traffic else None,
            least_memory=least_sampling_bytes(experiment, step) if program.name == ProgramName.SAMPLE else None,
            advice="",
        )
        if not report.fits:
            report = report._replace(advice=advise(experiment, step, report))
        # Compiling all programs may take minutes, so report progress.
        print(f"{program.name}: compiled in {seconds:.0f} s, {memory.total / GIB:.2f} GiB per chip", flush=True)
        reports.append(report)
    return reports


def advise(experiment: Experiment, step: Step, report: ProgramReport) -> str:
    """Return which config field would make a program fit, and the value that it needs by arithmetic."""
    excess = report.memory.total - report.limit
    split_further = _split_further(step)

    # Sampling: decode fewer rollouts at once.
    if report.program == ProgramName.SAMPLE and step.decoding:
        replicas = num_batch_shards(step.mesh, DECODING)
        slot_bytes = _bytes_per_slot(experiment, step)
        slots = step.decoding.slots // replicas - int(-(-excess // slot_bytes))
        if slots < 1:
            split = _split_rollouts(step) or split_further
            return f"no rollout.decode_slots is small enough: shorten prompts or responses, or {split}"
        change = f"rollout.decode_slots={slots * replicas} instead of {step.decoding.slots}"
        return f"set {change}, at {slot_bytes / GIB:.3g} GiB per slot"

    # Update: save fewer activations, then run fewer tokens per pass.
    if report.program == ProgramName.UPDATE:
        if experiment.policy.remat != "full":
            return f"set policy.remat='full' instead of '{experiment.policy.remat}'"
        now = experiment.training.microbatch_tokens
        least = experiment.prompt.max_tokens + experiment.rollout.max_new_tokens
        tokens = int(now * (1 - excess / report.memory.temporaries))
        if tokens >= least:
            return f"set training.microbatch_tokens={tokens} instead of {now}, by proportion"
        return f"set training.microbatch_tokens={least}, the least for a prompt and a response, and {split_further}"

    # Scoring: smaller batches.
    if report.program == ProgramName.SCORE:
        now = experiment.data.score_batch_windows
        windows = int(now * (1 - excess / report.memory.temporaries))
        shards = num_batch_shards(step.mesh)
        if windows >= shards:
            return f"set data.score_batch_windows={windows // shards * shards} instead of {now}"
    return split_further


def as_record(report: ProgramReport) -> dict[str, Any]:
    """Return a report as JSON values: bytes, FLOPs and seconds, all per chip."""
    record: dict[str, Any] = {
        "program": report.program,
        "fits": report.fits,
        "compile_seconds": round(report.compile_seconds, 2),
        "memory_bytes": report.memory._asdict() | {"total": report.memory.total, "limit": int(report.limit)},
        "flops": report.flops,
    }
    if report.advice:
        record["advice"] = report.advice
    if report.traffic and report.times:
        record |= {
            "memory_traffic_bytes": report.traffic.memory,
            "least_memory_bytes": report.least_memory,
            "largest_memory_traffic": [source._asdict() for source in report.traffic.sources[:_RECORDED_SOURCES]],
            "collectives": [
                collective._asdict() | {"sent_bytes": sent, "runs": report.traffic.runs[collective]}
                for collective, sent in report.traffic.sent.items()
            ],
            "loops_counted_once": sorted(report.traffic.unknown_loops),
            "bound": report.times.bound,
            "estimated_seconds": report.times._asdict() | {"total": report.times.seconds},
        }
    return record


def _compile(program: Program) -> tuple[Memory, str | None]:
    """Return the memory of a program and its HLO text, None if the compiler reports that it is too large."""
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if not found:
            raise
        needed = int(float(found[1]) * _UNITS[found[2]])
        memory = Memory(arguments=0, results=0, temporaries=needed, code=0, resident=program.resident_bytes)
        return memory, None
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"The compiler reports no memory for program '{program.name}'.")
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    known = analysis.argument_size_in_bytes + results
    # Prefer the peak if the backend reports it: the sum of all temporaries overstates it.
    peak = analysis.peak_memory_in_bytes or known + analysis.temp_size_in_bytes
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        results=results,
        temporaries=max(0, peak - known),
        code=analysis.generated_code_size_in_bytes,
        resident=program.resident_bytes,
    )
    return memory, compiled.as_text()


def _split_further(step: Step) -> str:
    """Return the advice to split the policy over more devices; kv heads are not split any further than into single heads."""
    mesh = mesh_fields(step.mesh)
    more_tensor = 2 * mesh["tensor"]
    tensor = f"mesh.tensor={more_tensor} or " if step.policy.config.kv_heads % more_tensor == 0 else ""
    if mesh["data"] % 2 == 0:
        return f"set mesh.fsdp={2 * mesh['fsdp']} and mesh.data={mesh['data'] // 2}"
    return f"set {tensor}mesh.fsdp={2 * mesh['fsdp']} (with more chips, or less of another axis)"


def _split_rollouts(step: Step) -> str:
    """Return the advice to split a replica of rollouts over twice as many devices; "" if the policy or the mesh prevents it."""
    mesh = mesh_fields(step.mesh)
    size = 2 * mesh["rollout_tensor"]
    fits = step.policy.config.kv_heads % size == 0 and mesh["fsdp"] * mesh["tensor"] % size == 0
    return f"set mesh.rollout_tensor={size}" if fits else ""


def _bytes_per_slot(experiment: Experiment, step: Step) -> int:
    """Return the bytes per chip that one decode slot adds."""
    rollout = experiment.rollout
    mesh = step.mesh
    return rollout_memory(
        step.policy.config,
        step.policy.dtype.name,
        prompts=-(-experiment.training.prompts_per_step // num_batch_shards(mesh, DECODING)),
        prompt_tokens=experiment.prompt.max_tokens,
        samples=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        tensor=mesh_fields(mesh)["rollout_tensor"],
    ).per_slot
