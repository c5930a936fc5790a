"""Documentation of the config fields, read from the comments of the schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

from rpt_jax.config.schema import Experiment
from rpt_jax.registry import CORPUS_SOURCES, QUESTION_SOURCES, TARGETS, TRACE_WRITERS


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """What the reference page says about a field.

    Attributes:
      name: dotted, such as "rollout.temperature".
      type: name of the field's type.
      default: as one would write it in Python.
      text: the comment above the field.
      memory: whether it changes speed and memory, but not results.
    """

    name: str
    type: str
    default: str
    text: str
    memory: bool


def field_docs() -> list[FieldDoc]:
    """Return the documentation of every config field, in the order of the schema, then that of the options of choices."""
    docs = list(_docs_of(Experiment, ""))
    for registry, prefix in (
        (CORPUS_SOURCES, "data.source_options."),
        (TARGETS, "data.target_options."),
        (QUESTION_SOURCES, "questions.source_options."),
        (TRACE_WRITERS, "pretrain.trace_options."),
    ):
        for choice in registry.choices():
            if choice.requirements.options:
                docs += _docs_of(choice.requirements.options, prefix)
    return docs


def section_docs(schema: type = Experiment, prefix: str = "") -> dict[str, str]:
    """Return the docstring of every section, and of those in it, by its dotted name."""
    docs: dict[str, str] = {}
    for name, section in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(section):
            docs[f"{prefix}{name}"] = inspect.getdoc(section) or ""
            docs |= section_docs(typing.cast(type, section), f"{prefix}{name}.")
    return docs


def comments(schema: type) -> dict[str, str]:
    """Return the comment lines above each field of a dataclass, by the field's name."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        text = line.strip()
        if text.startswith("# "):
            lines.append(text[2:])
        elif field := re.match(r"(\w+)\s*:", text):
            found[field[1]] = " ".join(lines)
            lines = []
        else:
            lines = []
    return found


def _docs_of(schema: type, prefix: str) -> Iterator[FieldDoc]:
    types = typing.get_type_hints(schema)
    texts = comments(schema)
    for field in dataclasses.fields(schema):
        expected: Any = types[field.name]
        if dataclasses.is_dataclass(expected):
            yield from _docs_of(typing.cast(type, expected), f"{prefix}{field.name}.")
            continue
        text = texts[field.name]
        yield FieldDoc(
            name=f"{prefix}{field.name}",
            type=expected.__name__ if expected is not Any else "options",
            default=repr(field.default),
            text=text.removeprefix("[memory] "),
            memory=text.startswith("[memory]"),
        )
