"""What a compiled program moves: bytes of its device's memory, and of the network, loop bodies as often as they run.

Reads the text of optimised HLO. XLA's own cost analysis counts the body of a loop once, and says nothing of collectives.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
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
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A kind of collective among groups of `size` devices, which are in one host or not."""

    kind: str
    size: int
    in_host: bool


class Traffic(NamedTuple):
    """What one device moves.

    Attributes:
      memory: bytes read from and written to its memory, as if every instruction fetched its operands anew.
      sent: bytes that it sends, by collective, where rings pass them on; runs: how often each.
      guessed: loops whose number of turns is neither in the program nor known to the caller: counted once.
    """

    memory: float
    sent: Mapping[Collective, float]
    runs: Mapping[Collective, float]
    guessed: frozenset[str]


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, what: str) -> list[str]:
        """Names of the computations in attribute `what`."""
        found = re.search(rf"\b{what}=(\{{[^}}]*\}}|%\S+)", self.attributes)
        return re.findall(r"%([^\s,}]+)", found[1]) if found else []


_Computation = Mapping[str, _Instruction]


def traffic(text: str, turns: Mapping[str, Sequence[float]], hosts: Sequence[int]) -> Traffic:
    """Add up what the program of `text` moves.

    Args:
      text: optimised HLO, as `Compiled.as_text()` gives it.
      turns: of loops that end when the data say so, how often they go round, by the function that they are written in
        ("engine.decode_until") or by a part of the operation's name, which has a slash. Of several loops there, each has a
        number, and all that are left the last one.
      hosts: of each device of the mesh, in its order, the number of its host.
    """
    return _Reader(text, turns, hosts).total()


class _Reader:
    def __init__(self, text: str, turns: Mapping[str, Sequence[float]], hosts: Sequence[int]):
        self._computations: dict[str, _Computation] = dict(_computations(text))
        self._entry = re.search(r"^ENTRY %(\S+) ", text, re.MULTILINE)[1]
        self._hosts = hosts
        self._turns, self._guessed = self._turns_of_all(_functions(text), turns)

    def total(self) -> Traffic:
        memory, sent, runs = 0.0, collections.Counter(), collections.Counter()
        for weight, instruction, computation in self._run(self._entry, 1.0):
            memory += weight * self._moved(instruction, computation)
        for weight, instruction, computation in self._run(self._entry, 1.0, into_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                collective, size = self._sent(kind, instruction, computation)
                sent[collective] += weight * size
                runs[collective] += weight
        return Traffic(memory, sent, runs, frozenset(self._guessed))

    def _run(
        self, name: str, weight: float, into_fusions: bool = False
    ) -> Iterator[tuple[float, _Instruction, _Computation]]:
        """Every instruction that `name` comes to, with how often it runs."""
        computation = self._computations[name]
        for instruction in computation.values():
            yield weight, instruction, computation
            if instruction.opcode == "while":
                for part in ("condition", "body"):
                    turns = self._turns[instruction.name]
                    yield from self._run(instruction.called(part)[0], weight * turns, into_fusions)
            elif instruction.opcode == "conditional":
                branches = [
                    b
                    for part in ("branch_computations", "true_computation", "false_computation")
                    for b in instruction.called(part)
                ]
                yield from self._run(max(branches, key=lambda b: len(self._computations[b])), weight, into_fusions)
            elif instruction.opcode in ("call", "async-start") or (into_fusions and instruction.opcode == "fusion"):
                for called in instruction.called("to_apply") + instruction.called("calls"):
                    yield from self._run(called, weight, into_fusions)

    def _turns_of_all(
        self, functions: Mapping[int, str], known: Mapping[str, Sequence[float]]
    ) -> tuple[dict[str, float], set[str]]:
        """How often each loop goes round, by its name, and the functions of those of which nobody knows."""
        turns, guessed, met = {}, set(), collections.Counter()
        loops = [i for c in self._computations.values() for i in c.values() if i.opcode == "while"]
        for loop in loops:
            if (count := self._written_turns(loop)) is None:
                place = _place(loop, functions, known)
                if place not in known:
                    guessed.add(place)
                numbers = known.get(place, (1.0,))
                count = numbers[min(met[place], len(numbers) - 1)]
                met[place] += 1
            turns[loop.name] = count
        return turns, guessed

    def _written_turns(self, loop: _Instruction) -> float | None:
        """How often a loop goes round, where the compiler noted it, or its condition compares with a constant."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self._computations[loop.called("condition")[0]]
        root = next(i for i in condition.values() if i.is_root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            bound = condition[root.operands[1]]
            if bound.opcode == "constant":
                return int(re.search(r"constant\((\d+)\)", bound.attributes)[1])
        return None

    def _moved(self, instruction: _Instruction, computation: _Computation) -> float:
        """Bytes of memory that one instruction reads and writes."""
        code = instruction.opcode
        if code in _FREE or code in ("while", "conditional", "call", "async-start") or code.endswith("-done"):
            return 0
        if code == "fusion":
            called = instruction.called("calls")[0]
            inside = self._computations[called]
            parameters = [i for i in inside.values() if i.opcode == "parameter"]
            return sum(self._read(called, p.name) for p in parameters) + self._written(called)
        operands = [_bytes(computation[name].shape) for name in instruction.operands if name in computation]
        if code in ("dynamic-slice", "gather"):
            return 2 * _bytes(instruction.shape)
        if code in ("dynamic-update-slice", "scatter"):
            return 2 * operands[-1 if code == "scatter" else 1]
        return sum(operands) + (_bytes(instruction.shape) if not code.endswith("-start") else 0)

    @functools.cache  # noqa: B019 - a reader lives as long as its program's text is read.
    def _read(self, name: str, parameter: str) -> float:
        """Bytes that a fused computation reads of its parameter: slices of it, where it takes nothing else."""
        computation = self._computations[name]
        whole, total = _bytes(computation[parameter].shape), 0.0
        for user in computation.values():
            if parameter not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == parameter:
                total += _bytes(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(name, user.name)
            elif user.opcode == "fusion":
                inside = self._computations[user.called("calls")[0]]
                numbered = {p.attributes: p.name for p in inside.values() if p.opcode == "parameter"}
                for index, operand in enumerate(user.operands):
                    if operand == parameter:
                        total += self._read(user.called("calls")[0], numbered[f"parameter({index})"])
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
                return whole
        return min(whole, total)

    def _written(self, name: str) -> float:
        """Bytes that a fused computation writes: of an array that it changes a slice of, the slice."""
        computation = self._computations[name]
        waiting, total = [next(i for i in computation.values() if i.is_root)], 0.0
        while waiting:
            instruction = waiting.pop()
            if instruction.opcode in ("tuple", "bitcast"):
                waiting += [computation[operand] for operand in instruction.operands]
            elif instruction.opcode == "dynamic-update-slice":
                total += _bytes(computation[instruction.operands[1]].shape)
            elif instruction.opcode == "fusion":
                total += self._written(instruction.called("calls")[0])
            else:
                total += _bytes(instruction.shape)
        return total

    def _sent(self, kind: str, instruction: _Instruction, computation: _Computation) -> tuple[Collective, float]:
        size = sum(_bytes(computation[name].shape, everywhere=True) for name in instruction.operands)
        group = _group(instruction.attributes, len(self._hosts))
        n, in_host = len(group), len({self._hosts[device] for device in group}) == 1
        share = (n - 1) / n
        sent = {"all-gather": size * (n - 1), "all-reduce": 2 * size * share, "collective-permute": size}
        return Collective(kind, n, in_host), sent.get(kind, size * share)


def _place(loop: _Instruction, functions: Mapping[int, str], known: Mapping[str, Any]) -> str:
    """By what a loop is known: the function that it is written in or, where that was lost, a part of its operation's name."""
    frame = re.search(r"stack_frame_id=(\d+)", loop.attributes)
    function = functions.get(int(frame[1]), "?") if frame else "?"
    operation = re.search(r'op_name="([^"]*)"', loop.attributes)
    parts = [name for name in known if operation and "/" in name and name in operation[1]]
    return function if function in known or not parts else parts[0]


def _computations(text: str) -> Iterator[tuple[str, _Computation]]:
    name, instructions = "", {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, instructions = found[1], {}
        elif line == "}" and name:
            yield name, instructions
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(line[found.end() :], found[2], bool(found[1]))
            instructions[instruction.name] = instruction


def _instruction(rest: str, name: str, is_root: bool) -> _Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    # What is in the brackets of these says which parameter, or which number.
    keeps = rest[:opening] in ("parameter", "constant")
    attributes = rest[:closing] if keeps else rest[closing:]
    operands = () if keeps else tuple(re.findall(r"%([^\s,)]+)", rest[opening:closing]))
    return _Instruction(name, shape, rest[:opening], operands, attributes, is_root)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` has closed."""
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return opening + found.end()
    raise ValueError(text)


def _bytes(shape: str, everywhere: bool = False) -> float:
    """Bytes of an array, or of all in a tuple; unless `everywhere`, without those in a core's own memory, S(1) and above."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if everywhere or "S(" not in layout:
            bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
            total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _group(attributes: str, devices: int) -> list[int]:
    """Numbers of the devices in the first group of a collective, in whichever of HLO's three ways they are written."""
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
    """Read "[4,2]T(1,0)": numbers in order, turned."""
    dims = [int(d) for d in re.search(r"\[([0-9,]+)\]", text)[1].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    turned = re.search(r"T\(([0-9,]+)\)", text)
    return (ids.transpose([int(d) for d in turned[1].split(",")]) if turned else ids).reshape(-1)


def _functions(text: str) -> dict[int, str]:
    """For each stack frame the function that it is in, as "module.function"."""
    files = dict(re.findall(r'^(\d+) "[^"]*?([^"/]+)\.py"$', text, re.MULTILINE))
    head = text[: text.find("\n%")]
    names = dict(re.findall(r'^(\d+) "([^"]+)"$', head[head.find("FunctionNames") :], re.MULTILINE))
    locations = {
        n: (files.get(f), names.get(g))
        for n, f, g in re.findall(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", head, re.MULTILINE)
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", head, re.MULTILINE)
    return {int(frame): ".".join(map(str, locations[location])) for frame, location in frames if location in locations}
