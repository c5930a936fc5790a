"""Each program compiled, whether it fits, and where it does not, which field of the config to change and by how much."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rpt_jax.config import Experiment
from rpt_jax.distributed.sharding import DECODING, mesh_fields, num_batch_shards
from rpt_jax.preflight.costs import Times, times, turns
from rpt_jax.preflight.hlo import Traffic, traffic
from rpt_jax.preflight.programs import Program, Step
from rpt_jax.preflight.topology import Topology
from rpt_jax.rollout.memory import rollout_memory

GIB = 2**30
# What libtpu says where a program needs more than a chip has, in either of two sentences.
_TOO_LARGE = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\)? (?:of|exceeds)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes a chip while a program runs.

    Attributes:
      arguments, results: what goes in, and what comes out that is not written over an argument.
      temporaries: what the program takes besides at its fullest moment.
      code: the compiled program.
      beside: what lives meanwhile and is none of its arguments.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    beside: int

    @property
    def total(self) -> int:
        return sum(self)


class Verdict(NamedTuple):
    """A program of a step on a topology.

    Attributes:
      compile_seconds: tracing included.
      memory: bytes a chip by kind; of a program that the compiler refuses, all that it names is `temporaries`.
      limit: bytes that a chip has.
      flops: on each chip, by formula.
      moved, times: what a chip moves, and the seconds that all imply; None where the compiler refused.
      advice: what to change, where it does not fit.
    """

    program: str
    compile_seconds: float
    memory: Memory
    limit: float
    flops: float
    moved: Traffic | None
    times: Times | None
    advice: str

    @property
    def fits(self) -> bool:
        return self.moved is not None and self.memory.total <= self.limit


def judge_step(experiment: Experiment, step: Step, topology: Topology, flops: Mapping[str, float]) -> list[Verdict]:
    """Compile all programs of a step, in the context of their mesh; `flops` are of each chip, by program."""
    loops, verdicts = turns(experiment, step), []
    # Simulated devices are all of one process: there the hosts are counted off.
    places = enumerate(step.setup.mesh.devices.flat)
    hosts = [d.process_index if topology.is_compiled_for else i // topology.chip.host for i, d in places]
    for program in step.programs:
        start = time.perf_counter()
        memory, text = _compiled(program)
        seconds = time.perf_counter() - start
        moved = text and traffic(text, loops, hosts)
        work = flops.get(program.name, 0.0)
        verdict = Verdict(program.name, seconds, memory, topology.chip.memory, work, None, None, "")
        if moved:
            verdict = verdict._replace(moved=moved, times=times(topology.chip, work, moved))
        if not verdict.fits:
            verdict = verdict._replace(advice=advise(experiment, step, verdict))
        # Minutes may pass until the tables are there.
        print(f"{program.name}: {seconds:.0f} s to compile, {memory.total / GIB:.2f} GiB a chip", flush=True)
        verdicts.append(verdict)
    return verdicts


def advise(experiment: Experiment, step: Step, verdict: Verdict) -> str:
    """Name the field that would make a program fit, and the value that does so by arithmetic."""
    t, excess = experiment.training, verdict.memory.total - verdict.limit
    mesh = mesh_fields(step.setup.mesh)
    tensor = f"mesh.tensor={2 * mesh['tensor']} or "
    # Heads are not divided.
    tensor = tensor if step.setup.policy.config.kv_heads % (2 * mesh["tensor"]) == 0 else ""
    deeper = f"set {tensor}mesh.fsdp={2 * mesh['fsdp']} (with more chips, or less of another axis)"
    if verdict.program == "sample":
        ways = num_batch_shards(step.setup.mesh, DECODING)
        each = _bytes_a_slot(experiment, step)
        slots = step.decoding.slots // ways - int(-(-excess // each))
        if slots >= 1:
            asked = f"rollout.decode_slots={slots * ways} in place of {step.decoding.slots}"
            return f"set {asked}, at {each / GIB:.3g} GiB a slot"
        return f"no rollout.decode_slots is small enough: shorten prompts or responses, or {deeper}"
    if verdict.program == "update":
        if experiment.policy.remat != "full":
            return f"set policy.remat='full' in place of '{experiment.policy.remat}'"
        least = experiment.prompt.max_tokens + experiment.rollout.max_new_tokens
        tokens = int(t.microbatch_tokens * (1 - excess / verdict.memory.temporaries))
        if tokens >= least:
            return f"set training.microbatch_tokens={tokens} in place of {t.microbatch_tokens}, by proportion"
        return f"set training.microbatch_tokens={least}, the least that holds a prompt and a response, and {deeper}"
    if verdict.program == "score":
        documents = int(experiment.data.score_batch_windows * (1 - excess / verdict.memory.temporaries))
        ways = num_batch_shards(step.setup.mesh)
        if documents >= ways:
            now = experiment.data.score_batch_windows
            return f"set data.score_batch_windows={documents // ways * ways} in place of {now}"
    return deeper


def as_record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it: bytes, FLOPs and seconds, all of one chip."""
    record = {
        "program": verdict.program,
        "fits": verdict.fits,
        "compile_seconds": round(verdict.compile_seconds, 2),
        "memory_bytes": verdict.memory._asdict() | {"total": verdict.memory.total, "limit": int(verdict.limit)},
        "flops": verdict.flops,
    }
    if verdict.advice:
        record["advice"] = verdict.advice
    if verdict.moved:
        record |= {
            "memory_traffic_bytes": verdict.moved.memory,
            "collectives": [
                c._asdict() | {"sent_bytes": sent, "runs": verdict.moved.runs[c]}
                for c, sent in verdict.moved.sent.items()
            ],
            "loops_counted_once": sorted(verdict.moved.guessed),
            "bound": verdict.times.bound,
            "estimated_seconds": verdict.times._asdict() | {"total": verdict.times.seconds},
        }
    return record


def _compiled(program: Program) -> tuple[Memory, str | None]:
    """Memory of a program and its HLO, None where the compiler says that it is too large."""
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if not found:
            raise
        return Memory(0, 0, int(float(found[1]) * _UNITS[found[2]]), 0, program.beside), None
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    known = m.argument_size_in_bytes + results
    # The fullest moment, where the backend tells it: the sum of all temporaries would overstate it.
    peak = m.peak_memory_in_bytes or known + m.temp_size_in_bytes
    return (
        Memory(m.argument_size_in_bytes, results, max(0, peak - known), m.generated_code_size_in_bytes, program.beside),
        compiled.as_text(),
    )


def _bytes_a_slot(experiment: Experiment, step: Step) -> int:
    r = experiment.rollout
    prompts = -(-experiment.training.prompts_per_step // num_batch_shards(step.setup.mesh, DECODING))
    memory = rollout_memory(
        step.setup.policy.config,
        experiment.policy.dtype,
        prompts=prompts,
        prompt_tokens=experiment.prompt.max_tokens,
        samples=r.samples_per_prompt,
        max_new_tokens=r.max_new_tokens,
        tensor=mesh_fields(step.setup.mesh)["rollout_tensor"],
    )
    return memory.per_slot
