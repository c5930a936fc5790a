"""Segments of a window: where they begin and end, which of them can be targets, and their prompts."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from rpt_jax.config import Experiment, PromptConfig, from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.positions import Position, choose_positions, target_entropies
from rpt_jax.prompts.targets import Segments, can_be_boxed, find_segments, sentence_spans
from rpt_jax.rewards.boxable import boxable_tokens
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.paths import TINY
from tests.helpers.reward_cases import VOCAB

TOKENIZER = load_tokenizer(TINY)
SENTENCES = [
    'Mr. Smith has 3.5 apples, e.g. "red" ones!',
    " He asks: why?",
    "A title",
    'One "ends here."',
    " Another one (this)...",
    " So it",
]
TEXT = f"{SENTENCES[0]}{SENTENCES[1]}\n\n{SENTENCES[2]}\n \n{SENTENCES[3]}{SENTENCES[4]}{SENTENCES[5]}"


def experiment(**fields: Any) -> Experiment:
    """Return an experiment with segments; fields are named as `data__target_options`."""
    values: dict[str, dict[str, Any]] = {"data": {"targets": "segment"}}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values.setdefault(section, {})[field] = value
    return from_config_dict(values)


def segments(tokenizer: Tokenizer = TOKENIZER, **fields: Any) -> Segments:
    found = find_segments(experiment(**fields), tokenizer)
    assert found
    return found


def targets(found: Segments, ids: list[int]) -> list[tuple[int, int]]:
    ends_S = found.ends(ids)
    return [(int(start), int(ends_S[start])) for start in np.flatnonzero(ends_S)]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def test_sentences_end_at_marks_and_empty_lines_and_leave_out_white_space() -> None:
    ids = np.array(ids_of(TEXT))
    starts_N, ends_N = sentence_spans(ids, pieces=TOKENIZER.pieces)
    # The window cuts the last one.
    assert ends_N[-1] == len(ids) + 1
    found = [TOKENIZER.decode(ids[start:end].tolist()) for start, end in zip(starts_N, ends_N, strict=True)]
    assert found == SENTENCES


def test_a_sentence_that_ends_with_the_window_is_whole() -> None:
    for text in ("One. Two.", "One. Two.\n", "One. Two\n\n"):
        assert len(targets(segments(), ids_of(text))) == 2
    assert len(targets(segments(), ids_of("One. Two"))) == 1


def test_every_text_is_split_between_tokens_without_overlap() -> None:
    rng = np.random.default_rng(0)
    alphabet = [token for token, piece in enumerate(TOKENIZER.pieces) if piece.strip(b"ab.!?\n \"'") == b""]
    for _ in range(200):
        ids = rng.choice(alphabet, rng.integers(0, 30))
        starts_N, ends_N = sentence_spans(ids, pieces=TOKENIZER.pieces)
        assert (starts_N < ends_N).all() and (starts_N[1:] >= ends_N[:-1]).all()
        outside = set(range(len(ids))).difference(*(range(s, e) for s, e in zip(starts_N, ends_N, strict=True)))
        assert not b"".join(TOKENIZER.pieces[ids[i]] for i in outside).strip()


def test_next_tokens_are_targets_at_every_position_that_has_enough() -> None:
    found = segments(data__target_options={"unit": "tokens", "tokens": 3})
    ids = ids_of("One two three four.")
    assert targets(found, ids) == [(i, i + 3) for i in range(len(ids) - 2)]


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("One. Two and", {}, "cut by the end of the window"),
        ("One. Two.", {"prompt__reference_bytes": 4}, "of more than prompt.reference_bytes"),
        ("One. Two and three and four.", {"data__target_options": {"tokens": 5}}, "of more than 5 tokens"),
        ("One. Two.", {"data__target_options": {"right_context": 2}}, "without right context"),
        ("One. So it is }{.", {}, "that no box can hold"),
        ("One. Two </think>.", {}, "that no box can hold"),
    ],
)
def test_segments_that_cannot_be_targets_are_counted_by_the_reason(text: str, fields: dict, reason: str) -> None:
    found = segments(**fields)
    ids = ids_of(text)
    start = len(ids_of("One."))
    assert found.count_left_out(ids, start) == {reason: 1}
    assert found.count_left_out(ids, start + 1) == {}
    assert found.ends(ids)[start] == 0


def test_white_space_and_special_tokens_are_no_targets() -> None:
    found = segments(data__target_options={"unit": "tokens", "tokens": 2})
    ids = [*ids_of("a"), *ids_of("\n") * 2, TOKENIZER.think_id, *ids_of("a")]
    first = len(ids_of("a"))
    assert found.count_left_out(ids[: first + 2], first)["white space only"] == 1
    assert found.count_left_out(ids, first + 1)["with a special token"] == 2


@pytest.mark.parametrize("reading", ["balanced", "to_end"])
def test_a_text_of_one_token_can_be_boxed_if_the_kernel_reads_it(reading: str) -> None:
    table = np.array([list(piece.ljust(20, b"\0")) for piece in VOCAB], np.uint8)
    vocab = TOKENIZER.byte_vocab._replace(
        bytes_VxX=table, lengths_V=np.array([len(piece) for piece in VOCAB], np.int32)
    )
    boxable_V = boxable_tokens(vocab, PromptConfig(box_reading=reading))
    assert [can_be_boxed(piece, reading) for piece in VOCAB if piece] == [
        bool(boxable) for piece, boxable in zip(VOCAB, boxable_V, strict=True) if piece
    ]


def test_the_entropy_of_a_segment_is_the_mean_of_its_tokens() -> None:
    found = segments()
    ids = np.array(ids_of(TEXT))
    entropy_S = np.random.default_rng(0).exponential(1.0, len(ids)).astype(np.float32)
    boxable_V = np.zeros(TOKENIZER.vocab_size, bool)  # For next tokens only.
    target_S = target_entropies(entropy_S, ids, boxable_V, found)
    expected = {start: entropy_S[start:end].mean() for start, end in targets(found, ids.tolist())}
    assert np.flatnonzero(target_S >= 0).tolist() == list(expected)
    np.testing.assert_allclose(target_S[list(expected)], list(expected.values()), rtol=1e-6)

    positions, left_out = choose_positions([ids], [entropy_S], boxable_V, 0.8, min_context=1, segments=found)
    assert {p.position: p.entropy for p in positions} == {
        i: float(target_S[i]) for i in expected if i and target_S[i] > 0.8
    }
    assert left_out == 1  # The sentence that the window cuts.


def test_segments_are_pickled_for_workers() -> None:
    found = segments()
    assert targets(pickle.loads(pickle.dumps(found)), ids_of(TEXT)) == targets(found, ids_of(TEXT))


@pytest.mark.parametrize("right_context", [0, 4])
def test_the_prompt_of_a_segment_has_what_is_around_it_and_compares_with_nothing_else(right_context: int) -> None:
    config = experiment(
        data__target_options={"right_context": right_context},
        prompt__template="masked_segment" if right_context else "next_segment",
        prompt__max_tokens=400,
    )
    found = find_segments(config, TOKENIZER)
    builder = PromptBuilder(config.prompt, TOKENIZER, segments=found)
    ids = ids_of(TEXT)
    assert found
    start, end = targets(found, ids)[1]
    prompt = builder.build(0, ids, Position(0, start, 1.0))
    text = TOKENIZER.decode(prompt.tokens_PxS[: prompt.lengths_P].tolist())
    left, right = TOKENIZER.decode(ids[:start]), TOKENIZER.decode(ids[end : end + right_context])
    assert (f"\n{left}\n\n### After\n{right}\n" if right_context else f"\n{left}\n") in text
    last = np.flatnonzero(prompt.boundaries_PxRp1)[-1]
    assert prompt.reference_PxR[:last].tobytes().decode() == SENTENCES[1]
    assert prompt.boundaries_PxRp1.sum() == end - start

    # A long left context is cut, the right context is not.
    size = int(prompt.lengths_P) - 2
    short = PromptBuilder(
        PromptConfig(template=config.prompt.template, max_tokens=size), TOKENIZER, segments=found
    ).build(0, ids, Position(0, start, 1.0))
    assert short.lengths_P == size
    tail = builder.max_tail_tokens
    np.testing.assert_array_equal(short.tokens_PxS[size - tail :], prompt.tokens_PxS[size + 2 - tail : size + 2])


@pytest.mark.parametrize(("right_context", "template"), [(0, "masked_segment"), (4, "next_segment"), (4, "plain")])
def test_a_template_has_a_right_context_if_and_only_if_the_targets_do(right_context: int, template: str) -> None:
    config = experiment(
        data__target_options={"right_context": right_context}, prompt__template=template, prompt__max_tokens=400
    )
    with pytest.raises(UserError) as raised:
        PromptBuilder(config.prompt, TOKENIZER, segments=find_segments(config, TOKENIZER))
    assert raised.value.field == "prompt.template"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"data__target_options": {"unit": "word"}}, "data.target_options.unit"),
        ({"data__target_options": {"tokens": 0}}, "data.target_options.tokens"),
        ({"data__target_options": {"right_context": -1}}, "data.target_options.right_context"),
        ({"rollout__max_new_tokens": 32}, "data.target_options.tokens"),
        ({"objective__reward": "first_token"}, "objective.reward"),
        ({"data__targets": "token", "objective__reward": "segment_prefix_share"}, "objective.reward"),
        ({"cold_start__total_steps": 2}, "cold_start.total_steps"),
        (
            {"data__target_options": {"right_context": 2}, "objective__document_weight": 0.1},
            "objective.document_weight",
        ),
        ({"objective__reward": "verified", "questions__verifier": "choice"}, "questions.verifier"),
        (
            {
                "objective__reward": "verified",
                "questions__source": "reasoning_gym",
                "questions__verifier": "reasoning_gym",
            },
            "questions.verifier",
        ),
        ({"objective__reward": "verified", "prompt__box_reading": "to_end"}, "prompt.box_reading"),
    ],
)
def test_fields_that_do_not_suit_segments_are_refused(fields: dict, field: str) -> None:
    with pytest.raises(UserError) as raised:
        experiment(**fields)
    assert raised.value.field == field


def test_only_the_verifier_of_the_questions_is_read_with_verified_segments() -> None:
    config = {"data": {"targets": "segment"}, "objective": {"reward": "verified"}}
    assert from_config_dict(config, ["questions.verifier=contains"]).questions.verifier == "contains"
    with pytest.raises(UserError) as raised:
        from_config_dict(config, ["questions.path=questions.jsonl"])
    assert raised.value.field == "questions.path"
