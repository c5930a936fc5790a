"""metrics.jsonl and TensorBoard: exact on resume, finite, and with the same scalars."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rpt_jax.errors import UserError
from rpt_jax.infra import metrics
from rpt_jax.infra.metrics import MetricsWriter, read_metrics
from tests.helpers.runs import tensorboard_events


class NoTensorBoard:
    """Replaces TensorBoard's writer where a test opens hundreds: each real one has a thread and a file."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def add_scalar(self, *_: object) -> None: ...

    def close(self) -> None: ...


def make_scalars(step: int) -> dict[str, float]:
    return {"reward/mean": 1.0 / (step + 3), "eval/x": 1e-300 * step, "flops/train_total": 3.1e20 * step}


def write_steps(workdir: Path, steps: range, resume_step: int = -1) -> bytes:
    with MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, make_scalars(step))
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorboardX.SummaryWriter", NoTensorBoard)


def test_a_line_is_sorted_exact_and_written_immediately(tmp_path: Path) -> None:
    third = float(np.float32(1) / np.float32(3))
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(0, {"zeta": np.float32(third), "alpha": 0.1, "speed/count": 7})
        line = (tmp_path / "metrics.jsonl").read_text()
    assert line == f'{{"alpha": 0.1, "speed/count": 7.0, "step": 0, "zeta": {third!r}}}\n'
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"alpha": 0.1, "speed/count": 7.0, "step": 0, "zeta": third}]


def test_tensorboard_has_the_same_scalars_and_one_curve_after_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4))
    first = [(e.step, v.tag, v.simple_value) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    expected = [(step, tag, value) for step in range(4) for tag, value in sorted(make_scalars(step).items())]
    assert [row[:2] for row in first] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in first], [row[2] for row in expected], rtol=1e-6, atol=1e-30)

    for path in (tmp_path / "tensorboard").iterdir():
        os.truncate(path, path.stat().st_size // 3)  # A killed run has not flushed everything.
    write_steps(tmp_path, range(2, 4), resume_step=1)
    again = [(e.step, v.tag, v.simple_value) for e in tensorboard_events(tmp_path) for v in e.summary.value]
    assert again == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_nan_is_named_and_not_written(tmp_path: Path, no_tensorboard: None, bad: float) -> None:
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(6, {"loss": 1.0})
        with pytest.raises(FloatingPointError, match=r"^step 7: grad/norm=(nan|-?inf), loss=(nan|-?inf)$"):
            writer.write(7, {"reward/mean": 0.5, "loss": bad, "grad/norm": bad})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [6]


def test_steps_must_increase_and_no_scalar_may_be_called_step(tmp_path: Path, no_tensorboard: None) -> None:
    with MetricsWriter(tmp_path, 4) as writer:
        for step, scalars in ((4, {}), (3, {}), (5, {"step": 1.0})):
            with pytest.raises(ValueError, match=f"step {step}"):
                writer.write(step, scalars)
        writer.write(5, {})
        with pytest.raises(ValueError, match="step 5"):
            writer.write(5, {})


def test_resume_after_a_kill_at_any_byte_gives_the_uninterrupted_file(
    tmp_path_factory: pytest.TempPathFactory, no_tensorboard: None
) -> None:
    whole = write_steps(tmp_path_factory.mktemp("whole"), range(6))
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]

    @hypothesis.settings(deadline=None, max_examples=60)
    @hypothesis.given(cut=st.integers(0, len(whole)), data=st.data())
    def check(cut: int, data: st.DataObject) -> None:
        # A step is complete when its line is; only the newline may be missing.
        complete = sum(end - 1 <= cut for end in ends)
        resume_step = data.draw(st.integers(-1, complete - 1))
        workdir = tmp_path_factory.mktemp("cut")
        path = workdir / "metrics.jsonl"
        path.write_bytes(whole[:cut])
        assert [line["step"] for line in read_metrics(path)] == list(range(complete))
        assert write_steps(workdir, range(resume_step + 1, 6), resume_step) == whole
        assert [child.name for child in workdir.iterdir()] == ["metrics.jsonl"]

    check()


def test_a_kill_while_truncating_keeps_the_old_file(
    tmp_path: Path, no_tensorboard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_steps(tmp_path, range(5))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert write_steps(tmp_path, range(2, 5), resume_step=1) == whole


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "a"', b"", b"7", b"[]", b'{"a": 1.0}', b'{"step": 1.5}', b'{"step": 1, "a": NaN}',
             b'{"step": 1, "a": "x"}', b"\xff\xfe", b"\x00" * 8, b'{"step": 0}']
)  # fmt: skip
def test_a_corrupt_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    for use in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, 2)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: ") as raised:
            use()
        assert raised.value.field == str(path)
    assert path.read_bytes() == b'{"step": 0}\n' + line + b'\n{"step": 2}\n'


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")
    assert raised.value.field == str(tmp_path / "nowhere" / "metrics.jsonl")
