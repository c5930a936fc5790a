"""Load questions: read them from their source, reject those that cannot be used, and choose training and test questions.

Which questions are chosen is a function of `questions.seed` and of their texts: it does not change when lines are reordered.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected, hash64, normalized_text
from rpt_jax.corpus.near_duplicates import MIN_SHARE, contained_share, find_candidates, make_sketches
from rpt_jax.corpus.records import InvalidRecordError
from rpt_jax.corpus.sources import RejectLog, log_rejected
from rpt_jax.errors import UserError
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.registry import QUESTION_SOURCES

logger = logging.getLogger(__name__)

# Largest fraction of the questions that is held out, where the source has no test part.
_HELD_OUT_FRACTION = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSets:
    """The chosen questions, and what was left out.

    Attributes:
      train: training questions, in random order.
      test: test questions, in random order; none of them has the text of a training question.
      rejected: numbers of questions that cannot be used or repeat another one, by reason.
      near_duplicates: pairs of a test question and the training question that has most of its runs of five words.
    """

    train: tuple[Question, ...]
    test: tuple[Question, ...]
    rejected: Mapping[str, int]
    near_duplicates: tuple[tuple[Question, Question], ...]


def check_question_source(config: QuestionsConfig) -> None:
    """Check that the source's package or files exist, without reading them. Raises: UserError."""
    check = QUESTION_SOURCES[config.source].requirements.check
    if check:
        check(config)


def load_questions(
    config: QuestionsConfig,
    why_unreadable: Callable[[Question], str] = lambda question: "",
    choose: Callable[[Sequence[Question]], list[Question]] = list,
    listing: Path | None = None,
    *,
    for_training: bool = True,
) -> QuestionSets:
    """Read the questions of the source, and choose those to train on and to test with.

    Args:
      config: section `questions`.
      why_unreadable: returns what is wrong with the answers of a question, "" for nothing, as `rewards.verifiers.why_unreadable`
        does.
      choose: returns those of the questions that may be trained on, such as those of the right difficulty.
      listing: file to list rejected and repeated questions in; None = they are only counted.
      for_training: whether there must be questions to train on.

    Raises: UserError, if a file cannot be read, if there are too few questions, or with `questions.strict` for the first one that
      is rejected.
    """
    check_question_source(config)

    # Read.
    with RejectLog(config.strict, listing, "questions.strict") as rejects:
        read = QUESTION_SOURCES[config.source].function(config)
        found = list(rejects.filter(_check_all(rejects.filter(read), why_unreadable)))
        distinct = _distinct(found, rejects)
    log_rejected(rejects.counts, str(listing or ""), "the questions")
    if not found:
        first = next(iter(rejects.first_details.values()), "The source is empty.")
        raise UserError(
            f"{_source_name(config)} has no question that can be used. The first that was rejected: {first}",
            field=_source_field(config),
        )

    # Choose.
    test, rest = _choose_test(distinct, config)
    train = choose(_shuffled(rest, config.seed, TRAIN)) if rest else []
    if for_training and len(train) < max(1, config.train_questions):
        unfit = len(rest) - len(train)
        excluded = f"; questions.pass_rates excludes {unfit:,} more" if unfit else ""
        raise UserError(
            f"questions.train_questions={config.train_questions}: {_source_name(config)} has {len(train):,} questions to train "
            f"on, besides {len(test):,} to test with{excluded}.",
            field="questions.train_questions",
        )
    train = train[: config.train_questions or None]
    near_duplicates = _near_duplicates(train, test)
    logger.info("Questions: %s to train on, %s to test with.", f"{len(train):,}", f"{len(test):,}")
    if near_duplicates:
        example, other = near_duplicates[0]
        logger.info(
            "%.1f%% of the test questions nearly repeat a training question, such as %s and %s.",
            100 * len(near_duplicates) / len(test),
            example.place or example.id,
            other.place or other.id,
        )
    return QuestionSets(
        train=tuple(train),
        test=tuple(test),
        rejected=dict(rejects.counts),
        near_duplicates=tuple(near_duplicates),
    )


def _source_name(config: QuestionsConfig) -> str:
    if config.source != "path":
        return f"questions.source='{config.source}'"
    return f"questions.path='{config.path}'" if config.path else f"questions.test_path='{config.test_path}'"


def _source_field(config: QuestionsConfig) -> str:
    return "questions.path" if config.source == "path" else "questions.source"


# --- checks -------------------------------------------------------------------------------------------


def _check_all(
    items: Iterator[SourceQuestion], why_unreadable: Callable[[Question], str]
) -> Iterator[SourceQuestion | Rejected]:
    """Yield the questions, those that cannot be used as `Rejected`."""
    places: dict[str, str] = {}
    for item in items:
        question = item.question
        try:
            _check(question, places)
            if problem := why_unreadable(question):
                raise InvalidRecordError("answer cannot be verified", problem)
        except InvalidRecordError as error:
            yield _rejected(question, error.reason, error.detail)
        else:
            places[question.id] = question.place
            yield item


def _rejected(question: Question, reason: str, detail: str) -> Rejected:
    file, _, line = question.place.rpartition(":")
    return Rejected(
        file=file,
        line=int(line) if line.isdecimal() else 0,
        reason=reason,
        detail=f"{question.place or question.id} {detail}",
    )


def _check(question: Question, places: Mapping[str, str]) -> None:
    """Check that a question can be used. Raises: InvalidRecordError.

    Args:
      question: the question.
      places: of the questions before it, by their ids.
    """
    try:
        "".join((question.id, question.text, *question.answers, *question.choices, question.category)).encode()
    except UnicodeEncodeError:
        detail = "has an unpaired surrogate, which UTF-8 cannot encode."
        raise InvalidRecordError("unpaired surrogate", detail) from None
    if not question.text.strip():
        raise InvalidRecordError("empty question", "has an empty question.")
    if question.id in places:
        raise InvalidRecordError("duplicate id", f"has the id '{question.id}' of {places[question.id]}.")
    is_scored_by_task = "entry" in question.data  # Some tasks of reasoning-gym have no reference answer.
    if not all(answer.strip() for answer in question.answers) or not (question.answers or is_scored_by_task):
        raise InvalidRecordError("no answer", "has no answer, or an empty one.")
    if question.choices:
        _check_choices(question)


def _check_choices(question: Question) -> None:
    """Check the options of a question. Raises: InvalidRecordError."""
    count = len(question.choices)
    letters = string.ascii_uppercase[:count]
    if not 2 <= count <= len(string.ascii_uppercase):
        detail = f"has {count} options, and 2 to {len(string.ascii_uppercase)} are needed."
        raise InvalidRecordError("number of options", detail)
    if not all(choice.strip() for choice in question.choices):
        raise InvalidRecordError("empty option", "has an option without text.")
    if not set(question.answers) <= set(letters):
        detail = f"has the answer {', '.join(question.answers)}, and its options are A to {letters[-1]}."
        raise InvalidRecordError("answer not an option", detail)


# --- choice -------------------------------------------------------------------------------------------


def _key(question: Question) -> str:
    """Return what two questions have in common if they are the same one. Options are part of a question."""
    return "\n".join(map(normalized_text, (question.text, *question.choices)))


def _distinct(items: Sequence[SourceQuestion], rejects: RejectLog) -> list[SourceQuestion]:
    """Return one question of each text: one of the test part, if there is any, and else the first. The others are listed."""
    chosen: dict[str, SourceQuestion] = {}
    for item in items:
        key = _key(item.question)
        if key not in chosen:
            chosen[key] = item
            continue
        dropped = item
        if item.part == TEST and chosen[key].part != TEST:
            dropped = chosen[key]
            chosen[key] = item
        kept = chosen[key].question
        rejects.add(_rejected(dropped.question, "repeated question", f"repeats {kept.place or kept.id}."))
    return list(chosen.values())


def _choose_test(items: Sequence[SourceQuestion], config: QuestionsConfig) -> tuple[list[Question], list[Question]]:
    """Return the test questions, and those that are left to train on. Raises: UserError, if there are too few."""
    test_part = [item.question for item in items if item.part == TEST]
    others = [item.question for item in items if item.part != TEST]
    wanted = config.test_questions
    if test_part:
        if wanted > len(test_part):
            raise UserError(
                f"questions.test_questions={wanted}: the test part of {_source_name(config)} has {len(test_part):,} distinct "
                "questions. Choose fewer, or 0 for all.",
                field="questions.test_questions",
            )
        return _shuffled(test_part, config.seed, TEST)[: wanted or None], others

    limit = int(len(others) * _HELD_OUT_FRACTION)
    if not 1 <= wanted <= limit:
        raise UserError(
            f"questions.test_questions={wanted}: {_source_name(config)} has no test part, so that test questions are held out: "
            f"at least 1, and at most half of its {len(others):,} distinct questions.",
            field="questions.test_questions",
        )
    shuffled = _shuffled(others, config.seed, TEST)
    return shuffled[:wanted], shuffled[wanted:]


def _shuffled(questions: Sequence[Question], seed: int, purpose: str) -> list[Question]:
    """Return the questions in an order that depends on their texts, the seed and the purpose."""
    return sorted(questions, key=lambda question: (hash64(seed, f"{purpose}\n{_key(question)}"), question.id))


# --- near-duplicates ----------------------------------------------------------------------------------


def _near_duplicates(train: Sequence[Question], test: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Return pairs of a test question and a training question that contains most of its runs of five words."""
    words: dict[str, int] = collections.defaultdict(lambda: len(words))
    ids_of = {
        name: [np.array([words[word] for word in _key(question).split()]) for question in questions]
        for name, questions in ((TRAIN, train), (TEST, test))
    }
    # Questions are short, so that all runs are compared and not a sample.
    if not train:
        return []
    sketches = {
        name: make_sketches(np.concatenate(ids), np.array([len(i) for i in ids]), sampled_bits=0)
        for name, ids in ids_of.items()
    }
    pairs = find_candidates(sketches[TEST], [sketches[TRAIN]])
    return [(test[i], train[j]) for i, j in pairs if contained_share(ids_of[TEST][i], ids_of[TRAIN][j]) >= MIN_SHARE]
