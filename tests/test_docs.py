"""The pages of docs/ say what the code does: the reading of predictions, and the commands on them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from rpt_jax import evaluate, main
from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.config.loading import load_study, split_overrides
from rpt_jax.corpus import store
from rpt_jax.errors import UserError
from rpt_jax.evaluation.run import check_task
from rpt_jax.evaluation.suite import SUITES
from rpt_jax.infra import run_format
from rpt_jax.rewards.prefix_match import Status, prefix_match_reward
from rpt_jax.study import __main__ as study
from rpt_jax.study.plan import check_stages
from tests.helpers.paths import ROOT


def reward_and_status(response: bytes, finished: bool, continuation: list[bytes]) -> tuple[float, Status]:
    """Score one response with the compiled reward; its tokens are single bytes."""
    tokens = np.frombuffer(response.ljust(64, b"\0"), np.uint8).astype(np.int32)
    text = b"".join(continuation).ljust(32, b"\0")
    boundaries = np.zeros(33, bool)
    boundaries[np.cumsum([len(token) for token in continuation])] = True
    reward_1x1, status_1x1 = prefix_match_reward(
        tokens[None, None],
        np.array([[len(response)]], np.int32),
        np.array([[finished]]),
        np.frombuffer(text, np.uint8)[None],
        boundaries[None],
        np.arange(256, dtype=np.uint8)[:, None],
        np.ones(256, np.int32),
        -1,
    )
    return float(reward_1x1[0, 0]), Status(int(status_1x1[0, 0]))


def test_the_examples_of_the_reward_page_are_read_as_it_says() -> None:
    page = (ROOT / "docs" / "concepts" / "reward.md").read_text()
    rows = re.findall(r"^\| `(.+?)`(.*?) \| .*? ?\| `(\w+)`.*? \| ([01]) \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 10
    for response, remark, status, reward in rows:
        finished = "length limit" not in remark
        result = reward_and_status(f"</think>{response}".encode(), finished, [b" size", b" and", b" decreases"])
        assert result == (float(reward), Status[status.upper()]), response


def test_the_pages_have_the_formats_of_today() -> None:
    resume, corpus = (
        (ROOT / "docs" / path).read_text() for path in ("concepts/resume.md", "guides/prepare-a-corpus.md")
    )
    assert re.findall(r"format of run directories\s+is (\d+); prepared corpora have their own, (\d+)", resume) == [
        (str(run_format.FORMAT), str(store.FORMAT))
    ]
    assert re.findall(r"`manifest.json` \| format \((\d+)\)", corpus) == [str(store.FORMAT)]


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """Return the commands on a page that name a config of this repository or results: the module of each, and its arguments."""
    text = page.read_text().replace("\\\n", " ")
    commands = []
    # Two spaces, as before a remark, end a command.
    for module, arguments in re.findall(
        r"(?:python -m rpt_jax\.(\w+)|bash launch/local\.sh) ((?:[^`\s]| (?! ))+)", text
    ):
        words = shlex.split(arguments, comments=True)
        configs = [ROOT / word.partition("=")[2] for word in words if word.startswith("--config=")]
        # Those of examples/ register choices, which would be there in other tests of the process.
        has_config = any(config.is_file() and config.parent == ROOT / "configs" for config in configs)
        has_results = module == "evaluate" and "--results" in arguments
        if has_config or has_results:
            commands.append((module or "main", words))
    return commands


def check_command(module: str, arguments: list[str]) -> None:
    """Check that a command can be run, up to the files that it names: flags and config fields exist and have an effect."""
    overrides, flags = split_overrides(arguments)
    if module == "main":
        main.load_experiment(["main", *arguments])
    elif module == "study":
        check_stages(load_study(study.make_parser().parse_args(flags).config))
    elif module == "evaluate":
        options = evaluate.make_parser().parse_args(flags)
        assert SUITES[options.suite].requirements.policy == bool(options.config) != bool(options.results)
        if options.results:
            return
        experiment = from_config_dict(load_config_file(options.config), overrides, options.suite)
        check_task(options.suite, experiment)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]


def test_every_command_of_the_pages_can_be_run() -> None:
    commands = {page: commands_of(page) for page in PAGES}
    assert len(commands[ROOT / "docs" / "guides" / "reproduce.md"]) >= 12
    assert sum(map(len, commands.values())) >= 80
    for page, found in commands.items():
        for module, arguments in found:
            try:
                check_command(module, arguments)
            except UserError as error:
                pytest.fail(f"{page.relative_to(ROOT)}: {module} {shlex.join(arguments)}: {error}")
