"""Arithmetic traces: written calculations, digit by digit, for the toy task of configs/rpt_tiny.py.

    calculate   … he has 93 - 38 =  <think>93-38: 3-8-0=5b 9-3-1=5 55</think>\\boxed{55}

No other module depends on this one. It gives a small policy a skill that works in reasoning but not in a single forward pass.
Inside the result of a calculation, a trace calculates or recalls at random (`calculation_fraction`): the traces show how to
calculate, and the reward must teach when.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rpt_jax.config import PretrainConfig
from rpt_jax.errors import UserError
from rpt_jax.prompts.traces import RecallTraces
from rpt_jax.registry import TRACE_WRITERS
from rpt_jax.tokenizers.tokenizer import Tokenizer

# Matches operands joined by operators, then "=" and a result. Between them there may be a few words, a unit such as kg/cow or a
# currency sign.
_WORDS = r"(?:[^\d=+*/×\n.%-]|/(?=[a-z])){0,16}?"
_TERM = rf"{_WORDS}([-+*×x]|/(?![a-z])){_WORDS}(\d{{1,4}})(?![\d.,%])"
_CALCULATION = re.compile(rf"(?<![\d.,])(\d{{1,4}})((?:{_TERM})+){_WORDS}={_WORDS}(\d{{1,6}})(?![\d.,/]*\d)")
_ASCII = {"×": "*", "x": "*"}


class Calculation(NamedTuple):
    """A calculation written in a document.

    Attributes:
      numbers: the operands; two or more for a sum, otherwise two.
      operator: "+", "-", "*" or "/".
      result: the value of the calculation.
      start, end: the digits of the result are text[start:end].
    """

    numbers: tuple[int, ...]
    operator: str
    result: int
    start: int
    end: int


def find_calculations(text: str) -> Iterator[Calculation]:
    """Yield the whole-number calculations in `text` whose written result is correct.

    A chain of more than two operands counts as a whole only if it is a sum; otherwise only its last two operands are used.
    """
    for match in _CALCULATION.finditer(text):
        terms: list[tuple[str, str]] = re.findall(_TERM, match[2])
        numbers = [int(match[1]), *(int(number) for _, number in terms)]
        operators = [_ASCII.get(operator, operator) for operator, _ in terms]
        result = int(match[match.re.groups])
        if set(operators) != {"+"} or sum(numbers) != result:
            numbers = numbers[-2:]
            operators = operators[-1:]
        if _is_correct(numbers, operators[0], result):
            yield Calculation(
                numbers=tuple(numbers),
                operator=operators[0],
                result=result,
                start=match.start(match.re.groups),
                end=match.end(match.re.groups),
            )


def _is_correct(numbers: Sequence[int], operator: str, result: int) -> bool:
    if operator == "+":
        return sum(numbers) == result
    left, right = numbers
    if operator == "-":
        return left - right == result
    if operator == "*":
        return left * right == result
    return right > 0 and left == right * result


def work_out(numbers: Sequence[int], operator: str) -> str:
    """Return the steps of a calculation by the written method, units first (division: from the left).

    A step consists of digits, carry and result: `3-8-0=5b` reads "3 minus 8 minus borrow 0 is 5, borrow one". A sum of three
    or more numbers adds up each column, starting with the carry: `1+3=4+2=6`.
    """
    if len(numbers) > 2:
        steps = _add_columns(numbers)
    else:
        steps = {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[operator](*numbers)
    return f"{operator.join(map(str, numbers))}: {steps}"


def draw_similar(calculation: Calculation, rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """Draw another calculation of the same kind and the same numbers of digits, with a non-negative whole result.

    Returns: the operands and the operator.
    """
    numbers = tuple(_draw_similar_number(x, rng) for x in calculation.numbers)
    operator = calculation.operator
    if operator == "-":
        numbers = max(numbers), min(numbers)
    elif operator == "/":
        divisor = max(numbers[1], 1)
        numbers = divisor * _draw_similar_number(calculation.result, rng), divisor
    return numbers, operator


def _draw_similar_number(like: int, rng: np.random.Generator) -> int:
    digits = len(str(like))
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _digit_pairs(left: int, right: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of digits, units first, with the shorter number padded with zeros."""
    a = str(left)[::-1]
    b = str(right)[::-1]
    for i in range(max(len(a), len(b))):
        yield int(a[i]) if i < len(a) else 0, int(b[i]) if i < len(b) else 0


def _add(left: int, right: int) -> str:
    steps = []
    carry = 0
    for a, b in _digit_pairs(left, right):
        steps.append(f"{a}+{b}+{carry}={a + b + carry}")
        carry = (a + b + carry) // 10
    return " ".join([*steps, str(left + right)])


def _add_columns(numbers: Sequence[int]) -> str:
    steps = []
    carry = 0
    for column in itertools.zip_longest(*(str(number)[::-1] for number in numbers)):
        digits = [int(digit) for digit in column if digit is not None]
        # The units have no carry: their step starts with the first digit.
        total = carry if steps else digits.pop(0)
        step = f"{total}"
        for digit in digits:
            total += digit
            step += f"+{digit}={total}"
        steps.append(step)
        carry = total // 10
    return " ".join([*steps, str(sum(numbers))])


def _subtract(left: int, right: int) -> str:
    steps = []
    borrow = 0
    for a, b in _digit_pairs(left, right):
        difference = a - b - borrow
        steps.append(f"{a}-{b}-{borrow}={difference % 10}{'b' if difference < 0 else ''}")
        borrow = int(difference < 0)
    return " ".join([*steps, str(left - right)])


def _multiply(left: int, right: int) -> str:
    if right > left:
        left, right = right, left
    steps = []
    total = 0
    for place, b in enumerate(str(right)[::-1]):
        if b == "0":
            continue
        carry = 0
        for a in str(left)[::-1]:
            steps.append(f"{a}*{b}+{carry}={int(a) * int(b) + carry}")
            carry = (int(a) * int(b) + carry) // 10
        partial = left * int(b) * 10**place
        steps.append(str(partial))
        if total:
            steps.append(f"{total}+{partial}: {_add(total, partial)}")
        total += partial
    return " ".join(steps) if right else "0"


def _divide(left: int, right: int) -> str:
    steps = []
    remainder = 0
    for digit in str(left):
        remainder = 10 * remainder + int(digit)
        steps.append(f"{remainder}/{right}={remainder // right}r{remainder % right}")
        remainder %= right
    return " ".join([*steps, str(left // right)])


@dataclasses.dataclass(frozen=True)
class ArithmeticOptions:
    """Options of arithmetic traces (`pretrain.trace_options`)."""

    # Fraction of a document's traces that are placed inside the result of a calculation, if the document has any.
    calculation_position_fraction: float = 1 / 3
    # Fraction of the traces at those positions that write the calculation out; the others recall.
    calculation_fraction: float = 0.4
    # Number of calculations similar to the document's that are learned without the document.
    drills_per_window: int = 0

    def __post_init__(self) -> None:
        for name in ("calculation_position_fraction", "calculation_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                field = f"pretrain.trace_options.{name}"
                raise UserError(f"{field}={value} must be between 0 and 1.", field=field)
        if self.drills_per_window < 0:
            field = "pretrain.trace_options.drills_per_window"
            raise UserError(f"{field}={self.drills_per_window} must be at least 0.", field=field)


@TRACE_WRITERS.register("arithmetic", options=ArithmeticOptions)
class ArithmeticTraces(RecallTraces):
    """Traces that write calculations out inside their results, and recall elsewhere."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], config: PretrainConfig, max_tokens: int):
        super().__init__(tokenizer, ids, config, max_tokens)
        self._options = config.trace_options or ArithmeticOptions()
        self._bytes = tokenizer.token_bytes(ids)
        lengths = tokenizer.byte_vocab.lengths_V[np.asarray(self._ids, dtype=np.int64)]
        self._byte_offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Token position -> the calculation whose result it is inside of, and the byte offset where that result ends.
        self._calculations: dict[int, tuple[Calculation, int]] = {}
        # A window may begin or end inside a multi-byte character: surrogates keep the byte offsets exact.
        text = self._bytes.decode("utf-8", "surrogateescape")
        for calculation in find_calculations(text):
            start = len(text[: calculation.start].encode("utf-8", "surrogateescape"))
            end = len(text[: calculation.end].encode("utf-8", "surrogateescape"))
            inside = (self._byte_offsets[:-1] >= start) & (self._byte_offsets[:-1] < end)
            for position in np.flatnonzero(inside):
                self._calculations[int(position)] = (calculation, end)

    @property
    def preferred_positions(self) -> list[int]:
        """Token positions inside the result of a calculation."""
        return sorted(self._calculations)

    @property
    def preferred_fraction(self) -> float:
        """Fraction of the traces placed inside the result of a calculation, if there is one."""
        return self._options.calculation_position_fraction

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the token ids of a response that reasons at `position` and boxes the true continuation.

        A calculation longer than the length limit is not written out: the trace recalls instead.
        """
        if position in self._calculations and rng.random() < self._options.calculation_fraction:
            trace = self._calculate(position)
            if len(trace) <= self._max_tokens:
                return trace
        return super().write(position, rng)

    def drills(self, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """Return calculations similar to the document's, each as response ids and the number of ids that state it.

        Drills cover numbers that are rare in documents: one wrong digit makes a whole calculation wrong.
        """
        if not self._calculations:
            return []
        return [self._drill(rng) for _ in range(self._options.drills_per_window)]

    def _drill(self, rng: np.random.Generator) -> tuple[list[int], int]:
        calculation, _ = self._calculations[int(rng.choice(self.preferred_positions))]
        steps = work_out(*draw_similar(calculation, rng))
        question = self._tokenizer.encode(steps.split(" ")[0])
        result = self._tokenizer.encode(steps.split(" ")[-1])
        return self.format_response(self._tokenizer.encode(steps), result), len(question)

    def _calculate(self, position: int) -> list[int]:
        calculation, end = self._calculations[position]
        steps = work_out(calculation.numbers, calculation.operator)
        rest_of_result = self._bytes[self._byte_offsets[position] : end].decode()
        return self.format_response(self._tokenizer.encode(steps), self._tokenizer.encode(rest_of_result))
