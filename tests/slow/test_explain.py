"""The page of a text, from the command line to a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rpt_jax import explain
from rpt_jax.infra.run_format import format_stamp
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.hf_models import tokenizer_spec, write_gguf
from tests.helpers.run_pages import HOSTILE

pytestmark = pytest.mark.slow
FAST = (
    "--samples=2",
    "--length=16",
    "--config.data.max_document_tokens=64",
    "--config.prompt.max_tokens=80",
    "--compilation_cache=off",
)
MAX_BYTES = 10_000_000


def run(*arguments: str) -> int:
    return explain.main(["explain", *arguments, *FAST])


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_hostile_text_is_explained_and_runs_no_script(tmp_path: Path) -> None:
    text = tmp_path / "<img src=x onerror=alert(1)>.txt"
    text.write_text(f"{HOSTILE} Ümit has 93 - 38 = 55 apples. {HOSTILE}")
    out = tmp_path / "page.html"
    assert run(f"--text={text}", f"--out={out}", "--positions=3", "--config.data.min_context=8") == 0
    data = data_of(out)
    windows, groups = data["windows"], data["groups"]
    assert "".join("".join(window["tokens"]) for window in windows) == text.read_text()
    assert len(windows) > 1 and out.stat().st_size < MAX_BYTES
    assert [len(group["samples"]) for group in groups] == [2] * 3

    # The chosen positions have the highest entropies of all with a context.
    chosen = {(group["window"], group["position"]) for group in groups}
    entropies = {(w["window"], i): e for w in windows for i, e in enumerate(w["entropy"]) if i >= 8}
    assert min(entropies[place] for place in chosen) >= np.quantile(list(entropies.values()), 0.9)
    for window in windows:
        right = [likeliest == token for likeliest, token in zip(window["likeliest"], window["tokens"], strict=True)]
        assert right == [bool(value) for value in window["right"]]

    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with browser(tmp_path / "profile") as page:
        for width, dark in ((1280, False), (390, True)):
            page.open(out.as_uri(), width=width, dark=dark)
            assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("document.querySelectorAll('.js-plotly-plot').length") == 2
            assert page.run("document.querySelectorAll('#position .sample').length") == 2
            page.run("document.querySelector('#positions-table button').click()")
            first = page.run("document.querySelector('#position h3').textContent")
            page.run(
                "document.getElementById('document').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
            )
            assert page.run("document.querySelector('#position h3').textContent") != first
            for color in ("direct", "probability", "reasoning"):
                page.run(f"document.getElementById('color').value = '{color}'")
                page.run("document.getElementById('color').dispatchEvent(new Event('change'))")
                assert page.run("document.querySelectorAll('#document [style]').length") > 0
            assert "broken" not in page.run("document.title") and page.run("document.images.length") == 0
            assert page.errors == []


def test_positions_can_be_given_and_a_seed_repeats_the_page(tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("a.html", "b.html", "c.html")]
    for page, seed in zip(pages, (1, 1, 2), strict=True):
        assert run("--at=20,50", "--temperature=3", f"--seed={seed}", f"--out={page}") == 0
    first, again, other = map(data_of, pages)
    assert [(group["window"], group["position"]) for group in first["groups"]] == [(0, 20), (0, 50)]
    assert first == again and first != other


def write_policy(directory: Path) -> Path:
    """Write a random policy whose tokenizer has no <think>, and return its directory."""
    write_gguf(directory.parent / "policy.gguf")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    return directory


def test_a_policy_without_the_token_that_the_prompt_needs_is_refused(tmp_path: Path, capsys) -> None:
    policy = write_policy(tmp_path / "policy")
    assert run(f"--policy={policy}", f"--out={tmp_path / 'page.html'}") == 2
    assert "prompt.prefill_think_token" in capsys.readouterr().err
    assert (
        run(f"--policy={policy}", f"--out={tmp_path / 'page.html'}", "--config.prompt.prefill_think_token=False") == 0
    )


def test_a_run_is_explained_with_its_own_prompts(tmp_path: Path, capsys) -> None:
    """A run that has no policy yet is refused, and so is the config of one that asks questions."""
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    content = {**format_stamp(), "config": {"task": "rpt", "prompt.prefill_think_token": False}}
    (run_directory / "run_config.json").write_text(json.dumps(content))
    assert run(f"--policy={run_directory}", f"--out={tmp_path / 'page.html'}") == 2
    assert "no policy/ yet" in capsys.readouterr().err
    write_policy(run_directory / "policy")
    assert run(f"--policy={run_directory}", f"--out={tmp_path / 'page.html'}") == 0
