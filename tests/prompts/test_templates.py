"""Built-in prompt templates, and template files."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import read_template
from rpt_jax.registry import PROMPT_TEMPLATES


def test_built_in_templates_are_readable() -> None:
    assert {"plain", "v0"} <= set(PROMPT_TEMPLATES)
    for choice in PROMPT_TEMPLATES.choices():
        slot = "question" if "{question}" in choice.function() else "context"
        assert len(read_template(choice.name, slot)) == 2
    assert read_template("plain") == ("", "")


def test_a_template_file_is_read_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes("\ufeff Q:\r\n{context}\n A:\t".encode())
    assert read_template(str(path)) == ("\ufeff Q:\r\n", "\n A:\t")


def test_a_misspelled_template_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean 'plain'") as raised:
        read_template("plian")
    assert raised.value.field == "prompt.template"


@pytest.mark.parametrize("content", [b"no slot", b"{context} twice {context}", b"abc\xff{context}", None])
def test_unusable_template_files_are_rejected(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "template.txt"
    if content is None:
        path.mkdir()  # A directory is not a readable file.
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_template(str(path))
    assert raised.value.field == "prompt.template"


def test_the_error_locates_invalid_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"abc\xff{context}")
    with pytest.raises(UserError, match=r"latin1\.txt' is not UTF-8 \(byte 3\)"):
        read_template(str(path))
