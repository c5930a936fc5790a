"""Files of sampled traces: what is refused, and what pre-training learns from them."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rpt_jax.config import DataConfig, Experiment, PretrainConfig
from rpt_jax.errors import UserError
from rpt_jax.model.transformer import Transformer
from rpt_jax.pretrain import mixed_loss
from rpt_jax.prompts.pretraining_examples import ExampleMaker
from rpt_jax.prompts.sampled_traces import (
    SampledOptions,
    TraceBatch,
    batch_path,
    check_sampled_traces,
    first_distinct,
    read_batch,
    traces_fingerprint,
    write_batch,
)
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from tests.helpers import policy_reference as reference
from tests.helpers.paths import TINY

TOKENIZER = load_tokenizer(TINY)
TRACES = [
    {"window": 0, "position": 3, "prompt": [1, 40, 41, 42, 4], "response": [50, 51, 5, 2]},
    {"question": "q", "prompt": [1, 60, 4], "response": [61, 2]},
]


def write_run(workdir: Path, traces: list[dict[str, Any]] = TRACES, tokenizer: str = TOKENIZER.fingerprint) -> Path:
    """Write what a finished run of task "traces" with one batch leaves."""
    workdir.mkdir(exist_ok=True)
    write_batch(batch_path(workdir, 0), TraceBatch(header={"tokenizer": tokenizer}, traces=traces))
    (workdir / "result.json").write_text("{}")
    return workdir


def config(*paths: Path, **changes: Any) -> PretrainConfig:
    options = SampledOptions(path=",".join(map(str, paths)))
    return PretrainConfig(traces="sampled", trace_options=options, **{"traces_per_window": 2, **changes})


def test_the_loss_on_a_sampled_trace_covers_its_response_only(tmp_path: Path) -> None:
    """Each trace is packed as a separate sequence: it starts at position 0 and does not attend to the window."""
    experiment = Experiment(pretrain=config(write_run(tmp_path / "run")))
    boxable_V = np.ones(TOKENIZER.vocab_size, bool)
    arrays = ExampleMaker(experiment, TOKENIZER, [np.arange(100, 140)], boxable_V).make(0, np.random.default_rng(0))
    found = []
    segments = arrays["trace_segment"]
    for segment in range(1, segments.max() + 1):
        of_trace = segments == segment
        size = of_trace.sum()
        np.testing.assert_array_equal(arrays["trace_position"][of_trace], np.arange(size))
        assert not arrays["trace_prefix"][of_trace].any()
        sequence = [*arrays["trace_inputs"][of_trace], arrays["trace_targets"][of_trace][-1]]
        mask = arrays["trace_mask"][of_trace]
        learned = arrays["trace_targets"][of_trace][mask].tolist()
        assert mask[-len(learned) :].all()
        found.append((list(map(int, sequence[: -len(learned)])), learned))
    assert sorted(found) == sorted((trace["prompt"], trace["response"]) for trace in TRACES)


def test_the_loss_is_that_of_each_prompt_with_its_response_alone(tmp_path: Path) -> None:
    """In NumPy, one sequence at a time; the traces share a row and a window, which must not matter."""
    policy = Transformer(dataclasses.replace(reference.SHAPE, layers=1, vocab=TOKENIZER.vocab_size))
    params = reference.random_params(policy, 0)
    experiment = Experiment(
        data=DataConfig(max_document_tokens=12),
        pretrain=config(write_run(tmp_path / "run"), rows_per_window=1, row_tokens=16),
    )
    boxable_V = np.ones(TOKENIZER.vocab_size, bool)
    arrays = ExampleMaker(experiment, TOKENIZER, [np.arange(100, 112)], boxable_V).make(0, np.random.default_rng(0))
    batch = {name: array[None] for name, array in arrays.items()}
    loss = jax.jit(mixed_loss, static_argnames=("policy", "weights", "balance_weight", "logit_chunk_tokens"))
    _, metrics = loss(policy, params, batch, weights=(1.0, 1.0), balance_weight=0.0, logit_chunk_tokens=64)
    nll = []
    for trace in TRACES:
        prompt, response = trace["prompt"], trace["response"]
        logprobs = reference.log_softmax(reference.logits(params, policy.config, [*prompt, *response]))
        nll += [-logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(response)]
    assert metrics["loss/trace"] == pytest.approx(np.mean(nll), rel=1e-5)


def test_traces_of_several_runs_are_learned_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [TRACES[i]]) for i in range(2)]
    experiment = Experiment(pretrain=config(*runs))
    boxable_V = np.ones(TOKENIZER.vocab_size, bool)
    arrays = ExampleMaker(experiment, TOKENIZER, [np.arange(100, 140)], boxable_V).make(0, np.random.default_rng(0))
    assert arrays["trace_mask"].sum() == sum(len(trace["response"]) for trace in TRACES)


def test_traces_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokenizer="another")
    with pytest.raises(UserError, match="another tokenizer") as raised:
        check_sampled_traces(config(run), TOKENIZER)
    assert raised.value.field == "pretrain.trace_options.path"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "not JSON"),
        (1, '{"format": 2, "traces": 2}'),
        (2, '{"prompt": [1, 2'),
        (3, '{"prompt": [1], "response": []}'),
        (3, '{"prompt": [1], "response": ["2"]}'),
        (2, None),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(tmp_path: Path, line: int, text: str | None) -> None:
    path = batch_path(write_run(tmp_path / "run"), 0)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(UserError, match=rf"{path.name}:{line} ") as raised:
        read_batch(path, "--workdir")
    assert raised.value.field == "--workdir"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\r\n"])
def test_texts_may_have_every_line_separator(tmp_path: Path, separator: str) -> None:
    trace = {**TRACES[1], "question": f"a{separator}b"}
    path = batch_path(write_run(tmp_path / "run", [trace, TRACES[0]]), 0)
    assert read_batch(path, "--workdir").traces == [trace, TRACES[0]]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = batch_path(write_run(tmp_path / "run"), 0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=path.name):
        check_sampled_traces(config(tmp_path / "run"), TOKENIZER)


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "result.json").unlink()
    with pytest.raises(UserError) as raised:
        check_sampled_traces(config(tmp_path / "run"), TOKENIZER)
    assert raised.value.field == "pretrain.trace_options.path"


@pytest.mark.parametrize(("row_tokens", "field"), [(16, None), (3, "pretrain.row_tokens")])
def test_traces_that_fit_in_no_row_are_left_out(tmp_path: Path, row_tokens: int, field: str | None) -> None:
    run = write_run(tmp_path / "run", TRACES[:1])
    if field is None:
        check_sampled_traces(config(run, row_tokens=row_tokens), TOKENIZER)
        return
    with pytest.raises(UserError) as raised:
        check_sampled_traces(config(run, row_tokens=row_tokens), TOKENIZER)
    assert raised.value.field == field


def test_the_first_distinct_responses_are_kept() -> None:
    assert first_distinct([[1, 2], [3], [1, 2], [4], [5]], 3) == [[1, 2], [3], [4]]
    assert first_distinct([], 3) == []


def test_a_file_does_not_depend_on_when_it_was_written(tmp_path: Path) -> None:
    first, second = (batch_path(write_run(tmp_path / name), 0) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    header = json.loads(gzip.decompress(first.read_bytes()).splitlines()[0])
    assert header["traces"] == len(TRACES)


def test_the_fingerprint_is_that_of_the_traces_that_are_learned(tmp_path: Path) -> None:
    first = config(write_run(tmp_path / "first"))
    prints = [
        traces_fingerprint(first, TOKENIZER),
        traces_fingerprint(config(write_run(tmp_path / "same")), TOKENIZER),
        traces_fingerprint(config(write_run(tmp_path / "other", TRACES[:1])), TOKENIZER),
        traces_fingerprint(dataclasses.replace(first, trace_weight=0.0), TOKENIZER),
    ]
    assert prints[0] == prints[1] != prints[2] != prints[3] == ""
