"""Plots of a run: the fit is Equation 5 and right, the files are made, and what is missing is named."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from absl import app
from hypothesis import strategies as st
from matplotlib.figure import Figure

from rpt_jax import report
from rpt_jax.errors import UserError
from rpt_jax.report import PowerLaw, fit_power_law, write_plots

DIRECT = {"easy": 0.42, "medium": 0.30, "hard": 0.21}
ALL = ["reward", "accuracy", "response_length", "scaling"]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    start=st.floats(1e6, 1e24),
    span=st.floats(5, 100),
    alpha=st.floats(0.1, 2.0),
    p_star=st.floats(0.1, 1.0),
    drop=st.floats(0.05, 0.9),
    count=st.integers(4, 12),
)
def test_known_parameters_come_back(
    start: float, span: float, alpha: float, p_star: float, drop: float, count: int
) -> None:
    flops_N = np.geomspace(start, start * span, count)
    true = PowerLaw(-drop * p_star * start**alpha, alpha, p_star, 1.0)
    law = fit_power_law(flops_N, true(flops_N))
    assert law is not None
    np.testing.assert_allclose([law.alpha, law.p_star], [alpha, p_star], rtol=1e-3)
    np.testing.assert_allclose(law.A, true.A, rtol=1e-2 * np.log(start))  # A carries the error of alpha times log C.
    np.testing.assert_allclose(law(flops_N), true(flops_N), atol=1e-6)
    assert law.r_squared > 1 - 1e-8


def test_a_noisy_fit_is_the_least_squares_optimum() -> None:
    flops_N = np.geomspace(1e20, 1e21, 9)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        accuracy_N = 0.45 - 0.3 * (flops_N / 1e20) ** -0.9 + 0.01 * rng.normal(size=9)
        law = fit_power_law(flops_N, accuracy_N)

        def curve(c: np.ndarray, a: float, alpha: float, p_star: float) -> np.ndarray:
            return a * (c / 1e20) ** -alpha + p_star

        best = min(
            np.sum((curve(flops_N, *parameters) - accuracy_N) ** 2)
            for alpha in (0.1, 0.5, 1.0, 2.0)
            for parameters, _ in [
                scipy.optimize.curve_fit(
                    curve, flops_N, accuracy_N, (-0.3, alpha, 0.5), bounds=([-99, 0.01, 0], [99, 5, 1]), max_nfev=10_000
                )
            ]
        )
        assert np.sum((law(flops_N) - accuracy_N) ** 2) <= best * (1 + 1e-6)
        assert law == fit_power_law(flops_N, accuracy_N)


def test_r_squared_is_one_minus_residual_over_total() -> None:
    flops_N = np.array([1.0, 2.0, 4.0, 8.0, 16.0]) * 1e15
    accuracy_N = np.array([0.10, 0.30, 0.20, 0.35, 0.30])
    law = fit_power_law(flops_N, accuracy_N)
    residual = sum((p - (law.A / c**law.alpha + law.p_star)) ** 2 for c, p in zip(flops_N, accuracy_N, strict=True))
    total = sum((p - 0.25) ** 2 for p in accuracy_N)
    assert law.r_squared == pytest.approx(1 - residual / total, abs=1e-9)
    assert 0.4 < law.r_squared < 0.9


def test_p_star_stays_a_probability() -> None:
    flops_N = np.geomspace(1e18, 1e21, 6)
    rising = fit_power_law(flops_N, 0.05 * np.arange(1, 7) ** 1.5)  # Speeds up: no ceiling at all fits best.
    falling = fit_power_law(flops_N, 0.4 - 0.015 * np.arange(6) ** 1.8)
    assert rising.p_star == 1.0
    assert rising.A < 0
    assert falling.p_star == 0.0
    assert falling.A > 0


def test_step_zero_and_too_few_points_are_left_out() -> None:
    flops = [0.0, 1e20, 2e20, 4e20, 8e20]
    accuracy = [0.9, 0.1, 0.2, 0.25, 0.27]
    assert fit_power_law(flops, accuracy) == fit_power_law(flops[1:], accuracy[1:])
    assert fit_power_law(flops[:4], accuracy[:4]) is None
    assert fit_power_law([1e20, 1e20, 2e20, 4e20], [0.1, 0.2, 0.3, 0.4]) is None
    assert fit_power_law(flops, [0.1, 0.2, 0.2, 0.2, 0.2]) is None
    assert fit_power_law([], []) is None


def _run(workdir: Path, steps: int, every: int, splits: tuple[str, ...] = report.DIFFICULTIES) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(steps + 1):
        line = {"step": step, "flops/train_total": 3e12 * step}
        if step:
            line |= {
                "reward/mean": 0.3 * step / steps + 0.02 * rng.uniform(),
                "length/mean": 40.0 - rng.uniform(),
                "ended/length": 0.1 * rng.uniform(),
            }
        if step % every == 0:
            line |= {f"eval/reasoning/{split}": DIRECT[split] * (1.1 - 1 / (1 + step)) for split in splits}
        lines.append(json.dumps(line))
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    direct = {
        split: {"accuracy": accuracy, "low": 0.0, "high": 1.0, "positions": 200}
        if split in splits
        else {"accuracy": None, "low": None, "high": None, "positions": 0}
        for split, accuracy in DIRECT.items()
    }
    (workdir / "result.json").write_text(json.dumps({"before": {"direct": direct}, "seed": 0}))
    return workdir


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Keeps the figures that would be saved, by name; drawing them is the slow part of a plot."""
    saved: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path: saved.__setitem__(Path(path).stem, self))
    return saved


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_plot_of_a_run_is_a_png_of_readable_size(tmp_path: Path) -> None:
    paths = write_plots(_run(tmp_path, steps=40, every=5))
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in ALL]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") >= 900


def test_legends_lie_inside_the_figure_and_outside_the_data(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_plots(_run(tmp_path, steps=40, every=5))
    for figure in figures.values():
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend, data = axes.get_legend().get_window_extent(), axes.get_window_extent()
            title = axes._left_title.get_window_extent()
            assert data.y1 <= legend.y0 + 1 and legend.y1 <= title.y0 + 1 and title.y1 <= figure.bbox.y1
            assert legend.x1 <= figure.bbox.x1 and data.width > 0.8 * figure.bbox.width


def test_the_curves_are_the_run(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_plots(_run(tmp_path, steps=40, every=5))
    (accuracy,) = figures["accuracy"].axes
    easy = next(line for line in accuracy.lines if line.get_label() == "easy")
    np.testing.assert_array_equal(easy.get_xdata(), range(0, 41, 5))
    np.testing.assert_allclose(easy.get_ydata(), [42 * (1.1 - 1 / (1 + step)) for step in range(0, 41, 5)])
    dashed = [line for line in accuracy.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    levels = {line.get_color(): line.get_ydata()[0] for line in dashed}
    assert levels == {report.COLORS[split]: 100 * accuracy for split, accuracy in DIRECT.items()}
    points = next(line for line in figures["scaling"].axes[0].lines if line.get_label().startswith("hard"))
    np.testing.assert_allclose(points.get_xdata(), [3e12 * step for step in range(5, 41, 5)])
    assert all("R^2 = 0.9" in label or "R^2 = 1.0" in label for label in _legend(figures["scaling"]))


def test_the_moving_mean_is_centred_and_cut_off_at_the_ends() -> None:
    values_N = np.random.default_rng(0).uniform(size=140)
    smooth_N, width = report._smooth(values_N)
    assert width == 7
    expected = [values_N[max(0, i - 3) : i + 4].mean() for i in range(140)]
    np.testing.assert_allclose(smooth_N, expected)
    for count in range(1, 12):
        smooth_N, width = report._smooth(np.full(count, 2.0))
        np.testing.assert_allclose(smooth_N, np.full(count, 2.0))


def test_a_run_with_little_in_it_gets_the_plots_that_can_be_made(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_plots(_run(tmp_path / "one_evaluation", steps=3, every=100))
    assert sorted(figures) == sorted(set(ALL) - {"scaling"})
    figures.clear()
    write_plots(_run(tmp_path / "few_evaluations", steps=30, every=10, splits=("easy", "hard")))
    assert sorted(figures) == sorted(ALL)
    labels = [label.split(":") for label in _legend(figures["scaling"])]
    assert [(split, text[:7]) for split, text in labels] == [("easy", " no fit"), ("hard", " no fit")]
    assert _legend(figures["accuracy"]) == ["easy", "hard", "base policy, without reasoning"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (_run(tmp_path, steps=2, every=1) / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        write_plots(tmp_path)


@pytest.mark.parametrize("key", ["reward/mean", "length/mean", "ended/length", "eval/reasoning", "flops/train_total"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = _run(tmp_path, steps=2, every=1) / "metrics.jsonl"
    path.write_text(path.read_text().replace(key, "other"))
    with pytest.raises(UserError, match=rf"metrics\.jsonl has no line with .*{key}"):
        write_plots(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"before": {}}', '{"before": {"direct": {"easy": {"accuracy": 0.4, "positions": 9}}}}',
        '{"before": {"direct": {"easy": {}, "medium": {}, "hard": {}}}}',
        '{"before": {"direct": {"easy": {"accuracy": null, "positions": 9}}}}',
    ],
)  # fmt: skip
def test_a_result_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (_run(tmp_path, steps=2, every=1) / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result\.json does not hold a number before\.direct\.SPLIT\.accuracy"):
        write_plots(tmp_path)


def test_a_run_without_a_complete_step_is_named(tmp_path: Path) -> None:
    (_run(tmp_path, steps=2, every=1) / "metrics.jsonl").write_text('{"step": ')
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no complete step"):
        write_plots(tmp_path)


def test_the_command_prints_what_it_made(
    tmp_path: Path, figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path, steps=8, every=2)
    monkeypatch.setattr(report.flags, "FLAGS", types.SimpleNamespace(workdir=str(run)))
    report._main(["report"])
    assert capsys.readouterr().out.splitlines() == [str(run / "plots" / f"{name}.png") for name in ALL]
    with pytest.raises(app.UsageError, match="unexpected arguments"):
        report._main(["report", "run"])


def test_the_command_says_what_is_missing_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpt_jax.report", f"--workdir={tmp_path / 'absent'}"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "metrics.jsonl is missing" in failed.stderr
    assert "Traceback" not in failed.stderr
