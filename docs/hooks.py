"""Build hooks of the documentation: generated reference pages, and figures that live outside docs/."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that pages show, by their path in the site. Pages link to the file itself, as in the repository.
FIGURES = {"assets/accuracy.png": "configs/tiny/accuracy.png"}
_HELP = re.compile(r"^\{\{ help: (?P<command>[\w. ]+) \}\}$", re.MULTILINE)
# Prints the help of each argument, a module and its subcommand, with a null character after it. One process for all of them,
# because importing JAX takes seconds.
_PRINT_HELP = """
import runpy, sys
commands = sys.argv[1:]
for command in commands:
    module, *subcommand = command.split()
    sys.argv = [module, *subcommand, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    print(end="\\0", flush=True)
"""
_CONFIG = "{{ config reference }}"
_STUDY = "{{ study reference }}"
_CHOICES = "{{ choices }}"
_RULES = "{{ doctor rules }}"


def on_config(config: Any) -> Any:
    """Make the package of this repository importable. mkdocs restores `sys.path` after it has loaded this file."""
    sys.path.insert(0, str(ROOT))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the figures to the site."""
    for path, source in FIGURES.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the placeholders of the reference pages, and point links to the figures at their copies in the site."""
    to_docs = "../" * page.file.src_uri.count("/")
    for path, source in FIGURES.items():
        markdown = markdown.replace(f"]({to_docs}../{source})", f"]({to_docs}{path})")
    if _CONFIG in markdown:
        markdown = markdown.replace(_CONFIG, config_reference())
    if _STUDY in markdown:
        markdown = markdown.replace(_STUDY, study_reference())
    if _CHOICES in markdown:
        markdown = markdown.replace(_CHOICES, choices_reference())
    if _RULES in markdown:
        markdown = markdown.replace(_RULES, rules_reference())
    texts = help_texts(_HELP.findall(markdown))
    return _HELP.sub(lambda match: texts[match["command"]], markdown)


def config_reference() -> str:
    """Return the config fields as Markdown, a table for each section, from the comments of the schema."""
    reference = importlib.import_module("rpt_jax.config.reference")
    sections: dict[str, list[str]] = {}
    for document in reference.field_docs():
        text = f"**[memory]** {document.text}" if document.memory else document.text
        row = f"| `{document.name}` | {document.type} | `{_cell(document.default)}` | {_cell(text)} |"
        sections.setdefault(document.name.rpartition(".")[0], []).append(row)
    introductions = reference.section_docs()
    tables = []
    for name, rows in sections.items():
        header = ["| field | type | default | description |", "|---|---|---|---|"]
        tables.append("\n".join([f"## {name or 'Top level'}", "", introductions.get(name, ""), "", *header, *rows]))
    return "\n\n".join(tables)


def study_reference() -> str:
    """Return the fields of a study's config as Markdown, a table for each dataclass, from their comments."""
    comments = importlib.import_module("rpt_jax.config.reference").comments
    config = importlib.import_module("rpt_jax.config.study")
    tables = []
    for schema in (config.StudyConfig, config.ArmConfig, config.StageConfig, config.SuiteConfig):
        texts = comments(schema)
        rows = [f"| `{field.name}` | {_cell(texts[field.name])} |" for field in dataclasses.fields(schema)]
        header = [f"## {schema.__name__}", "", schema.__doc__, "", "| field | description |", "|---|---|"]
        tables.append("\n".join([*header, *rows]))
    return "\n\n".join(tables)


def choices_reference() -> str:
    """Return the registered choices as Markdown, a table for each config field, from the functions' docstrings."""
    registry = importlib.import_module("rpt_jax.registry")
    tables = []
    for choices in registry.ALL_REGISTRIES:
        lines = [f"## {choices.field}", "", "| name | what it is | its fields |", "|---|---|---|"]
        for choice in choices.choices():
            schema = choice.requirements.options
            options = [f"`{option.name}` (option)" for option in dataclasses.fields(schema)] if schema else []
            fields = ", ".join([*(f"`{field}`" for field in choice.requirements.fields), *options])
            lines.append(f"| `{choice.name}` | {_cell(choice.summary)} | {fields} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def rules_reference() -> str:
    """Return the rules of the command `doctor` as a Markdown table, from the functions' docstrings."""
    rules = importlib.import_module("rpt_jax.diagnosis.rule").RULES
    lines = ["| rule | what it finds | tasks | needs |", "|---|---|---|---|"]
    for rule in rules.choices():
        needs = [f"`{metric}`" for metric in rule.requirements.metrics] + [f"{rule.requirements.steps} steps"]
        if rule.requirements.rpt_reward:
            needs.append(f'in task "rpt", `objective.reward="{rule.requirements.rpt_reward}"`')
        tasks = ", ".join(rule.requirements.tasks)
        lines.append(f"| `{rule.name}` | {_cell(rule.summary)} | {tasks} | {', '.join(needs)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def help_texts(commands: list[str]) -> dict[str, str]:
    """Return the output of `python -m COMMAND --help` for each command as a fenced block. Raises: CalledProcessError."""
    if not commands:
        return {}
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    run = [sys.executable, "-c", _PRINT_HELP, *commands]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *outputs, rest = done.stdout.replace(f"{ROOT}/", "").split("\0")
    assert not rest.strip() and len(outputs) == len(commands), rest
    return {command: f"```text\n{text.strip()}\n```" for command, text in zip(commands, outputs, strict=True)}
