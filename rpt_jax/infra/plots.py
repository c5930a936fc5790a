"""Plots of a run and of a corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rpt_jax.config.difficulty import DIFFICULTIES
from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.infra.run_format import METRICS
from rpt_jax.infra.scaling_laws import NotDetermined, PowerLaw, fit_power_law
from rpt_jax.infra.workdir import RESULT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Metrics of the accuracy on test questions: its value and the ends of its interval.
QUESTION_ACCURACY = ("eval/questions/accuracy", "eval/questions/accuracy/low", "eval/questions/accuracy/high")
_REWARD = "reward/drawn_mean"
_ONE_RUN = (
    "This is one run: how its accuracy grew, and how closely a power law follows that.\n"
    "Its evaluations are not independent. It does not show what other seeds, more compute or a larger policy would reach."
)
PLOTS = "plots"  # Directory of the plots in that of the run.
# Distinguishable by color-blind readers (Okabe and Ito), and by marker when printed in gray.
COLORS = {"easy": "#0072B2", "medium": "#E69F00", "hard": "#C4457C"}
MARKERS = {"easy": "o", "medium": "s", "hard": "^"}
INK = "#33658A"
DASHES = (0, (5, 3))
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "lines.linewidth": 2,
    "legend.frameon": False,
}


def write_plots(workdir: Path) -> list[Path]:
    """Write the plots of a run to `workdir/plots/` and return their paths.

    These are `reward.png`, `accuracy.png`, `response_length.png` and, if positions of text were evaluated after the first update,
    `scaling.png`. A difficulty without positions is left out, and so is a fit that the evaluations do not determine.

    Raises:
      UserError: `metrics.jsonl` or `result.json` is missing, corrupt, or lacks what the plots need.
    """
    import matplotlib

    workdir = Path(workdir)
    metrics = _Metrics(workdir / METRICS)
    metrics.required(_REWARD)  # Before `result.json` is read: those of other tasks have no accuracy.
    on_questions = bool(metrics.columns(*QUESTION_ACCURACY).size)
    direct = {} if on_questions else _base_accuracy(workdir / RESULT)
    directory = workdir / PLOTS
    directory.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "reward": _plot_reward(metrics, "questions" if on_questions else "positions"),
            "accuracy": _plot_question_accuracy(metrics) if on_questions else _plot_accuracy(metrics, direct),
            "response_length": _plot_response_length(metrics),
            "scaling": None if on_questions else _plot_scaling(metrics),
        }
        paths = []
        for name, figure in figures.items():
            if figure is not None:
                paths.append(directory / f"{name}.png")
                figure.savefig(paths[-1])
    return paths


def write_entropy_plot(directory: Path, counts_N: np.ndarray, bin_width: float, fractions: Mapping[str, float]) -> Path:
    """Plot the distribution of a corpus' entropies to `directory/entropy.png` and return its path.

    The fractions have a logarithmic axis, because most positions are easy and would hide the others.

    Args:
      directory: is made if it does not exist.
      counts_N: positions in each bin of entropy, from 0 nats on.
      bin_width: width of a bin in nats.
      fractions: fraction of positions above each threshold (nats, as text).
    """
    import matplotlib

    edges_N = bin_width * np.arange(len(counts_N))
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure()
        axes.bar(edges_N, 100 * counts_N / max(1, counts_N.sum()), width=bin_width, align="edge", color=INK)
        for (threshold, fraction), color in zip(fractions.items(), COLORS.values(), strict=True):
            axes.axvline(
                float(threshold), color=color, linestyle=DASHES, label=f"{fraction:.1%} above {threshold} nats"
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(0, float(edges_N[np.flatnonzero(counts_N).max(initial=0)]) + bin_width)
        axes.set_xlabel("entropy of the proxy's likeliest next tokens (nats)")
        _finish(axes, "How hard positions are", "fraction of positions (%)")
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "entropy.png"
        figure.savefig(path)
    return path


def write_bar_plot(
    path: Path, title: str, y_label: str, groups: Sequence[str], bars: Mapping[str, Sequence[float]]
) -> None:
    """Plot groups of bars next to each other.

    Args:
      path: of the image.
      title, y_label: texts; the values are shown in percent.
      groups: names below the axis.
      bars: for each name in the legend, a value in [0, 1] for each group.
    """
    import matplotlib

    width = 0.8 / len(bars)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure()
        for i, ((name, values), color) in enumerate(zip(bars.items(), COLORS.values(), strict=False)):
            offsets_N = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
            axes.bar(offsets_N, 100 * np.array(values), width=width, color=color, label=name)
        axes.set_xticks(range(len(groups)), groups)
        _finish(axes, title, f"{y_label} (%)", columns=1)
        figure.savefig(path)


def moving_mean(values_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the centered moving mean over a twentieth of the steps, truncated at the ends, and its odd width."""
    width = min(len(values_N), max(5, len(values_N) // 20)) // 2 * 2 + 1
    box = np.ones(width)
    inside = slice(width // 2, width // 2 + len(values_N))
    counts_N = np.convolve(np.ones_like(values_N), box)[inside]
    return np.convolve(values_N, box)[inside] / counts_N, width


class _Metrics:
    """Columns of a `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = read_metrics(path)
        if not self._lines:
            raise UserError(
                f"{path} contains no complete step. Plots need a run with at least one step.", field=str(path)
            )
        self.last_step = max(1, self._lines[-1]["step"])

    def columns(self, *keys: str) -> np.ndarray:
        """Return [len(keys), N]: the values of `keys` at the N lines that have all of them."""
        rows = [[line[key] for key in keys] for line in self._lines if all(key in line for key in keys)]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(keys)).T

    def required(self, *keys: str) -> np.ndarray:
        """Return `columns(*keys)`. Raises UserError if no line has all keys."""
        columns_KxN = self.columns(*keys)
        if not columns_KxN.size:
            raise UserError(
                f"{self._path} has no line with {' and '.join(keys)}. Only runs of tasks 'rpt' and 'rft' have plots.",
                field=str(self._path),
            )
        return columns_KxN

    def evaluations(self, x: str) -> dict[str, np.ndarray]:
        """Return [2, N] for each difficulty that was evaluated: the key `x`, and the accuracy by reasoning in percent."""
        found = {level: self.columns(x, f"eval/reasoning/{level}") * [[1], [100]] for level in DIFFICULTIES}
        found = {level: columns_2xN for level, columns_2xN in found.items() if columns_2xN.size}
        if not found:
            raise UserError(
                f"{self._path} has no line with {x} and eval/reasoning/ of {', '.join(DIFFICULTIES)}. "
                "Plots need at least one evaluation.",
                field=str(self._path),
            )
        return found


def _base_accuracy(path: Path) -> dict[str, float]:
    """Return the accuracy of direct prediction before training in percent, by difficulty."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing. It is written at the end of a training run: let the run finish.", field=str(path)
        )
    try:
        direct = json.loads(path.read_bytes())["before"]["direct"]
        return {level: 100.0 * direct[level]["accuracy"] for level in DIFFICULTIES if direct[level]["positions"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} does not hold a number before.direct.DIFFICULTY.accuracy and .positions for each of "
            f"{', '.join(DIFFICULTIES)} ({type(error).__name__}: {error}). It is written at the end of a training run.",
            field=str(path),
        ) from error


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # Not pyplot, which would replace the backend of a notebook.

    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.1, h_pad=0.1)
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _finish(axes: Axes, title: str, y_label: str, columns: int = 3) -> None:
    """Add the title, the label of the y axis and the legend, outside of the data."""
    axes.set_ylabel(y_label)
    lines = -(-len(axes.get_legend_handles_labels()[0]) // columns)
    axes.set_title(title, loc="left", pad=9 + 21 * lines, fontweight="bold")
    if lines:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.2)


def _step_axis(axes: Axes, metrics: _Metrics) -> None:
    axes.set_xlabel("training step")
    axes.set_xlim(0, metrics.last_step * 1.01)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)


def _curve(axes: Axes, steps_N: np.ndarray, values_N: np.ndarray, color: str) -> None:
    smooth_N, width = moving_mean(values_N)
    marker = "." if len(steps_N) < 20 else ""  # Without markers, a run of one step would show nothing.
    axes.plot(steps_N, values_N, color=color, alpha=0.35, linewidth=1, marker=marker, label="each step")
    axes.plot(steps_N, smooth_N, color=color, label=f"moving mean of width {width}")
    low, high = min(0.0, values_N.min()), max(0.0, values_N.max())
    axes.set_ylim(1.08 * low, 1.08 * (high if high > low else 1.0))


def _plot_reward(metrics: _Metrics, prompts: str) -> Figure:
    figure, (axes,) = _figure()
    _curve(axes, *metrics.required("step", _REWARD), color=INK)
    _step_axis(axes, metrics)
    _finish(axes, f"Reward on training {prompts}", "mean reward per rollout")
    return figure


def _plot_accuracy(metrics: _Metrics, direct: Mapping[str, float]) -> Figure:
    figure, (axes,) = _figure()
    evaluations = metrics.evaluations("step")
    for level, (steps_N, percent_N) in evaluations.items():
        axes.plot(steps_N, percent_N, color=COLORS[level], marker=MARKERS[level], clip_on=False, label=level)
    for level, percent in direct.items():
        axes.axhline(percent, color=COLORS[level], linestyle=DASHES, linewidth=1.5)
    axes.plot([], color="#808080", linestyle=DASHES, linewidth=1.5, label="base policy, without reasoning")
    top = max([*direct.values(), *(percent_N.max() for _, percent_N in evaluations.values()), 1.0])
    axes.set_ylim(0, 1.08 * top)
    _step_axis(axes, metrics)
    _finish(axes, "Next-token accuracy by reasoning, on held-out positions", "accuracy (%)", columns=4)
    return figure


def _plot_question_accuracy(metrics: _Metrics) -> Figure:
    figure, (axes,) = _figure()
    steps_N, *fractions = metrics.required("step", *QUESTION_ACCURACY)
    mean_N, low_N, high_N = (100 * fraction_N for fraction_N in fractions)
    axes.fill_between(steps_N, low_N, high_N, color=INK, alpha=0.2, label="95 % interval")
    axes.plot(steps_N, mean_N, color=INK, marker="o", clip_on=False, label="mean over samples")
    axes.set_ylim(0, 1.08 * max(high_N.max(), 1.0))
    _step_axis(axes, metrics)
    _finish(axes, "Accuracy on test questions", "accuracy (%)")
    return figure


def _plot_response_length(metrics: _Metrics) -> Figure:
    figure, (length, truncated) = _figure(rows=2)
    _curve(length, *metrics.required("step", "length/mean"), color=INK)
    steps_N, fractions_N = metrics.required("step", "ended/length")
    _curve(truncated, steps_N, 100 * fractions_N, color="#A23B3B")
    _step_axis(truncated, metrics)
    _finish(length, "Mean length of a response", "tokens")
    _finish(truncated, "Responses cut off at the limit", "fraction (%)")
    return figure


def _plot_scaling(metrics: _Metrics) -> Figure | None:
    evaluations = metrics.evaluations("flops/train_total")
    trained = {level: xy_2xN[:, xy_2xN[0] > 0] for level, xy_2xN in evaluations.items()}
    trained = {level: xy_2xN for level, xy_2xN in trained.items() if xy_2xN.size}
    if not trained:
        return None
    before = {
        level: percent_N[0] for level, (step_N, percent_N) in metrics.evaluations("step").items() if not step_N[0]
    }
    figure, (axes,) = _figure()
    for level, (flops_N, percent_N) in trained.items():
        law = fit_power_law(flops_N, percent_N / 100)
        style = {"color": COLORS[level], "marker": MARKERS[level], "markersize": 7}
        curve = law.closest if isinstance(law, NotDetermined) else law
        if curve:
            curve_M = np.geomspace(flops_N.min(), flops_N.max(), 200)
            axes.plot(curve_M, 100 * curve(curve_M), color=COLORS[level], linewidth=1.5)
        if isinstance(law, NotDetermined):
            formula = "not determined by these evaluations" + (rf",  $R^2 = {curve.r_squared:.3f}$" if curve else "")
        else:
            formula = _formula(law)
        axes.plot(flops_N, percent_N, linestyle="none", label=f"{level}: {formula}", **style)
        if level in before:
            axes.axhline(before[level], color=COLORS[level], linestyle=":", linewidth=1.5)
    if before:
        axes.plot([], color="#808080", linestyle=":", linewidth=1.5, label="before training")
    axes.set_xscale("log")
    first, last = (find(flops_N[end] for flops_N, _ in trained.values()) for find, end in ((min, 0), (max, -1)))
    axes.set_xlim(first / 1.05, last * 1.05)
    axes.set_xlabel("training compute (FLOPs)")
    figure.supxlabel(_ONE_RUN, fontsize=10, color="#606060")
    _finish(axes, r"Accuracy against compute, with the fit $P(C) = A / C^{\alpha} + P^*$", "accuracy (%)", columns=1)
    return figure


def _formula(law: PowerLaw) -> str:
    mantissa, exponent = f"{law.A:.2e}".split("e")
    return (
        rf"$A = {mantissa} \times 10^{{{int(exponent)}}}$,  $\alpha = {law.alpha:.3f}$,  "
        rf"$P^* = {100 * law.p_star:.1f}$ %,  $R^2 = {law.r_squared:.3f}$"
    )
