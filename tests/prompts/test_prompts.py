"""From documents to prompts and cold-start traces: positions, contexts, references, streams, and reasoning that adds up."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpt_jax.config import DataConfig, PromptConfig
from rpt_jax.corpus.entropy import Scores
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import TEMPLATES, PromptBuilder, read_template, stack
from rpt_jax.prompts.cold_start import BOX, Calculation, TraceWriter, find_calculations, similar, work_out
from rpt_jax.prompts.pipeline import PromptStream, example_stream, position_order
from rpt_jax.prompts.positions import Position, choose_positions
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers.tokenizers import any_text, byte_level_bpe, write_hf
from tests.helpers.whole_corpus import load_corpus


@pytest.fixture(scope="module")
def texts():
    config = DataConfig(documents=60, held_out_documents=3, held_out_templates=2)
    return [document.text for document in load_corpus(config).train]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(texts, 420, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    return [tokenizer.encode(text) for text in texts]


# --- positions ---------------------------------------------------------------------------------------


def test_positions_are_above_the_threshold_and_have_context():
    scores = [
        Scores(np.array([9, 9, 0.5, 0.6, 2], np.float32), np.zeros(5, bool), np.zeros(5)),
        Scores(np.array([9], np.float32), np.zeros(1, bool), np.zeros(1)),
        Scores(np.array([9, 9, 9, 0.1], np.float32), np.zeros(4, bool), np.zeros(4)),
    ]
    chosen = choose_positions(scores, threshold=0.5, min_context=2)
    assert [(p.document, p.position) for p in chosen] == [(0, 3), (0, 4), (2, 2)]
    np.testing.assert_allclose([p.entropy for p in chosen], [0.6, 2, 9], rtol=1e-6)
    assert choose_positions(scores, threshold=10, min_context=0) == []


# --- prompts -----------------------------------------------------------------------------------------


def template(tmp_path, text: str) -> str:
    path = tmp_path / "template.txt"
    path.write_bytes(text.encode())
    return str(path)


def test_a_context_is_a_slice_of_its_document(tokenizer, documents, tmp_path):
    """Between exactly the bytes of the template, with everything that text tools like to change."""
    before, after = "\ufeff Q:\r\n\r\n", "\n  A:\t \n"
    name = template(tmp_path, before + "{context}" + after)
    builder = PromptBuilder(PromptConfig(template=name, max_tokens=300, prefill_think_token=True), tokenizer)
    for document, position in ((0, 0), (0, 1), (3, 17), (5, len(documents[5]) - 1)):
        prompt = builder.build(7, documents[document], Position(document, position, 1.25))
        tokens, context = prompt.tokens_PxS[: prompt.lengths_P].tolist(), documents[document][:position]
        head, tail = [tokenizer.bos_id, *tokenizer.encode(before)], [*tokenizer.encode(after), tokenizer.think_id]
        assert tokens == [*head, *context, *tail]
        assert tokenizer.token_bytes(tokens) == (before + tokenizer.decode(context) + after).encode()
        assert prompt.tokens_PxS.shape == (300,) and not prompt.tokens_PxS[prompt.lengths_P :].any()
        assert (prompt.ids_P, prompt.window_P, prompt.position_P, prompt.entropy_P) == (7, document, position, 1.25)


def test_a_long_context_loses_its_oldest_tokens(tokenizer, documents, tmp_path):
    name = template(tmp_path, "Text: {context} ...")
    builder = PromptBuilder(PromptConfig(template=name, max_tokens=30, prefill_think_token=False), tokenizer)
    head, tail = [tokenizer.bos_id, *tokenizer.encode("Text: ")], tokenizer.encode(" ...")
    room = 30 - len(head) - len(tail)
    for position in (room - 1, room, room + 1, len(documents[0]) - 1):
        prompt = builder.build(0, documents[0], Position(0, position, 1.0))
        context = documents[0][:position][-room:]
        assert prompt.tokens_PxS[: prompt.lengths_P].tolist() == [*head, *context, *tail]
        assert prompt.lengths_P == min(30, len(head) + position + len(tail))


def test_a_long_context_begins_with_a_line_where_one_does(tokenizer):
    text = "one two three four\nfive six seven\neight nine ten eleven twelve"
    ids = tokenizer.encode(text)
    for size in range(5, len(ids)):
        config = PromptConfig(max_tokens=size, prefill_think_token=False, long_context="cut_at_line")
        prompt = PromptBuilder(config, tokenizer).build(0, ids, Position(0, len(ids) - 1, 1.0))
        room, context = size - 1, prompt.tokens_PxS[1 : prompt.lengths_P].tolist()
        kept = ids[: len(ids) - 1][-room:]
        border = [i + 1 for i, token in enumerate(kept[: room // 2]) if tokenizer.pieces[token].endswith(b"\n")]
        assert context == (kept[border[0] :] if border and room < len(ids) - 1 else kept)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(write_hf(tmp_path_factory.mktemp("bpe"), byte_level_bpe()))


@given(any_text, st.integers(0, 10**6), st.integers(2, 40), st.sampled_from(["tokenizer", "byte_level"]))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_context_is_the_documents_bytes_whatever_they_are(request, text, place, size, kind):
    """Emoji, CJK, combining marks, line ends, control characters, text that spells special tokens; cut or whole."""
    tokenizer = request.getfixturevalue(kind)
    document = text.encode()
    ids = np.array(tokenizer.encode(text), np.uint32)
    if not len(ids):
        return
    at = place % len(ids)
    before = tokenizer.token_bytes(ids[:at])
    assert document.startswith(before)
    for limit in (size, len(ids) + 1):
        builder = PromptBuilder(
            PromptConfig(max_tokens=limit, prefill_think_token=False, reference_bytes=16), tokenizer
        )
        prompt = builder.build(0, ids, Position(0, at, 1.0))
        context = prompt.tokens_PxS[1 : prompt.lengths_P]
        shown = tokenizer.token_bytes(context)
        assert before.endswith(shown) and context.tolist() == ids[at - len(context) : at].tolist()
        assert len(context) == min(at, limit - 1)
        length = int(np.flatnonzero(prompt.boundaries_PxRp1).max(initial=0))
        assert document[len(before) :].startswith(prompt.reference_PxR[:length].tobytes())


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_reference_is_whole_tokens_and_their_borders(tokenizer, documents, limit):
    builder = PromptBuilder(PromptConfig(max_tokens=40, reference_bytes=limit), tokenizer)
    longest = 0
    for position in range(0, len(documents[1]), 3):
        prompt = builder.build(0, documents[1], Position(1, position, 1.0))
        pieces, ends = [tokenizer.pieces[i] for i in documents[1][position:]], []
        while pieces and sum(ends[-1:]) + len(pieces[0]) <= limit:
            ends.append(sum(ends[-1:]) + len(pieces.pop(0)))
        stored = sum(ends[-1:])
        truth = tokenizer.token_bytes(documents[1][position:])
        assert prompt.reference_PxR.shape == (limit,) and prompt.boundaries_PxRp1.shape == (limit + 1,)
        assert prompt.reference_PxR[:stored].tobytes() == truth[:stored] and not prompt.reference_PxR[stored:].any()
        assert np.flatnonzero(prompt.boundaries_PxRp1).tolist() == ends
        ids = documents[1][position : position + len(ends)]
        assert prompt.reference_ids_PxR.tolist() == [*ids, *[0] * (limit - len(ids))]
        longest = max(longest, len(ends))
    assert longest >= min(limit, 10)


def test_nothing_beyond_a_special_token_is_a_reference(tokenizer):
    """No prediction can spell it, and what follows it belongs to something else."""
    one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    builder = PromptBuilder(PromptConfig(max_tokens=8, reference_bytes=8), tokenizer)
    prompt = builder.build(0, [one, two, tokenizer.eos_id, one], Position(0, 1, 1.0))
    assert prompt.reference_PxR.tobytes() == b"2" + bytes(7)
    assert np.flatnonzero(prompt.boundaries_PxRp1).tolist() == [1]
    assert np.flatnonzero(prompt.reference_ids_PxR).tolist() == [0]


def test_own_templates():
    names = {path.stem for path in TEMPLATES.glob("*.txt")}
    assert {"plain", "v0"} <= names
    for name in names:
        assert len(read_template(name)) == 2
    assert read_template("plain") == ("", "")


def test_templates_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(UserError, match="prompt.template='plian' is neither a file.*Did you mean 'plain'"):
        read_template("plian")
    with pytest.raises(UserError, match="prompt.template"):
        read_template(str(tmp_path))
    for text in ("no slot", "{context} twice {context}"):
        with pytest.raises(UserError, match=r"template.txt must hold \{context\} exactly once"):
            read_template(template(tmp_path, text))
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"abc\xff{context}")
    with pytest.raises(UserError, match=r"latin1.txt is not UTF-8 \(byte 3\)"):
        read_template(str(path))
    long = template(tmp_path, "word " * 30 + "{context}")
    with pytest.raises(UserError, match="prompt.max_tokens=20 leaves no room"):
        PromptBuilder(PromptConfig(template=long, max_tokens=20), tokenizer)
    # One token of room is enough, and none is not.
    assert PromptBuilder(PromptConfig(max_tokens=3), tokenizer)
    with pytest.raises(UserError, match="prompt.max_tokens=2 leaves no room.* takes 2 tokens"):
        PromptBuilder(PromptConfig(max_tokens=2), tokenizer)


def test_open_think_needs_the_token(tokenizer):
    without = dataclasses.replace(tokenizer, think_id=-1)
    with pytest.raises(UserError, match="prompt.prefill_think_token=True needs a tokenizer with a <think>"):
        PromptBuilder(PromptConfig(), without)
    assert PromptBuilder(PromptConfig(prefill_think_token=False), without)


# --- chat templates ----------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_end|>' + message['role'] + '\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>assistant\\n' }}{% endif %}"
)


def chat(folder, template, **config):
    names = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}}
    files = {"tokenizer_config": names | ({"chat_template": template} if template else {})}
    loaded = load_tokenizer(write_hf(folder, byte_level_bpe(), **files))
    return loaded, PromptBuilder(PromptConfig(chat_template=True, max_tokens=64, **config), loaded)


@pytest.mark.parametrize("form", ["text", "list", "prefilled", "file"])
def test_a_chat_template_stands_around_the_prompt(tmp_path, form):
    """Special tokens that it spells are those tokens; begin and <think> come once, whoever puts them there."""
    text = CHAT + "{{ '<think>\\n' }}" * (form == "prefilled")
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT)
    loaded, builder = chat(tmp_path, [{"name": "default", "template": text}] if form == "list" else text)
    document = loaded.encode("Ann has <|im_end|> apples")
    prompt = builder.build(0, document, Position(0, 5, 1.0))
    tokens, context = prompt.tokens_PxS[: prompt.lengths_P].tolist(), document[:5]
    end, said = loaded.eos_id, [loaded.think_id, *loaded.encode("\n")] if form == "prefilled" else [loaded.think_id]
    opening = [loaded.bos_id, end, *loaded.encode("user\n")]
    assert tokens == [*opening, *context, end, *loaded.encode("assistant\n"), *said]


def test_chat_templates_that_cannot_be_used(tmp_path):
    for template, message in (
        ("", "there is no chat template beside"),
        ("{{ messages", "cannot be rendered"),
        ("no message", "does not give a user's message once"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not give a user's message once"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered|does not give"),
    ):
        with pytest.raises(UserError, match=message):
            chat(tmp_path, template)


# --- streams -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(tokenizer, documents):
    """Return a function that opens a stream over the first ten positions of three documents, or fewer."""
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), tokenizer)
    positions = [Position(i % 3, i, float(i)) for i in range(10)]

    def start(seed=0, batch=4, count=10):
        order = position_order([positions[:count]], [], stage_prompts=0, batch=batch, per_document=0, seed=seed)
        return PromptStream(builder, documents, order, batch=batch)

    return start


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same_batches(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert x.dtype == y.dtype


@pytest.mark.parametrize("count", [10, 3])
def test_every_position_comes_once_an_epoch(stream, count):
    """Whatever the batch: 20 prompts are two epochs of 10, and a batch of 4 reaches across the epochs of 3."""
    batches = take(stream(count=count), 5 * count)
    positions = np.concatenate([batch.position_P for batch in batches]).reshape(-1, count)
    np.testing.assert_array_equal(np.sort(positions, axis=1), np.tile(np.arange(count), (20, 1)))
    assert len(np.unique(positions, axis=0)) > 3, "all epochs have the same order"
    np.testing.assert_array_equal(np.concatenate([batch.ids_P for batch in batches]), np.arange(20 * count))


def test_order_is_a_function_of_the_seed(stream):
    assert_same_batches(take(stream(), 5), take(stream(), 5))
    orders = {tuple(np.concatenate([b.position_P for b in take(stream(seed), 5)])) for seed in range(4)}
    assert len(orders) == 4
    # Not of the batch size: prompt 17 is prompt 17.
    other = np.concatenate([b.position_P for b in take(stream(batch=5), 4)])
    np.testing.assert_array_equal(other, np.concatenate([b.position_P for b in take(stream(), 5)]))


@pytest.mark.parametrize("consumed", [0, 1, 4])
def test_a_stream_goes_on_where_its_state_says(stream, consumed):
    first = stream()
    take(first, consumed)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 4)
    again = stream()
    take(again, 2)
    again.set_state(state)
    assert_same_batches(take(again, 4), expected)


def test_a_batch_is_its_prompts_stacked(stream, tokenizer, documents):
    batch = next(stream())
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=8), tokenizer)
    rows = zip(batch.ids_P, batch.window_P, batch.position_P, batch.entropy_P, strict=True)
    singles = [builder.build(i, documents[d], Position(d, p, e)) for i, d, p, e in rows]
    assert_same_batches([stack(singles)], [batch])
    dtypes = [x.dtype for x in batch]
    assert dtypes == [np.int32] * 3 + [np.uint8, bool] + [np.int32] * 3 + [np.float32]


def test_random_examples_are_a_function_of_seed_and_index():
    """A document gives other examples each epoch, and the same ones to a run that was interrupted."""

    def make(document, rng):
        return {"document": np.int32(document), "draw": rng.integers(0, 2**30)}

    def start(seed=0):
        return example_stream(make, 6, batch=3, seed=seed)

    batches = take(start(), 4)
    for epoch in (batches[:2], batches[2:]):
        assert sorted(np.concatenate([batch["document"] for batch in epoch])) == list(range(6))
    assert len(np.unique([batch["draw"] for batch in batches])) == 12
    interrupted = start()
    take(interrupted, 1)
    state = json.loads(json.dumps(interrupted.get_state()))
    again = start()
    again.set_state(state)
    for ours, theirs in zip(take(again, 3), batches[1:], strict=True):
        np.testing.assert_array_equal(ours["draw"], theirs["draw"])
    assert (next(start(1))["draw"] != batches[0]["draw"]).all()


def test_streams_read_little_ahead():
    """What is built before it is needed is memory, and time that two cores lack elsewhere."""
    built = []

    def make(document, rng):
        built.append(document)
        return {"draw": rng.integers(0, 9)}

    take(example_stream(make, 6, batch=3, seed=0), 2)
    time.sleep(0.3)
    assert len(built) <= 3 * 10


# --- calculations ------------------------------------------------------------------------------------

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def long_sum(text: str, left: int, right: int, sign: int) -> int:
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
    spelt = int((str(carry) if carry else "") + digits)
    assert steps[-1] == str(spelt)
    return spelt


def long_product(text: str, left: int, right: int) -> int:
    """Check written multiplication: each digit of the shorter factor, its carries, its partial product, the running sum."""
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
            assert long_sum(" ".join(rest[:length]), total, partial, +1) == total + partial
            rest = rest[length:]
        total += partial
    assert not rest
    return total


def long_quotient(text: str, left: int, right: int) -> int:
    """Check long division: every digit brought down, its quotient digit and its rest."""
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
    heading, _, steps = work_out((left, right), sign).partition(": ")
    assert heading == f"{left}{sign}{right}"
    if sign in "+-":
        result = long_sum(steps, left, right, 1 if sign == "+" else -1)
    else:
        result = (long_product if sign == "*" else long_quotient)(steps, left, right)
    assert result == OPERATORS[sign](left, right)


operands = st.one_of(st.integers(0, 12), st.integers(0, 9999))


@given(st.sampled_from("+-*/"), operands, operands)
@settings(deadline=None, max_examples=500)
def test_every_written_step_is_right(sign, left, right):
    if sign == "-":
        left, right = max(left, right), min(left, right)
    if sign == "/":
        right = max(right, 1)
        left *= right
    check_work(left, sign, right)


@given(st.sampled_from("+-*/"), operands, operands, st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_similar_calculations_are_whole_and_as_long(sign, left, right, seed):
    result = left if sign == "/" else 0
    (first, second), other = similar(Calculation((left, right), sign, result, 0, 0), np.random.default_rng(seed))
    assert other == sign
    check_work(first, sign, second)
    if sign == "/":
        assert len(str(second)) == len(str(right)) and len(str(first // second)) == len(str(result))
    else:
        assert sorted((len(str(first)), len(str(second)))) == sorted((len(str(left)), len(str(right))))


def test_what_the_steps_look_like():
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
def test_calculations_are_found_where_they_hold(sign, left, right, between, right_result):
    arithmetic = {"x": "*", "×": "*"}.get(sign, sign)
    if arithmetic == "/":
        right = max(right, 1)
        left = left // right * right
    result = OPERATORS[arithmetic](left, right) + (not right_result)
    text = f"Now {left}{between}{sign}{between}{right}{between}={between}{result} remain."
    found = list(find_calculations(text))
    if not right_result or result < 0 or result >= 10**6:
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
def test_what_is_no_whole_number_calculation(text):
    assert list(find_calculations(text)) == []


def test_several_calculations_in_a_line():
    text = "He paid 3 * $4 = $12, so 20 - 12 = 8 and 8 - 12 = -4."
    assert [calculation[:3] for calculation in find_calculations(text)] == [((3, 4), "*", 12), ((20, 12), "-", 8)]


def test_of_what_is_no_sum_the_last_two_numbers_count():
    text = "With 2 * 3 + 4 = 7 and 9 - 5 - 4 = 1 and 1 + 9 + 3 = 12."
    assert [calculation[:3] for calculation in find_calculations(text)] == [
        ((3, 4), "+", 7),
        ((5, 4), "-", 1),
        ((9, 3), "+", 12),
    ]


def check_column_sum(text: str, numbers: tuple[int, ...]) -> None:
    """Check that every column runs through its digits, from what the one before carries, and that the result is right."""
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
def test_longer_sums_are_found_and_go_down_the_columns(numbers, between):
    text = f"In all {f'{between}+{between}'.join(map(str, numbers))}{between}={between}{sum(numbers)} of them."
    [calculation] = find_calculations(text)
    assert calculation[:3] == (numbers, "+", sum(numbers))
    heading, _, steps = work_out(numbers, "+").partition(": ")
    assert heading == "+".join(map(str, numbers))
    check_column_sum(steps, numbers)
    others, operator = similar(calculation, np.random.default_rng(sum(numbers)))
    assert operator == "+" and [len(str(n)) for n in others] == [len(str(n)) for n in numbers]


# --- traces ------------------------------------------------------------------------------------------


def parts(tokenizer, trace: list[int]) -> tuple[list[int], list[int]]:
    """Return the reasoning and the prediction of a trace, which must be well formed."""
    [box], [close] = tokenizer.encode(BOX), tokenizer.encode("}")
    assert trace.count(tokenizer.end_think_id) == trace.count(box) == trace.count(tokenizer.eos_id) == 1
    end = trace.index(tokenizer.end_think_id)
    assert trace[end + 1] == box and trace[-2:] == [close, tokenizer.eos_id]
    return trace[:end], trace[end + 2 : -2]


def test_every_trace_earns_the_reward(tokenizer, texts, documents):
    """Recalled and calculated, at every position of documents: the reward kernel reads what the traces teach."""
    builder = PromptBuilder(PromptConfig(max_tokens=16, reference_bytes=64), tokenizer)
    prompts, traces, calculated = [], [], 0
    for number, ids in enumerate(documents[:15]):
        writers = [TraceWriter(tokenizer, ids, share, max_tokens=500) for share in (0.0, 1.0)]
        calculated += len(writers[0].calculation_positions)
        for position in range(len(ids)):
            prompts.append(builder.build(0, ids, Position(number, position, 1.0)))
            traces.append([writer.write(position, np.random.default_rng(0)) for writer in writers])
            for trace in traces[-1]:
                parts(tokenizer, trace)
    assert calculated > 30, "the documents test too little"
    batch, vocab = stack(prompts), tokenizer.byte_vocab
    lengths = np.array([[len(trace) for trace in pair] for pair in traces], np.int32)
    tokens = np.zeros((*lengths.shape, lengths.max()), np.int32)
    for place in np.ndindex(lengths.shape):
        tokens[place][: lengths[place]] = traces[place[0]][place[1]]
    reward, status = prefix_match_reward(
        tokens, lengths, np.ones(lengths.shape, bool), batch.reference_PxR, batch.boundaries_PxRp1, *vocab,
        tokenizer.end_think_id,
    )  # fmt: skip
    failed = np.argwhere(reward != 1)
    assert not [(batch.window_P[p], batch.position_P[p], Status(status[p, g]).name) for p, g in failed]


def test_recall_repeats_the_context_and_predicts_one_token(tokenizer, texts, documents):
    writer = TraceWriter(tokenizer, documents[0], 0.0, max_tokens=500)
    for position in (0, 1, 20):
        reasoning, prediction = parts(tokenizer, writer.write(position, np.random.default_rng(0)))
        assert prediction == [documents[0][position]]
        assert reasoning == documents[0][position - len(reasoning) : position]
        assert bool(reasoning) == (position > 0)


def test_calculation_carries_it_out_and_predicts_the_rest_of_the_result(tokenizer):
    text = "He had 93 - 38 = 55 left."
    ids = tokenizer.encode(text)
    writer = TraceWriter(tokenizer, ids, 1.0, max_tokens=500)
    first, second = writer.calculation_positions
    assert tokenizer.decode(ids[:first]).endswith("= ") and second == first + 1
    for position, rest in ((first, "55"), (second, "5")):
        reasoning, prediction = parts(tokenizer, writer.write(position, np.random.default_rng(0)))
        assert tokenizer.decode(reasoning) == work_out((93, 38), "-")
        assert tokenizer.decode(prediction) == rest


def test_bytes_and_characters_before_a_calculation_are_told_apart(tokenizer):
    text = "Zoë — 漢字 — had 93 - 38 = 55 left."
    ids = tokenizer.encode(text)
    positions = TraceWriter(tokenizer, ids, 1.0, max_tokens=500).calculation_positions
    assert tokenizer.decode([ids[i] for i in positions]) == "55"


def test_long_calculations_are_recalled(tokenizer):
    text = "That is 987 * 12 = 11844 in all."
    ids = tokenizer.encode(text)
    free = TraceWriter(tokenizer, ids, 1.0, max_tokens=500)
    trace = free.write(free.calculation_positions[0], np.random.default_rng(0))
    for limit, calculates in ((len(trace), True), (len(trace) - 1, False)):
        writer = TraceWriter(tokenizer, ids, 1.0, limit)
        again = writer.write(free.calculation_positions[0], np.random.default_rng(0))
        assert (again == trace) == calculates and len(again) <= limit


def test_calculation_share(tokenizer):
    text = "He had 93 - 38 = 55 left."
    writer = TraceWriter(tokenizer, tokenizer.encode(text), 0.3, max_tokens=500)
    rng = np.random.default_rng(0)
    lengths = [len(writer.write(writer.calculation_positions[0], rng)) for _ in range(1000)]
    assert 250 < sum(length > min(lengths) for length in lengths) < 350


def test_a_drill_poses_a_calculation_and_carries_it_out(tokenizer):
    text = "He had 93 - 38 = 55 left."
    writer = TraceWriter(tokenizer, tokenizer.encode(text), 0.0, max_tokens=500)
    posed = set()
    for seed in range(20):
        ids, given = writer.drill(np.random.default_rng(seed))
        reasoning, prediction = parts(tokenizer, ids)
        question = tokenizer.decode(reasoning[:given])
        left, right = map(int, re.fullmatch(r"(\d\d)-(\d\d):", question).groups())
        assert tokenizer.decode(reasoning) == work_out((left, right), "-")
        assert tokenizer.decode(prediction) == str(left - right)
        posed.add(question)
    assert len(posed) > 15
    assert TraceWriter(tokenizer, tokenizer.encode("No sums."), 0.0, 500).drill(np.random.default_rng(0)) is None
