"""Plots of a run, made from its `metrics.jsonl` and `result.json`.

    python -m rpt_jax.report --workdir=DIR

Training calls `write_plots` at its end; this command makes the same files again. They lie in `DIR/plots/`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.optimize
from absl import app, flags

from rpt_jax.errors import UserError
from rpt_jax.infra.metrics import FILE_NAME, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT_NAME = "result.json"
DIFFICULTIES = ("easy", "medium", "hard")
# Apart for color-blind readers (Okabe and Ito), and by marker in a grey print.
COLORS = {"easy": "#0072B2", "medium": "#E69F00", "hard": "#C4457C"}
MARKERS = {"easy": "o", "medium": "s", "hard": "^"}
INK = "#33658A"
DASHES = (0, (5, 3))
STYLE = {
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
ALPHA_BOUNDS = (1e-2, 5.0)
ALPHA_STARTS = 65


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """P(C) = A / C^alpha + P*, Equation 5 of the paper, with C in FLOPs and P as a fraction; A < 0 where P rises."""

    A: float
    alpha: float
    p_star: float
    r_squared: float

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        return self.A * flops**-self.alpha + self.p_star


def fit_power_law(flops: Sequence[float], accuracy: Sequence[float]) -> PowerLaw | None:
    """Fit Equation 5 of the paper by least squares, with P* in [0, 1] and alpha in `ALPHA_BOUNDS`.

    At a given alpha the best A and P* have a closed form, so only alpha is searched for: over a fixed grid, then
    between the neighbors of its best point, so the same points always give the same curve. R² is one minus the
    residual sum of squares over that about the mean. Points of zero FLOPs, such as the evaluation at step 0, are left
    out: Equation 5 has no value there.

    Args:
      flops: [N] training compute of each evaluation.
      accuracy: [N] accuracies as fractions.

    Returns:
      The curve, or None where three parameters cannot be fitted: fewer than four different FLOPs, or an accuracy that
      never changes.
    """
    points = [(c, p) for c, p in zip(flops, accuracy, strict=True) if c > 0]
    if len({c for c, _ in points}) < 4 or len({p for _, p in points}) == 1:
        return None
    c_N, p_N = np.array(points, dtype=np.float64).T
    scale = np.exp(np.mean(np.log(c_N)))  # C^-alpha of 1e20 FLOPs and more would leave A and P* on scales far apart.

    def solve(log_alpha: float) -> tuple[float, float, float]:
        x_N = (c_N / scale) ** -np.exp(log_alpha)
        p_star = np.linalg.lstsq(np.stack([x_N, np.ones_like(x_N)], axis=1), p_N)[0][1]
        # Exact, not a heuristic: with A at its best the residual is a parabola in P*.
        p_star = np.clip(p_star, 0.0, 1.0)
        a = x_N @ (p_N - p_star) / (x_N @ x_N)
        return np.sum((a * x_N + p_star - p_N) ** 2), a, p_star

    grid = np.linspace(*np.log(ALPHA_BOUNDS), ALPHA_STARTS)
    best = int(np.argmin([solve(log_alpha)[0] for log_alpha in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, ALPHA_STARTS - 1)]
    search = scipy.optimize.minimize_scalar(
        lambda z: solve(z)[0], bounds=bounds, method="bounded", options={"xatol": 1e-9}
    )
    log_alpha = min(grid[best], search.x, key=lambda z: solve(z)[0])  # The search never tries the ends of its bounds.
    residual, a, p_star = solve(log_alpha)
    alpha = float(np.exp(log_alpha))
    total = np.sum((p_N - p_N.mean()) ** 2)
    return PowerLaw(float(a * scale**alpha), alpha, float(p_star), float(1.0 - residual / total))


def write_plots(workdir: Path) -> list[Path]:
    """Write the plots of a run to `workdir/plots/` and return their paths.

    These are `reward.png`, `accuracy.png`, `response_length.png` and, where an evaluation follows the first update,
    `scaling.png`. A split without positions is left out, and so is the curve that too few evaluations determine.

    Raises:
      UserError: `metrics.jsonl` or `result.json` is missing, corrupt, or lacks what the plots need.
    """
    import matplotlib

    workdir = Path(workdir)
    metrics = _Metrics(workdir / FILE_NAME)
    direct = _base_accuracy(workdir / RESULT_NAME)
    directory = workdir / "plots"
    directory.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "reward": _plot_reward(metrics),
            "accuracy": _plot_accuracy(metrics, direct),
            "response_length": _plot_response_length(metrics),
            "scaling": _plot_scaling(metrics),
        }
        paths = []
        for name, figure in figures.items():
            if figure is not None:
                paths.append(directory / f"{name}.png")
                figure.savefig(paths[-1])
    return paths


class _Metrics:
    """Columns of a `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = read_metrics(path)
        if not self._lines:
            raise UserError(f"{path} holds no complete step. Let the run finish a step before its plots are made.")
        self.last_step = max(1, self._lines[-1]["step"])

    def columns(self, *keys: str) -> np.ndarray:
        """Return [len(keys), N]: the values of `keys` at the N lines that have all of them."""
        rows = [[line[key] for key in keys] for line in self._lines if all(key in line for key in keys)]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(keys)).T

    def required(self, *keys: str) -> np.ndarray:
        columns_KxN = self.columns(*keys)
        if not columns_KxN.size:
            raise UserError(f"{self._path} has no line with {' and '.join(keys)}. Plots can be made of RPT runs only.")
        return columns_KxN

    def evaluations(self, x: str) -> dict[str, np.ndarray]:
        """Return, for each split that was evaluated, [2, N]: the key `x` and the accuracy by reasoning in percent."""
        found = {split: self.columns(x, f"eval/reasoning/{split}") * [[1], [100]] for split in DIFFICULTIES}
        found = {split: columns_2xN for split, columns_2xN in found.items() if columns_2xN.size}
        if not found:
            raise UserError(
                f"{self._path} has no line with {x} and eval/reasoning/ of {', '.join(DIFFICULTIES)}. "
                "Plots need at least one evaluation."
            )
        return found


def _base_accuracy(path: Path) -> dict[str, float]:
    """Return the percentage of positions that the policy predicts directly before training, by split."""
    if not path.is_file():
        raise UserError(f"{path} is missing. It is written at the end of a training run: let the run finish.")
    try:
        direct = json.loads(path.read_bytes())["before"]["direct"]
        return {split: 100.0 * direct[split]["accuracy"] for split in DIFFICULTIES if direct[split]["positions"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not hold a number before.direct.SPLIT.accuracy and .positions for each of "
            f"{', '.join(DIFFICULTIES)} ({type(error).__name__}: {error}). It is written at the end of a training run."
        ) from error


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # Without pyplot, so that a notebook keeps its own backend.

    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _finish(axes: Axes, title: str, y_label: str, columns: int = 3) -> None:
    """Title, label and legend, all outside of the data."""
    axes.set_ylabel(y_label)
    lines = -(-len(axes.get_legend_handles_labels()[0]) // columns)
    axes.set_title(title, loc="left", pad=9 + 21 * lines, fontweight="bold")
    if lines:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.2)


def _step_axis(axes: Axes, metrics: _Metrics) -> None:
    axes.set_xlabel("training step")
    axes.set_xlim(0, metrics.last_step * 1.01)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _smooth(values_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the centered moving mean over a twentieth of the steps, cut off at the ends, and its odd width."""
    width = min(len(values_N), max(5, len(values_N) // 20)) // 2 * 2 + 1
    box = np.ones(width)
    counts_N = np.convolve(np.ones_like(values_N), box)[width // 2 : width // 2 + len(values_N)]
    return np.convolve(values_N, box)[width // 2 : width // 2 + len(values_N)] / counts_N, width


def _curve(axes: Axes, steps_N: np.ndarray, values_N: np.ndarray, color: str) -> None:
    smooth_N, width = _smooth(values_N)
    marker = "." if len(steps_N) < 20 else ""  # The only trace of a run of one step.
    axes.plot(steps_N, values_N, color=color, alpha=0.35, linewidth=1, marker=marker, label="each step")
    axes.plot(steps_N, smooth_N, color=color, label=f"moving mean of width {width}")
    axes.set_ylim(0, 1.08 * (values_N.max() or 1.0))


def _plot_reward(metrics: _Metrics) -> Figure:
    figure, (axes,) = _figure()
    _curve(axes, *metrics.required("step", "reward/mean"), color=INK)
    _step_axis(axes, metrics)
    _finish(axes, "Reward on training positions", "mean reward per rollout")
    return figure


def _plot_accuracy(metrics: _Metrics, direct: Mapping[str, float]) -> Figure:
    figure, (axes,) = _figure()
    evaluations = metrics.evaluations("step")
    for split, (steps_N, percent_N) in evaluations.items():
        axes.plot(steps_N, percent_N, color=COLORS[split], marker=MARKERS[split], clip_on=False, label=split)
    for split, percent in direct.items():
        axes.axhline(percent, color=COLORS[split], linestyle=DASHES, linewidth=1.5)
    axes.plot([], color="#808080", linestyle=DASHES, linewidth=1.5, label="base policy, without reasoning")
    top = max([*direct.values(), *(percent_N.max() for _, percent_N in evaluations.values()), 1.0])
    axes.set_ylim(0, 1.08 * top)
    _step_axis(axes, metrics)
    _finish(axes, "Next-token accuracy by reasoning, on held-out positions", "accuracy (%)", columns=4)
    return figure


def _plot_response_length(metrics: _Metrics) -> Figure:
    figure, (length, truncated) = _figure(rows=2)
    _curve(length, *metrics.required("step", "length/mean"), color=INK)
    steps_N, shares_N = metrics.required("step", "ended/length")
    _curve(truncated, steps_N, 100 * shares_N, color="#A23B3B")
    _step_axis(truncated, metrics)
    _finish(length, "Mean length of a response", "tokens")
    _finish(truncated, "Responses cut off at the limit", "share (%)")
    return figure


def _plot_scaling(metrics: _Metrics) -> Figure | None:
    evaluations = metrics.evaluations("flops/train_total")
    trained = {split: xy_2xN[:, xy_2xN[0] > 0] for split, xy_2xN in evaluations.items()}
    trained = {split: xy_2xN for split, xy_2xN in trained.items() if xy_2xN.size}
    if not trained:
        return None
    figure, (axes,) = _figure()
    for split, (flops_N, percent_N) in trained.items():
        law = fit_power_law(flops_N, percent_N / 100)
        label = f"{split}: " + (_formula(law) if law else "no fit, for want of four evaluations that differ")
        style = {"color": COLORS[split], "marker": MARKERS[split], "markersize": 7}
        axes.plot(flops_N, percent_N, linestyle="none", label=label, **style)
        if law:
            curve_M = np.geomspace(flops_N.min(), flops_N.max(), 200)
            axes.plot(curve_M, 100 * law(curve_M), color=COLORS[split], linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    _finish(axes, r"Accuracy against compute, with the fit $P(C) = A / C^{\alpha} + P^*$", "accuracy (%)", columns=1)
    return figure


def write_entropy_plot(directory: Path, counts_N: np.ndarray, width: float, shares: Mapping[str, float]) -> Path:
    """Draw how hard a corpus' positions are, as `directory/entropy.png`.

    Args:
      counts_N: positions by the proxy's entropy, in bins of `width` nats from 0 on.
      shares: of positions above a threshold (nats, as text).
    """
    figure, (axes,) = _figure()
    edges_N = width * np.arange(len(counts_N))
    axes.bar(edges_N, 100 * counts_N / max(1, counts_N.sum()), width=width, align="edge", color=INK)
    for (threshold, share), color in zip(shares.items(), COLORS.values(), strict=True):
        axes.axvline(float(threshold), color=color, linestyle=DASHES, label=f"{share:.1%} above {threshold} nats")
    axes.set_xlim(0, edges_N[np.flatnonzero(counts_N).max(initial=0)] + width)
    axes.set_xlabel("entropy of the proxy's likeliest next tokens (nats)")
    _finish(axes, "How hard positions are", "share of positions (%)")
    path = directory / "entropy.png"
    figure.savefig(path)
    return path


def _formula(law: PowerLaw) -> str:
    mantissa, exponent = f"{law.A:.2e}".split("e")
    return (
        rf"$A = {mantissa} \times 10^{{{int(exponent)}}}$,  $\alpha = {law.alpha:.3f}$,  "
        rf"$P^* = {100 * law.p_star:.1f}$ %,  $R^2 = {law.r_squared:.3f}$"
    )


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: give the run as --workdir=DIR")
    try:
        for path in write_plots(Path(flags.FLAGS.workdir)):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run whose plots are made.", required=True)
    app.run(_main)
