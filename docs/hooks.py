"""Build hooks of the documentation: generated reference pages, and figures that live outside docs/."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that pages show, by their path in the site.
FIGURES = {"assets/accuracy.png": ROOT / "configs" / "tiny" / "accuracy.png"}
_HELP = re.compile(r"^\{\{ help: (?P<command>[\w. ]+) \}\}$", re.MULTILINE)
_DOCSTRING = re.compile(r"^\{\{ docstring: (?P<path>[\w/.]+) \}\}$", re.MULTILINE)
_CONFIG = "{{ config reference }}"


def on_files(files: Any, config: Any) -> Any:
    """Add the figures to the site."""
    for path, source in FIGURES.items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the placeholders of the reference pages."""
    if _CONFIG in markdown:
        markdown = markdown.replace(_CONFIG, config_reference())
    markdown = _DOCSTRING.sub(lambda match: docstring(match["path"]), markdown)
    return _HELP.sub(lambda match: help_text(match["command"]), markdown)


def docstring(path: str) -> str:
    """Return the docstring of a module's file as a fenced block."""
    return f"```text\n{ast.get_docstring(ast.parse((ROOT / path).read_text()))}\n```"


def config_reference() -> str:
    """Return the config fields as Markdown, a table for each section, from the comments of the schema."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        reference = importlib.import_module("rpt_jax.config.reference")
    except ModuleNotFoundError:
        return "The fields, with their types and defaults, are in `rpt_jax/config/schema.py`."
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, type_name, default, doc in reference.field_docs():
        sections.setdefault(name.rpartition(".")[0], []).append((name, str(type_name), repr(default), doc))
    return "\n\n".join(_section(name, fields) for name, fields in sections.items())


def _section(name: str, fields: list[tuple[str, ...]]) -> str:
    rows = [
        f"| `{_cell(field)}` | {_cell(type_name)} | `{_cell(default)}` | {_cell(doc)} |"
        for field, type_name, default, doc in fields
    ]
    header = ["| field | type | default | description |", "|---|---|---|---|"]
    return "\n".join([f"## {name or 'Top level'}", "", *header, *rows])


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def help_text(command: str) -> str:
    """Return the output of `python -m COMMAND --help` as a fenced block. Raises: CalledProcessError."""
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    run = [sys.executable, "-m", *command.split(), "--help"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    text = done.stdout.strip().replace(f"{ROOT}/", "")
    return f"```text\n{text}\n```"
