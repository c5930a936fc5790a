"""Cold-start traces: what next-token reasoning looks like, for a policy that has never seen it.

A reasoning model is where the paper starts; a small base policy must first be shown the format. Two kinds of reasoning are
shown, in the policy's own token ids:

    recall      … he has 93 - 38 =  <think>93 - 38 = </think>\\boxed{5}
    calculate   … he has 93 - 38 =  <think>93-38: 3-8-0=5b 9-3-1=5 55</think>\\boxed{55}

Recall repeats the end of the context and predicts. Calculation carries the written expression out digit by digit, which a
single forward pass cannot. Where a calculation is due, the kind is drawn at random (`calculation_fraction`): the traces show
how to calculate, not that it pays. Finding that out is left to the reward.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rpt_jax.tokenizers.tokenizer import END_THINK, Tokenizer

BOX = "\\boxed{"

# Operands with operators between them, "=", result; a few words, units such as kg/cow or a currency sign may stand in between.
_WORDS = r"(?:[^\d=+*/×\n.%-]|/(?=[a-z])){0,16}?"
_TERM = rf"{_WORDS}([-+*×x]|/(?![a-z])){_WORDS}(\d{{1,4}})(?![\d.,%])"
_CALCULATION = re.compile(rf"(?<![\d.,])(\d{{1,4}})((?:{_TERM})+){_WORDS}={_WORDS}(\d{{1,6}})(?![\d.,/]*\d)")
_ASCII = {"×": "*", "x": "*"}


class Calculation(NamedTuple):
    """`numbers` with `operator` between them are `result`, as written in a document; its digits are text[start:end].

    Sums have two numbers or more, everything else has two.
    """

    numbers: tuple[int, ...]
    operator: str
    result: int
    start: int
    end: int


def find_calculations(text: str) -> Iterator[Calculation]:
    """Yield the whole-number calculations in `text` whose written result is right.

    Of what is neither a sum nor has two numbers, the last two alone are looked at.
    """
    for match in _CALCULATION.finditer(text):
        terms = re.findall(_TERM, match[2])
        numbers = [int(match[1]), *(int(number) for _, number in terms)]
        operators = [_ASCII.get(operator, operator) for operator, _ in terms]
        result = int(match[match.re.groups])
        if set(operators) != {"+"} or sum(numbers) != result:
            numbers, operators = numbers[-2:], operators[-1:]
        if _holds(numbers, operators[0], result):
            yield Calculation(tuple(numbers), operators[0], result, *match.span(match.re.groups))


def _holds(numbers: Sequence[int], operator: str, result: int) -> bool:
    if operator == "+":
        return sum(numbers) == result
    left, right = numbers
    if operator == "-":
        return left - right == result
    if operator == "*":
        return left * right == result
    return right > 0 and left == right * result


def work_out(numbers: Sequence[int], operator: str) -> str:
    """Carry a calculation out by the written method, units first (division: from the left).

    Each step is digits, carry and result: `3-8-0=5b` reads "3 minus 8 minus borrow 0 is 5, borrow one". A longer sum goes
    down each column, beginning with what is carried: `1+3=4+2=6`.
    """
    if len(numbers) > 2:
        steps = _add_columns(numbers)
    else:
        steps = {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[operator](*numbers)
    return f"{operator.join(map(str, numbers))}: {steps}"


def similar(calculation: Calculation, rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """Draw another calculation of the same kind: numbers of as many digits, and a whole result that is not negative."""
    numbers, operator = tuple(_number(x, rng) for x in calculation.numbers), calculation.operator
    if operator == "-":
        numbers = max(numbers), min(numbers)
    elif operator == "/":
        right = max(numbers[1], 1)
        numbers = right * _number(calculation.result, rng), right
    return numbers, operator


def _number(like: int, rng: np.random.Generator) -> int:
    digits = len(str(like))
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _digits(left: int, right: int) -> Iterator[tuple[int, int]]:
    """Pairs of digits, units first, the shorter number filled up with zeros."""
    a, b = str(left)[::-1], str(right)[::-1]
    for i in range(max(len(a), len(b))):
        yield int(a[i]) if i < len(a) else 0, int(b[i]) if i < len(b) else 0


def _add(left: int, right: int) -> str:
    steps, carry = [], 0
    for a, b in _digits(left, right):
        steps.append(f"{a}+{b}+{carry}={a + b + carry}")
        carry = (a + b + carry) // 10
    return " ".join([*steps, str(left + right)])


def _add_columns(numbers: Sequence[int]) -> str:
    steps, carry = [], 0
    for column in itertools.zip_longest(*(str(number)[::-1] for number in numbers)):
        digits = [int(digit) for digit in column if digit is not None]
        # Nothing is carried into the units: they begin with a digit.
        total = carry if steps else digits.pop(0)
        step = f"{total}"
        for digit in digits:
            total += digit
            step += f"+{digit}={total}"
        steps.append(step)
        carry = total // 10
    return " ".join([*steps, str(sum(numbers))])


def _subtract(left: int, right: int) -> str:
    steps, borrow = [], 0
    for a, b in _digits(left, right):
        difference = a - b - borrow
        steps.append(f"{a}-{b}-{borrow}={difference % 10}{'b' if difference < 0 else ''}")
        borrow = int(difference < 0)
    return " ".join([*steps, str(left - right)])


def _multiply(left: int, right: int) -> str:
    if right > left:
        left, right = right, left
    steps, total = [], 0
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
    steps, rest = [], 0
    for digit in str(left):
        rest = 10 * rest + int(digit)
        steps.append(f"{rest}/{right}={rest // right}r{rest % right}")
        rest %= right
    return " ".join([*steps, str(left // right)])


class TraceWriter:
    """Writes the reasoning and the boxed prediction for positions of one document."""

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], calculation_fraction: float, max_tokens: int, recalled: int = 4
    ):
        """`ids` are the document's; `max_tokens` bounds a trace (longer calculations are recalled).

        `recalled` is how many tokens of context a recall repeats.
        """
        self._tokenizer, self._ids, self._bytes = tokenizer, list(ids), tokenizer.token_bytes(ids)
        self._share, self._max_tokens, self._recalled = calculation_fraction, max_tokens, recalled
        lengths = tokenizer.byte_vocab.lengths_V[np.asarray(self._ids, dtype=np.int64)]
        self._byte_offsets = np.concatenate([[0], np.cumsum(lengths)])
        self._calculations = {}
        # A window of a document may begin and end inside of a character.
        text = self._bytes.decode("utf-8", "surrogateescape")
        for calculation in find_calculations(text):
            start, end = (
                len(text[:i].encode("utf-8", "surrogateescape")) for i in (calculation.start, calculation.end)
            )
            for position in np.flatnonzero((self._byte_offsets[:-1] >= start) & (self._byte_offsets[:-1] < end)):
                self._calculations[int(position)] = (calculation, end)

    @property
    def calculation_positions(self) -> list[int]:
        """Token positions inside the result of a calculation."""
        return sorted(self._calculations)

    def can_box(self, position: int) -> bool:
        """Whether a box around token `position` reads as that token: the last opening of a box is the one that counts."""
        return BOX.encode() not in self._tokenizer.token_bytes([self._ids[position]])

    def write(self, position: int, rng: np.random.Generator) -> list[int]:
        """Return the response ids that reason at `position` and box the true continuation."""
        if position in self._calculations and rng.random() < self._share:
            trace = self._calculate(position)
            if len(trace) <= self._max_tokens:
                return trace
        return self._recall(position)

    def drill(self, rng: np.random.Generator) -> tuple[list[int], int] | None:
        """Return the response ids of a calculation like one of the document's, and how many of them pose it.

        None where the document has no calculation. Documents use some numbers often and others never, and one wrong digit
        spoils a whole calculation.
        """
        if not self._calculations:
            return None
        steps = work_out(*similar(self._calculations[int(rng.choice(self.calculation_positions))][0], rng))
        question, result = (self._tokenizer.encode(x) for x in (steps.split(" ")[0], steps.split(" ")[-1]))
        return self._close(self._tokenizer.encode(steps), result), len(question)

    def _calculate(self, position: int) -> list[int]:
        calculation, end = self._calculations[position]
        steps = work_out(calculation.numbers, calculation.operator)
        rest = self._bytes[self._byte_offsets[position] : end].decode()
        return self._close(self._tokenizer.encode(steps), self._tokenizer.encode(rest))

    def _recall(self, position: int) -> list[int]:
        return self._close(self._ids[max(0, position - self._recalled) : position], [self._ids[position]])

    def _close(self, reasoning: list[int], prediction: list[int]) -> list[int]:
        t = self._tokenizer
        end_think = [t.end_think_id] if t.end_think_id >= 0 else t.encode(END_THINK)
        return [*reasoning, *end_think, *t.encode(BOX), *prediction, *t.encode("}"), t.eos_id]
