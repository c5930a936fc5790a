"""Memory and network traffic of a compiled program, read from its HLO text.

This is a text parser because XLA's own `Compiled.cost_analysis()` counts the body of a loop once, however often it runs, and
says nothing about collectives. HLO text is not a stable format: this parser was checked against the text of jax 0.10.2 on CPUs
and of libtpu 0.0.42.1.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
# Instructions that move no data.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "opt-barrier",
}
# Instructions of which an element of the result needs one element of the operand.
_ELEMENT_BY_ELEMENT = {"bitcast", "convert", "copy", "pad", "reshape", "transpose"}
# Instructions that read a part of their first operand, as large as the result.
_SLICES = {"slice", "dynamic-slice", "gather"}
# Instructions that write a part of their first operand in place, and the operand that they write.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
# Instructions whose traffic is that of the computations they call.
_CALLS = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A kind of collective among groups of `size` devices, each within one host or not."""

    kind: str
    size: int
    in_host: bool


class Source(NamedTuple):
    """The memory traffic of all instructions of a kind that come from one place in the program.

    Attributes:
      scope: their path of named scopes and primitives, `op_name` in the HLO metadata.
      opcode: HLO opcode.
      runs: how often they run, in sum.
      memory: bytes read from and written to device memory.
    """

    scope: str
    opcode: str
    runs: float
    memory: float


class Traffic(NamedTuple):
    """Data that one device moves while a program runs.

    Attributes:
      memory: bytes read from and written to device memory, assuming that every instruction reads its operands from there.
      sources: where in the program these bytes come from, the largest first.
      sent: bytes sent to other devices by each collective, with ring algorithms.
      runs: how often each collective runs.
      unknown_loops: names of loops without a known trip count, which are counted once.
    """

    memory: float
    sources: tuple[Source, ...]
    sent: Mapping[Collective, float]
    runs: Mapping[Collective, float]
    unknown_loops: frozenset[str]


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of scopes and primitives in the metadata; "" without metadata."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations in `attribute`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%\S+)", self.attributes)
        return re.findall(r"%([^\s,}]+)", found[1]) if found else []


_Computation = Mapping[str, _Instruction]


def traffic(
    text: str,
    trip_counts: Mapping[str, Sequence[float]],
    hosts: Sequence[int],
    kernel_bytes: Mapping[str, Callable[[int], float]] | None = None,
) -> Traffic:
    """Add up the traffic of a compiled program.

    Args:
      text: optimized HLO, as returned by `Compiled.as_text()`.
      trip_counts: trip counts of loops whose end depends on the data, by the `jax.named_scope` around them (see
        `loop_scope`). The n-th loop of a scope has the n-th count; the last count holds for all further loops.
      hosts: host number of each device of the mesh, in mesh order.
      kernel_bytes: functions that map the number of rows of a kernel call, the first axis of its results, to the bytes that it
        reads and writes, by its name in `pallas_call`; arrays in on-chip memory are subtracted. A kernel that is not listed is
        counted as if it read each operand and wrote each result once.
    """
    return _Reader(text, trip_counts, hosts, kernel_bytes or {}).total()


def loop_scope(op_name: str, scopes: Mapping[str, object] | Sequence[str]) -> str | None:
    """Return the one of `scopes` that is directly around a loop, None if none of them is.

    Args:
      op_name: the loop's `op_name` in the HLO metadata, a path of scopes and primitives such as
        "jit(f)/decode_loop/while/body/transpose(jvp(key_blocks))/while".
      scopes: names of scopes.
    """
    components = op_name.split("/")
    for index in reversed(range(len(components))):
        # Transformations wrap the name: "transpose(jvp(key_blocks))".
        name = (re.findall(r"[^()]+", components[index]) or [""])[-1]
        if name in scopes:
            # A loop in the body of the scope's own loop is another one.
            return name if components[index + 1 :].count("while") <= 1 else None
    return None


class _Reader:
    """Walks the computations of a program from its entry and adds up the traffic of their instructions."""

    def __init__(
        self,
        text: str,
        trip_counts: Mapping[str, Sequence[float]],
        hosts: Sequence[int],
        kernel_bytes: Mapping[str, Callable[[int], float]],
    ):
        entry = re.search(r"^ENTRY %(\S+) ", text, re.MULTILINE)
        if entry is None:
            raise ValueError("The HLO text has no ENTRY computation.")
        self._entry = entry[1]
        self._computations: dict[str, _Computation] = dict(_computations(text))
        self._hosts = hosts
        self._kernel_bytes = kernel_bytes
        self._trip_counts, self._unknown_loops = self._count_trips(trip_counts)

    def total(self) -> Traffic:
        """Return the traffic of the whole program."""
        sources: dict[tuple[str, str], Source] = {}
        for count, instruction, computation in self._executed(self._entry, 1.0):
            if moved := self._memory_bytes(instruction, computation):
                key = instruction.op_name, instruction.opcode
                source = sources.get(key, Source(*key, runs=0.0, memory=0.0))
                sources[key] = source._replace(runs=source.runs + count, memory=source.memory + count * moved)
        sent: dict[Collective, float] = collections.defaultdict(float)
        runs: dict[Collective, float] = collections.defaultdict(float)
        for count, instruction, computation in self._executed(self._entry, 1.0, into_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                collective, size = self._sent_bytes(kind, instruction, computation)
                sent[collective] += count * size
                runs[collective] += count
        return Traffic(
            memory=sum(source.memory for source in sources.values()),
            sources=tuple(sorted(sources.values(), key=lambda source: -source.memory)),
            sent=dict(sent),
            runs=dict(runs),
            unknown_loops=frozenset(self._unknown_loops),
        )

    def _executed(
        self, name: str, count: float, into_fusions: bool = False
    ) -> Iterator[tuple[float, _Instruction, _Computation]]:
        """Yield every instruction that computation `name` executes, and how often if `name` itself runs `count` times."""
        computation = self._computations[name]
        for instruction in computation.values():
            yield count, instruction, computation
            if instruction.opcode == "while":
                trips = self._trip_counts[instruction.name]
                for part in ("condition", "body"):
                    yield from self._executed(instruction.called(part)[0], count * trips, into_fusions)
            elif instruction.opcode == "conditional":
                branches = [
                    branch
                    for part in ("branch_computations", "true_computation", "false_computation")
                    for branch in instruction.called(part)
                ]
                # The longest branch stands for all of them.
                longest = max(branches, key=lambda branch: len(self._computations[branch]))
                yield from self._executed(longest, count, into_fusions)
            elif instruction.opcode in ("call", "async-start") or (into_fusions and instruction.opcode == "fusion"):
                for called in instruction.called("to_apply") + instruction.called("calls"):
                    yield from self._executed(called, count, into_fusions)

    def _count_trips(self, known: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], set[str]]:
        """Return the trip count of each loop by its name, and the op_names of those without a known count."""
        counts: dict[str, float] = {}
        unknown: set[str] = set()
        seen: collections.Counter[str] = collections.Counter()
        loops = [i for c in self._computations.values() for i in c.values() if i.opcode == "while"]
        for loop in loops:
            count = self._static_trip_count(loop)
            if count is None:
                op_name = loop.op_name or loop.name
                scope = loop_scope(op_name, known)
                if scope is None:
                    unknown.add(op_name)
                    count = 1.0
                else:
                    numbers = known[scope]
                    count = numbers[min(seen[scope], len(numbers) - 1)]
                    seen[scope] += 1
            counts[loop.name] = count
        return counts, unknown

    def _static_trip_count(self, loop: _Instruction) -> float | None:
        """Return the trip count that the compiler noted, or the constant that the loop's counter is compared with."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self._computations[loop.called("condition")[0]]
        root = next(i for i in condition.values() if i.is_root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            bound = condition[root.operands[1]]
            constant = re.search(r"constant\((\d+)\)", bound.attributes)
            if bound.opcode == "constant" and constant:
                return int(constant[1])
        return None

    def _memory_bytes(self, instruction: _Instruction, computation: _Computation) -> float:
        """Return the bytes of memory that one instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode in _CALLS:
            return 0
        if opcode == "fusion":
            called = instruction.called("calls")[0]
            parameters = [i for i in self._computations[called].values() if i.opcode == "parameter"]
            sizes = {parameter.name: _bytes(parameter.shape) for parameter in parameters}
            read = sum(size * self._part_read(called, name) for name, size in sizes.items() if size)
            return read + self._bytes_written(called)
        if opcode == "custom-call":
            # The kernel's name is a component of the op_name: "jit(f)/transpose(jvp(NAME))/pallas_call".
            for component in re.findall(r"\w+", instruction.op_name):
                if component in self._kernel_bytes:
                    rows = int(_ARRAY.findall(instruction.shape)[0][1].split(",")[0])
                    operands = {name: computation[name].shape for name in instruction.operands if name in computation}
                    # Only the kernel's indices are integers.
                    shapes = [s for s in (instruction.shape, *operands.values()) if not s.startswith(("s32", "u32"))]
                    on_chip = sum(_bytes(shape, on_chip=True) - _bytes(shape) for shape in shapes)
                    return max(0, self._kernel_bytes[component](rows) - on_chip)
        written = _bytes(instruction.shape)
        shapes = [computation[name].shape for name in instruction.operands if name in computation]
        if opcode in _SLICES:
            return _bytes_of_part(shapes[0], instruction.shape) + written
        if opcode in _UPDATES:
            update = shapes[_UPDATES[opcode]]
            return _bytes(update) + _bytes_of_part(instruction.shape, update)
        if opcode == "slice-start":
            _, part, *_ = (found[0] for found in _ARRAY.finditer(instruction.shape))  # The first one is the operand.
            return _bytes_of_part(shapes[0], part)
        # An asynchronous instruction reads when it starts, and has written when it is done.
        if opcode.endswith("-done"):
            return written
        return sum(map(_bytes, shapes)) + (0 if opcode.endswith("-start") else written)

    @functools.cache  # noqa: B019 - a reader is discarded after one program.
    def _part_read(self, name: str, array: str) -> float:
        """Return the part of an array that a fused computation reads: that of its slices, if nothing else is used."""
        computation = self._computations[name]
        if computation[array].is_root:
            return 1.0
        part = 0.0
        for user in computation.values():
            if array not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == array:
                part += _bytes(user.shape, on_chip=True) / _bytes(computation[array].shape, on_chip=True)
            elif user.opcode in _ELEMENT_BY_ELEMENT:
                part += self._part_read(name, user.name)
            elif user.opcode == "fusion":
                called = user.called("calls")[0]
                for index, operand in enumerate(user.operands):
                    if operand == array:
                        parameter = self._parameter(called, index)
                        is_passed_on = self._alias(called) == parameter
                        part += self._part_read(name, user.name) if is_passed_on else self._part_read(called, parameter)
            elif user.opcode not in _UPDATES or user.operands[0] != array:
                return 1.0
        return min(1.0, part)

    def _parameter(self, name: str, number: int) -> str:
        """Return the name of a parameter of a computation."""
        return next(i.name for i in self._computations[name].values() if i.attributes == f"parameter({number})")

    def _alias(self, name: str) -> str:
        """Return the instruction whose array a fused computation returns, maybe in another shape."""
        computation = self._computations[name]
        result = next(i for i in computation.values() if i.is_root)
        while result.opcode == "bitcast":
            result = computation[result.operands[0]]
        return result.name

    def _bytes_written(self, name: str) -> float:
        """Return the bytes that a fused computation writes: only the slice, if it updates a slice of an array in place."""
        computation = self._computations[name]
        pending = [next(i for i in computation.values() if i.is_root)]
        total = 0.0
        while pending:
            instruction = pending.pop()
            if instruction.opcode in ("tuple", "bitcast"):
                pending += [computation[operand] for operand in instruction.operands]
            elif instruction.opcode in _UPDATES:
                update = computation[instruction.operands[_UPDATES[instruction.opcode]]]
                total += _bytes_of_part(instruction.shape, update.shape)
            elif instruction.opcode == "fusion":
                total += self._bytes_written(instruction.called("calls")[0])
            else:
                total += _bytes(instruction.shape)
        return total

    def _sent_bytes(self, kind: str, instruction: _Instruction, computation: _Computation) -> tuple[Collective, float]:
        """Return a collective, and the bytes that each device sends for it with a ring algorithm."""
        size = sum(_bytes(computation[name].shape, on_chip=True) for name in instruction.operands)
        group = first_group(instruction.attributes, len(self._hosts))
        n = len(group)
        in_host = len({self._hosts[device] for device in group}) == 1
        sent = {
            "all-gather": size * (n - 1),
            "all-reduce": 2 * size * (n - 1) / n,
            "collective-permute": size,
        }
        return Collective(kind=kind, size=n, in_host=in_host), sent.get(kind, size * (n - 1) / n)


def _computations(text: str) -> Iterator[tuple[str, _Computation]]:
    """Yield the name and the instructions of each computation."""
    name = ""
    instructions: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            instructions = {}
        elif line == "}" and name:
            yield name, instructions
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(line[found.end() :], found[2], bool(found[1]))
            instructions[instruction.name] = instruction


def _instruction(text: str, name: str, is_root: bool) -> _Instruction:
    """Parse the right-hand side of an instruction: its shape, opcode, operands and attributes."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape = text[:end]
    text = text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    opcode = text[:opening]
    # The parentheses of these hold a parameter's number or a constant's value instead of operands.
    has_operands = opcode not in ("parameter", "constant")
    return _Instruction(
        name=name,
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([^\s,)]+)", text[opening:closing])) if has_operands else (),
        attributes=text[closing:] if has_operands else text[:closing],
        is_root=is_root,
    )


def _closing(text: str, opening: int) -> int:
    """Return the index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return opening + found.end()
    raise ValueError(text)


def _bytes(shape: str, on_chip: bool = False) -> float:
    """Return the bytes of an array or of all arrays of a tuple.

    Args:
      shape: as in HLO, such as "f32[4,16]{1,0}".
      on_chip: whether to count arrays in on-chip memory too: those in memory space S(1) and above.
    """
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if on_chip or "S(" not in layout:
            bits = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
            total += bits / 8 * _numbers_in_tiles([int(d) for d in dims.split(",") if d], layout)
    return total


def _numbers_in_tiles(dims: Sequence[int], layout: str) -> int:
    """Return how many numbers an array takes in memory, with its tiles filled up.

    Args:
      dims: dimensions of the array.
      layout: as in HLO, such as "{0,1:T(8,128)(2,1)}": dimensions from the minor to the major one, then the tiles of the minor
        ones. Further tiles divide the first one without padding.
    """
    found = re.match(r"\{([0-9,]+):T\(([0-9,]+)\)", layout)
    if found is None:
        return math.prod(dims)
    minor_to_major, tile = ([int(n) for n in numbers.split(",")] for numbers in found.groups())
    padded = list(dims)
    for dim, size in zip(minor_to_major, reversed(tile), strict=False):
        padded[dim] = -(-dims[dim] // size) * size
    return math.prod(padded)


def _bytes_of_part(whole: str, part: str) -> float:
    """Return the bytes of a part of an array that are read from or written to memory: none if the array is on the chip."""
    return _bytes(part, on_chip=True) if _bytes(whole) else 0.0


def first_group(attributes: str, devices: int) -> list[int]:
    """Return the devices of the first group of a collective, from any of the three notations of HLO.

    Args:
      attributes: the instruction's attributes, with `replica_groups` or `source_target_pairs`.
      devices: number of devices of the program; all of them form one group if the attributes name none.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = [list(axes).index(name) for name in re.findall(r"'([^']+)'", found[3])]
        order = re.search(r"device_ids=\(([^)]*\)?)\)", found[2])
        ids = _iota(order[1]) if order else np.arange(math.prod(axes.values()))
        grid = np.moveaxis(ids.reshape(tuple(axes.values())), chosen, range(-len(chosen), 0))
        return grid.reshape(-1, math.prod(grid.shape[-len(chosen) :]))[0].tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:, |$)", attributes):
        return _iota(found[3]).reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([0-9,]+)\}", attributes):
        return [int(number) for number in found[1].split(",")]
    return list(range(devices))


def _iota(text: str) -> np.ndarray:
    """Return the flat array of an iota with a transposition, such as "[4,2]T(1,0)"."""
    dims = [int(d) for d in re.findall(r"\[([0-9,]+)\]", text)[0].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    transposed = re.search(r"T\(([0-9,]+)\)", text)
    return (ids.transpose([int(d) for d in transposed[1].split(",")]) if transposed else ids).reshape(-1)
