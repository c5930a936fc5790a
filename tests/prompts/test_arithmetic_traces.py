"""Written arithmetic: finding calculations in text, carrying them out, and the traces made of them."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.errors import UserError
from rpt_jax.prompts.arithmetic_traces import (
    ArithmeticOptions,
    Calculation,
    draw_similar,
    find_calculations,
    work_out,
)
from rpt_jax.tokenizers.tokenizer import Tokenizer
from tests.helpers.traces import arithmetic_traces, split_trace

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def check_long_sum(text: str, left: int, right: int, sign: int) -> int:
    """Check column addition or subtraction step by step; return the number that its steps spell."""
    columns, carry, digits = max(len(str(left)), len(str(right))), 0, ""
    steps = text.split()
    assert len(steps) == columns + 1
    for place, step in enumerate(steps[:-1]):
        a, b, carried, result, borrowed = re.fullmatch(r"(\d)[+-](\d)[+-](\d)=(\d+)(b?)", step).groups()
        assert (int(a), int(b)) == (left // 10**place % 10, right // 10**place % 10) and int(carried) == carry
        exact = int(a) + sign * (int(b) + int(carried))
        if sign > 0:
            assert exact == int(result) and not borrowed
            carry = exact // 10
        else:
            assert int(result) == exact + 10 * bool(borrowed) and 0 <= int(result) < 10
            carry = int(bool(borrowed))
        digits = result[-1] + digits
    if sign < 0:
        assert carry == 0
    spelled = int((str(carry) if carry else "") + digits)
    assert steps[-1] == str(spelled)
    return spelled


def check_long_product(text: str, left: int, right: int) -> int:
    """Check written multiplication step by step: digits, carries, partial products and their running sum."""
    left, right = max(left, right), min(left, right)
    if right == 0:
        assert text == "0"
        return 0
    rest, total = text.split(), 0
    for place in (p for p in range(len(str(right))) if right // 10**p % 10):
        carry, digits = 0, ""
        for column in range(len(str(left))):
            a, b, carried, result = map(int, re.fullmatch(r"(\d)\*(\d)\+(\d)=(\d+)", rest.pop(0)).groups())
            assert (a, b, carried) == (left // 10**column % 10, right // 10**place % 10, carry)
            assert result == a * b + carry
            carry, digits = result // 10, str(result % 10) + digits
        partial = int(str(carry) + digits) * 10**place
        assert rest.pop(0) == str(partial)
        if total:
            assert rest.pop(0) == f"{total}+{partial}:"
            length = max(len(str(total)), len(str(partial))) + 1
            assert check_long_sum(" ".join(rest[:length]), total, partial, +1) == total + partial
            rest = rest[length:]
        total += partial
    assert not rest
    return total


def check_long_quotient(text: str, left: int, right: int) -> int:
    """Check long division step by step: every digit brought down, its quotient digit and its remainder."""
    *steps, result = text.split()
    rest, digits = 0, ""
    for digit, step in zip(str(left), steps, strict=True):
        dividend, divisor, quotient, remainder = map(int, re.fullmatch(r"(\d+)/(\d+)=(\d+)r(\d+)", step).groups())
        assert dividend == 10 * rest + int(digit) and divisor == right
        assert quotient * right + remainder == dividend and 0 <= remainder < right
        rest, digits = remainder, digits + str(quotient)
    assert rest == 0 and int(digits) == int(result)
    return int(result)


def check_work(left: int, sign: str, right: int) -> None:
    """Check every step of a calculation with two operands, and its result."""
    heading, _, steps = work_out((left, right), sign).partition(": ")
    assert heading == f"{left}{sign}{right}"
    if sign in "+-":
        result = check_long_sum(steps, left, right, 1 if sign == "+" else -1)
    else:
        result = (check_long_product if sign == "*" else check_long_quotient)(steps, left, right)
    assert result == OPERATORS[sign](left, right)


operands = st.one_of(st.integers(0, 12), st.integers(0, 9999))


@given(st.sampled_from("+-*/"), operands, operands)
@settings(deadline=None, max_examples=500)
def test_every_written_step_is_correct(sign: str, left: int, right: int) -> None:
    if sign == "-":
        left, right = max(left, right), min(left, right)
    if sign == "/":
        right = max(right, 1)
        left *= right
    check_work(left, sign, right)


@given(st.sampled_from("+-*/"), operands, operands, st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_similar_calculations_have_whole_results_and_as_many_digits(
    sign: str, left: int, right: int, seed: int
) -> None:
    result = left if sign == "/" else 0
    (first, second), other = draw_similar(
        Calculation(numbers=(left, right), operator=sign, result=result, start=0, end=0), np.random.default_rng(seed)
    )
    assert other == sign
    check_work(first, sign, second)
    if sign == "/":
        assert len(str(second)) == len(str(right)) and len(str(first // second)) == len(str(result))
    else:
        assert sorted((len(str(first)), len(str(second)))) == sorted((len(str(left)), len(str(right))))


def test_the_format_of_written_steps() -> None:
    assert work_out((93, 38), "-") == "93-38: 3-8-0=5b 9-3-1=5 55"
    assert work_out((8, 95), "+") == "8+95: 8+5+0=13 0+9+1=10 103"
    product = "4*2+0=8 3*2+0=6 68 4*1+0=4 3*1+0=3 340 68+340: 8+0+0=8 6+4+0=10 0+3+1=4 408"
    assert work_out((12, 34), "*") == f"12*34: {product}"
    assert work_out((3, 9, 14), "+") == "3+9+14: 3+9=12+4=16 1+1=2 26"
    assert work_out((84, 7), "/") == "84/7: 8/7=1r1 14/7=2r0 12"


@given(
    st.sampled_from("+-*/x×"),
    operands,
    operands,
    st.sampled_from(["", " ", " $", " apples ", " kg/cow "]),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_calculations_are_found_if_their_result_is_correct(
    sign: str, left: int, right: int, between: str, correct: bool
) -> None:
    arithmetic = {"x": "*", "×": "*"}.get(sign, sign)
    if arithmetic == "/":
        right = max(right, 1)
        left = left // right * right
    result = OPERATORS[arithmetic](left, right) + (not correct)
    text = f"Now {left}{between}{sign}{between}{right}{between}={between}{result} remain."
    found = list(find_calculations(text))
    if not correct or result < 0 or result >= 10**6:
        assert found == []
    else:
        [calculation] = found
        assert calculation[:3] == ((left, right), arithmetic, result)
        assert text[calculation.start : calculation.end] == str(result)
        assert text[: calculation.start].endswith(f"={between}")


@pytest.mark.parametrize(
    "text",
    ["1,234 + 5 = 239", "3.5 + 2 = 7", "2 + 2 = 4.5", "2 + 2 = 4,000", "10 / 0 = 0", "7 / 2 = 3", "10 + 5% = 15",
     "3 +\n4 = 7", "3 + 4 == 7", "1/2 + 1/2 = 1", "20 - 5 = 15/3"],
)  # fmt: skip
def test_other_expressions_are_not_found(text: str) -> None:
    assert list(find_calculations(text)) == []


def test_several_calculations_in_a_line_are_found() -> None:
    text = "He paid 3 * $4 = $12, so 20 - 12 = 8 and 8 - 12 = -4."
    assert [calculation[:3] for calculation in find_calculations(text)] == [((3, 4), "*", 12), ((20, 12), "-", 8)]


def test_a_chain_that_is_not_a_sum_counts_by_its_last_two_operands() -> None:
    text = "With 2 * 3 + 4 = 7 and 9 - 5 - 4 = 1 and 1 + 9 + 3 = 12."
    assert [calculation[:3] for calculation in find_calculations(text)] == [
        ((3, 4), "+", 7),
        ((5, 4), "-", 1),
        ((9, 3), "+", 12),
    ]


def check_column_sum(text: str, numbers: tuple[int, ...]) -> None:
    """Check that every column adds up its digits, starting with the carry of the previous one, and check the result."""
    *columns, result = text.split()
    assert int(result) == sum(numbers) and len(columns) == max(len(str(number)) for number in numbers)
    carry = None
    for place, column in enumerate(columns):
        total, *steps = re.split(r"\+", column)
        running, seen = int(total), [] if place else [int(total)]
        assert place == 0 or running == carry
        for step in steps:
            digit, after = map(int, step.split("="))
            running += digit
            assert after == running
            seen.append(digit)
        assert seen == [int(str(n)[::-1][place]) for n in numbers if len(str(n)) > place]
        carry = running // 10


@given(st.lists(operands, min_size=3, max_size=6).map(tuple), st.sampled_from(["", " ", " £", " red balls "]))
@settings(deadline=None, max_examples=300)
def test_longer_sums_are_found_and_added_by_columns(numbers: tuple[int, ...], between: str) -> None:
    text = f"In all {f'{between}+{between}'.join(map(str, numbers))}{between}={between}{sum(numbers)} of them."
    [calculation] = find_calculations(text)
    assert calculation[:3] == (numbers, "+", sum(numbers))
    heading, _, steps = work_out(numbers, "+").partition(": ")
    assert heading == "+".join(map(str, numbers))
    check_column_sum(steps, numbers)
    others, sign = draw_similar(calculation, np.random.default_rng(sum(numbers)))
    assert sign == "+" and [len(str(n)) for n in others] == [len(str(n)) for n in numbers]


def test_a_calculation_is_carried_out_and_the_rest_of_its_result_predicted(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("He had 93 - 38 = 55 left.")
    writer = arithmetic_traces(tokenizer, ids, calculation_fraction=1.0)
    first, second = writer.preferred_positions
    assert tokenizer.decode(ids[:first]).endswith("= ")
    assert second == first + 1
    for position, rest in ((first, "55"), (second, "5")):
        reasoning, prediction = split_trace(tokenizer, writer.write(position, np.random.default_rng(0)))
        assert tokenizer.decode(reasoning) == work_out((93, 38), "-")
        assert tokenizer.decode(prediction) == rest


def test_multi_byte_characters_do_not_shift_the_positions_of_a_result(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Zoë — 漢字 — had 93 - 38 = 55 left.")
    positions = arithmetic_traces(tokenizer, ids, calculation_fraction=1.0).preferred_positions
    assert tokenizer.decode([ids[i] for i in positions]) == "55"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_window_that_starts_inside_a_character_keeps_its_calculations(tiny_tokenizer: Tokenizer, cut: int) -> None:
    ids = tiny_tokenizer.encode("\U0001f9eeTom had 93 - 38 = 55 marbles and 55 - 12 = 43 are left.")
    assert len(tiny_tokenizer.token_bytes(ids[:cut])) == cut
    whole = arithmetic_traces(tiny_tokenizer, ids, calculation_fraction=1.0)
    window = arithmetic_traces(tiny_tokenizer, ids[cut:], calculation_fraction=1.0)
    assert window.preferred_positions == [position - cut for position in whole.preferred_positions] != []
    for position in window.preferred_positions:
        trace = window.write(position, np.random.default_rng(0))
        assert trace == whole.write(position + cut, np.random.default_rng(0))


def test_calculations_over_the_length_limit_are_recalled_instead(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("That is 987 * 12 = 11844 in all.")
    unlimited = arithmetic_traces(tokenizer, ids, calculation_fraction=1.0)
    position = unlimited.preferred_positions[0]
    calculated = unlimited.write(position, np.random.default_rng(0))
    for limit, is_calculated in ((len(calculated), True), (len(calculated) - 1, False)):
        writer = arithmetic_traces(tokenizer, ids, calculation_fraction=1.0, max_tokens=limit)
        trace = writer.write(position, np.random.default_rng(0))
        assert (trace == calculated) == is_calculated
        assert len(trace) <= limit


def test_the_calculation_fraction_of_traces_is_calculated(tokenizer: Tokenizer) -> None:
    writer = arithmetic_traces(tokenizer, tokenizer.encode("He had 93 - 38 = 55 left."), calculation_fraction=0.3)
    rng = np.random.default_rng(0)
    lengths = [len(writer.write(writer.preferred_positions[0], rng)) for _ in range(1000)]
    assert 250 < sum(length > min(lengths) for length in lengths) < 350


def test_a_drill_states_a_similar_calculation_and_carries_it_out(tokenizer: Tokenizer) -> None:
    writer = arithmetic_traces(tokenizer, tokenizer.encode("He had 93 - 38 = 55 left."), calculation_fraction=0.0)
    questions = set()
    for seed in range(20):
        [(ids, given_tokens)] = writer.drills(np.random.default_rng(seed))
        reasoning, prediction = split_trace(tokenizer, ids)
        question = tokenizer.decode(reasoning[:given_tokens])
        match = re.fullmatch(r"(\d\d)-(\d\d):", question)
        assert match
        left, right = map(int, match.groups())
        assert tokenizer.decode(reasoning) == work_out((left, right), "-")
        assert tokenizer.decode(prediction) == str(left - right)
        questions.add(question)
    assert len(questions) > 15


def test_a_document_without_calculations_has_no_drills(tokenizer: Tokenizer) -> None:
    writer = arithmetic_traces(tokenizer, tokenizer.encode("No sums."), calculation_fraction=0.0)
    assert writer.drills(np.random.default_rng(0)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("calculation_position_fraction", 1.1), ("calculation_fraction", -0.1), ("drills_per_window", -1)],
)
def test_options_out_of_range_are_rejected(name: str, value: float) -> None:
    with pytest.raises(UserError) as raised:
        ArithmeticOptions(**{name: value})
    assert raised.value.field == f"pretrain.trace_options.{name}"
