"""The pages of docs/ say what the code does: the reading of predictions, and the commands of the paper's results."""

from __future__ import annotations

import re

import numpy as np

from rpt_jax import evaluate, main
from rpt_jax.config import from_config_dict, load_config_file
from rpt_jax.config.loading import split_overrides
from rpt_jax.config.study import load_study
from rpt_jax.corpus import store
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


def test_every_command_of_the_papers_results_can_be_run() -> None:
    """Up to the files that it names: flags and config fields exist and have an effect."""
    page = (ROOT / "docs" / "guides" / "reproduce.md").read_text()
    commands = re.findall(r"`python -m rpt_jax\.(\w+) ([^`]+)`", page)
    assert len(commands) == page.count("python -m rpt_jax") >= 12
    for module, arguments in commands:
        overrides, flags = split_overrides(arguments.split())
        if module == "main":
            main.load_experiment(["main", *arguments.split()])
            continue
        if module == "study":
            check_stages(load_study(study.make_parser().parse_args(flags).config))
            continue
        options = evaluate.make_parser().parse_args(flags)
        assert SUITES[options.suite].requirements.policy == bool(options.config) != bool(options.results)
        if options.config:
            experiment = from_config_dict(load_config_file(options.config), overrides, options.suite)
            check_task(options.suite, experiment)
