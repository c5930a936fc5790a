"""Splitting texts into chunks."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_jax.corpus import text_splitting
from rpt_jax.corpus.text_splitting import split_text


@given(st.text(alphabet="ab \t\r\n\u2028", max_size=200))
@settings(deadline=None, max_examples=200)
def test_chunks_are_short_and_joined_give_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_splitting, "CHUNK_CHARACTERS", 20)
        chunks = list(split_text(text))
    assert "".join(chunks) == text
    for chunk in chunks:
        assert chunk and (len(chunk) <= 20 or len(re.findall(r"[^ \t\r\n]+", chunk)) <= 1)
    for before, after in zip(chunks, chunks[1:], strict=False):
        assert not (before.endswith("\r") and after.startswith("\n")), "a line end was split"


def test_chunks_end_at_blank_lines_where_possible() -> None:
    paragraphs = ["a" * 900 + "\n\n", "b" * 900 + "\n  \n", "c" * 900 + "\r\n\r\n", "d" * 1500]
    assert list(split_text("".join(paragraphs))) == [paragraphs[0] + paragraphs[1], paragraphs[2], paragraphs[3]]
