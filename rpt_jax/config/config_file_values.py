"""The values of a config file, which know the line that assigned each of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from rpt_jax.config.dataclass_io import checked_type, leaves, unknown_field
from rpt_jax.config.schema import Experiment
from rpt_jax.errors import UserError


class FieldError(UserError, AttributeError):
    """An assignment to a field that does not exist, or of a value of another type."""


class ConfigFileValues(ml_collections.ConfigDict):
    """A section of a config, or all of it: assignments are checked against the schema, and their lines are kept.

    Args:
      values: nested values by name, which need no check.
      name: of the section with a dot after it, such as "training."; "" for the whole config.
      lines: "FILE:LINE" of each assignment by field, shared by all sections.
    """

    # Declared, because the base class has __getattr__, which gives a type to what is not.
    _name: str
    _lines: dict[str, str]
    _fields: dict[str, Any]

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        name: str = "",
        lines: dict[str, str] | None = None,
        **_: Any,
    ):
        # Private attributes, which are no fields; the base class sets its own in the same way.
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_lines", {} if lines is None else lines)
        super().__init__(type_safe=False)  # The schema says more about types than the defaults do.
        for key, value in dict(values or {}).items():
            is_section = isinstance(value, Mapping)
            self._fields[key] = ConfigFileValues(value, f"{name}{key}.", self._lines) if is_section else value

    def __setitem__(self, key: str, value: Any) -> None:
        field = f"{self._name}{key}"
        if self.is_locked:
            known = dict(leaves(Experiment()))
            if key not in self:
                raise FieldError(str(unknown_field(field, known)), field=field)
            if known.get(field) is not None:
                try:
                    checked_type(field, value, type(known[field]))
                except UserError as error:
                    raise FieldError(str(error), field=field) from None
        self._lines[field] = _line_of_caller()
        super().__setitem__(key, value)

    def line_of(self, field: str) -> str:
        """Return "FILE:LINE" of the assignment to `field` or to a section that contains it; "" if there is none."""
        while field and field not in self._lines:
            field = field.rpartition(".")[0]
        return self._lines.get(field, "")


def _line_of_caller() -> str:
    """Return "FILE:LINE" of the code that uses this module through ml_collections."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "ml_collections" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
