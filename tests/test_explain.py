"""The command that explains a text: what it refuses, and which positions it chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rpt_jax import explain
from rpt_jax.errors import UserError
from rpt_jax.explanation import MAX_BYTES, Text, TokenScores, hardest_positions, positions_at, read_text, tokenize_text
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers.paths import CONFIGS, TINY

ENTROPIES = ([0.1, 3.0, 0.2, 2.0, 0.0], [4.0, 1.0, 0.3])
TEXT = Text("text", [np.array([5, 6, 7, 8, 9]), np.array([5, 6, 7])])
SCORES = [
    TokenScores(np.array(entropies), np.ones(len(entropies)), np.zeros(len(entropies), int)) for entropies in ENTROPIES
]
BOXABLE = np.arange(10) != 8


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"\xff\xfe", "UTF-8"), (b"a" * (MAX_BYTES + 1), "bytes"), (None, "cannot be read")],
)
def test_a_text_that_cannot_be_explained_is_refused(tmp_path: Path, data: bytes | None, complaint: str) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=complaint) as raised:
        read_text(path)
    assert raised.value.field == "--text"


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="has 0 tokens") as raised:
        tokenize_text(Path("text.txt"), "", load_tokenizer(TINY), 8)
    assert raised.value.field == "--text"


def test_a_long_text_is_divided_into_windows_of_all_its_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    path = tmp_path / "text.txt"
    path.write_text("Ümit has 93 - 38 = 55 apples and 12 pears.", encoding="utf-8")
    text = tokenize_text(path, read_text(path), tokenizer, 8)
    assert [len(ids) for ids in text.windows[:-1]] == [8] * (len(text.windows) - 1) and len(text.windows) > 2
    assert tokenizer.token_bytes(np.concatenate(text.windows)) == path.read_bytes()
    assert text.starts == list(range(0, 8 * len(text.windows), 8))


def test_the_hardest_positions_are_chosen_in_the_order_of_the_text() -> None:
    """Not those without a context, and not that of token 8, which no box can hold."""
    assert [p[:2] for p in hardest_positions(TEXT, SCORES, BOXABLE, 3, min_context=0)] == [(0, 1), (1, 1), (1, 2)]
    assert [p[:2] for p in hardest_positions(TEXT, SCORES, BOXABLE, 9, min_context=2)] == [(0, 2), (0, 4), (1, 2)]
    with pytest.raises(UserError, match="min_context=5"):
        hardest_positions(TEXT, SCORES, BOXABLE, 3, min_context=5)


def test_positions_are_given_by_the_number_of_their_token_in_the_text() -> None:
    assert positions_at(TEXT, SCORES, BOXABLE, [7, 1, 1]) == [(0, 1, 3.0), (1, 2, 0.3)]
    for number in (-1, 8, 0, 5, 3):
        with pytest.raises(UserError) as raised:
            positions_at(TEXT, SCORES, BOXABLE, [number])
        assert raised.value.field == "--at"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text=nowhere.txt", "--policy=nowhere"], "--text=nowhere.txt cannot be read"),
        (["--policy=nowhere"], "--policy='nowhere' does not exist"),
        (["--out=README.md/page.html"], "--out=README.md"),
        (["--policy=gs:/bucket/policy"], "URL"),
        (["--config.data.path=x"], "no effect"),
        (["--config.rollout.temperature=1"], "no effect"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config.prompt.template=nothing"], "prompt.template"),
        ([f"--config={CONFIGS / 'rft_tiny.py'}"], "{context}"),
    ],
)
def test_bad_command_lines_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(["explain", *arguments, "--compilation_cache=off"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "--positions=0",
        "--samples=x",
        "--temperature=0",
        "--temperature=inf",
        "--length=0",
        "--at=1,,2",
        "--seed=x",
        "--seed=-1",
        "--seed=4294967296",
    ],
)
def test_bad_numbers_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        explain.main(["explain", flag])
    assert exit_.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
