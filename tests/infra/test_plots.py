"""Plots of a run: files are written, missing data is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from rpt_jax.errors import UserError
from rpt_jax.infra.plots import COLORS, moving_mean, write_entropy_plot, write_plots
from tests.helpers.plots import BASE_ACCURACY, PLOTS, keep_figures, write_run


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_plot_is_a_png_of_readable_size(tmp_path: Path) -> None:
    paths = write_plots(write_run(tmp_path, steps=40, every=5))
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in PLOTS]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") >= 900


def test_legends_are_inside_the_figure_and_outside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = keep_figures(monkeypatch)
    write_plots(write_run(tmp_path, steps=40, every=5))
    for figure in figures.values():
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend, data = axes.get_legend().get_window_extent(), axes.get_window_extent()
            [title] = [t.get_window_extent() for t in axes.findobj(Text) if t.get_text() == axes.get_title("left")]
            assert data.y1 <= legend.y0 + 1 and legend.y1 <= title.y0 + 1 and title.y1 <= figure.bbox.y1
            assert legend.x1 <= figure.bbox.x1 and data.width > 0.8 * figure.bbox.width


def test_the_curves_show_the_metrics_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = keep_figures(monkeypatch)
    write_plots(write_run(tmp_path, steps=40, every=5))
    (accuracy,) = figures["accuracy"].axes
    easy = next(line for line in accuracy.lines if line.get_label() == "easy")
    np.testing.assert_array_equal(easy.get_xdata(), range(0, 41, 5))
    np.testing.assert_allclose(easy.get_ydata(), [42 * (1.1 - 1 / (1 + step)) for step in range(0, 41, 5)])
    dashed = [line for line in accuracy.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    levels = {line.get_color(): line.get_ydata()[0] for line in dashed}
    assert levels == {COLORS[level]: 100 * accuracy for level, accuracy in BASE_ACCURACY.items()}
    points = next(line for line in figures["scaling"].axes[0].lines if line.get_label().startswith("hard"))
    np.testing.assert_allclose(points.get_xdata(), [3e12 * step for step in range(5, 41, 5)])
    *fits, before = legend_of(figures["scaling"])
    assert before == "before training" and all("R^2 = 0.9" in label or "R^2 = 1.0" in label for label in fits)
    dotted = [
        line for line in figures["scaling"].axes[0].lines if line.get_linestyle() == ":" and len(line.get_ydata())
    ]
    assert [line.get_ydata()[0] for line in dotted] == [pytest.approx(10 * value) for value in BASE_ACCURACY.values()]
    assert figures["scaling"].axes[0].get_xlim()[0] > 0.9 * 3e12 * 5


def test_the_moving_mean_is_centered_and_truncated_at_the_ends() -> None:
    values_N = np.random.default_rng(0).uniform(size=140)
    smooth_N, width = moving_mean(values_N)
    assert width == 7
    expected = [values_N[max(0, i - 3) : i + 4].mean() for i in range(140)]
    np.testing.assert_allclose(smooth_N, expected)
    for count in range(1, 12):
        smooth_N, width = moving_mean(np.full(count, 2.0))
        np.testing.assert_allclose(smooth_N, np.full(count, 2.0))


def test_a_short_run_gets_the_plots_that_its_metrics_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = keep_figures(monkeypatch)
    write_plots(write_run(tmp_path / "one_evaluation", steps=3, every=100))
    assert sorted(figures) == sorted(set(PLOTS) - {"scaling"})
    figures.clear()
    write_plots(write_run(tmp_path / "few_evaluations", steps=30, every=10, levels=("easy", "hard")))
    assert sorted(figures) == sorted(PLOTS)
    labels = [label.split(":") for label in legend_of(figures["scaling"])]
    assert [(label[0], label[1:]) for label in labels[:2]] == [
        (level, [" not determined by these evaluations"]) for level in ("easy", "hard")
    ]
    assert legend_of(figures["accuracy"]) == ["easy", "hard", "base policy, without reasoning"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path, steps=2, every=1) / name).unlink()
    with pytest.raises(UserError) as raised:
        write_plots(tmp_path)
    assert raised.value.field == str(tmp_path / name)


@pytest.mark.parametrize(
    "key", ["reward/drawn_mean", "length/mean", "ended/length", "eval/reasoning", "flops/train_total"]
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_run(tmp_path, steps=2, every=1) / "metrics.jsonl"
    path.write_text(path.read_text().replace(key, "other"))
    with pytest.raises(UserError, match=rf"metrics\.jsonl has no line with .*{key}") as raised:
        write_plots(tmp_path)
    assert raised.value.field == str(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"before": {}}', '{"before": {"direct": {"easy": {"accuracy": 0.4, "positions": 9}}}}',
        '{"before": {"direct": {"easy": {}, "medium": {}, "hard": {}}}}',
        '{"before": {"direct": {"easy": {"accuracy": null, "positions": 9}}}}',
    ],
)  # fmt: skip
def test_an_invalid_result_file_is_named(tmp_path: Path, text: str) -> None:
    (write_run(tmp_path, steps=2, every=1) / "result.json").write_text(text)
    with pytest.raises(UserError) as raised:
        write_plots(tmp_path)
    assert raised.value.field == str(tmp_path / "result.json")


def test_a_run_without_a_complete_step_is_named(tmp_path: Path) -> None:
    (write_run(tmp_path, steps=2, every=1) / "metrics.jsonl").write_text('{"step": ')
    with pytest.raises(UserError) as raised:
        write_plots(tmp_path)
    assert raised.value.field == str(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("rewards", [(-0.5, -0.1), (-0.5, 0.1), (0.0, 0.0), (0.1, 0.5)])
def test_the_whole_curve_of_the_reward_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewards: tuple[float, float]
) -> None:
    figures = keep_figures(monkeypatch)
    run = write_run(tmp_path, steps=2, every=1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "reward/drawn_mean" in line:
            line["reward/drawn_mean"] = rewards[line["step"] % 2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_plots(run)
    low, high = figures["reward"].axes[0].get_ylim()
    assert low <= min(0.0, *rewards) <= max(0.0, *rewards) <= high and low < high


def test_the_entropies_of_hard_positions_are_visible_beside_many_easy_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = keep_figures(monkeypatch)
    counts_N = np.array([90_000, 5_000, 300, 20, 0, 1])
    path = write_entropy_plot(tmp_path / "plots", counts_N, 0.5, {"0.5": 0.05, "1.0": 0.003, "1.5": 0.0002})
    assert path == tmp_path / "plots" / "entropy.png"
    (axes,) = figures["entropy"].axes
    assert axes.get_yscale() == "log"
    figures["entropy"].draw_without_rendering()
    low, high = axes.get_ylim()
    assert low < 100 * 1 / counts_N.sum() and high > 100 * 90_000 / counts_N.sum()
