"""Draws the pictures of an audit with matplotlib.

The model is teal, what it is compared with is amber, and thresholds are thin dashed lines. A figure shows numbers only,
never a text of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from training.audit.accuracy import SubsetAccuracy
from training.audit.findings import Findings
from training.audit.gaps import NUM_BINS
from training.audit.intervals import Interval, significant
from training.audit.scored_pairs import FloatArray

Draw: TypeAlias = Callable[[Axes, Findings], None]

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
MODEL, OTHER = "#0f766e", "#d97706"
CHOSEN, REJECTED = "#0f766e", "#d97706"

STYLE: Any = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "svg.hashsalt": "reward-audit",
}
"""Matplotlib settings; the salt makes the files of equal findings equal."""

WIDTH, HEIGHT = 6.4, 3.6
"""Of one picture, in inches."""

NUM_TREND_POINTS = 12
CLIP_QUANTILES = (0.002, 0.998)


def draw_all(findings: Findings) -> dict[str, Figure]:
    """Return one figure for each picture of the report, by name, and ``overview`` with the four most important ones."""
    figures = {name: _alone(draw, findings) for name, draw in _pictures(findings).items()}
    return figures | {"overview": _overview(findings)}


def _pictures(findings: Findings) -> dict[str, Draw]:
    pictures: dict[str, Draw] = {
        "accuracy_by_length": draw_accuracy_by_length,
        "accuracy_by_source": draw_accuracy_by_source,
        "reliability": draw_reliability,
        "rewards": draw_rewards,
        "length": draw_length,
    }
    if findings.style.slopes:
        pictures["style"] = draw_style
    if findings.overtraining is not None:
        pictures["overtraining"] = draw_overtraining
    return pictures


def _alone(draw: Draw, findings: Findings) -> Figure:
    with _styled():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        draw(figure.add_subplot(), findings)
    return figure


def _overview(findings: Findings) -> Figure:
    with _styled():
        figure = Figure(figsize=(2 * WIDTH, 2 * HEIGHT), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
        axes: Sequence[Axes] = figure.subplots(2, 2).ravel()
        for draw, panel in zip(
            (draw_accuracy_by_length, draw_length, draw_rewards, draw_reliability), axes, strict=True
        ):
            draw(panel, findings)
    return figure


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def draw_accuracy_by_length(axes: Axes, findings: Findings) -> None:
    """Accuracy by the ratio of lengths; that of a model of length alone rises from 0 to 1."""
    parts = [part for part in findings.accuracy.by_length_ratio if part.num_pairs]
    positions = np.arange(len(parts), dtype=float)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(
        positions, [part.longer_wins.value for part in parts], "D", color=OTHER, markersize=5, label="longer wins"
    )
    _points_with_intervals(axes, positions, [part.accuracy for part in parts], "model", upright=True)
    axes.set_xticks(positions, [f"{part.name}\n{part.num_pairs:,} pairs" for part in parts])
    axes.set_xlabel("length of the chosen answer, in lengths of the rejected one")
    axes.set(ylim=(-0.03, 1.03), title="Accuracy by difference of length")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left")


def draw_accuracy_by_source(axes: Axes, findings: Findings) -> None:
    """Accuracy on each data set, beside that of preferring the longer completion."""
    whole = findings.accuracy
    everything = SubsetAccuracy("all pairs", whole.num_pairs, whole.accuracy, whole.longer_wins)
    parts = [everything, *whole.by_source] if len(whole.by_source) > 1 else list(whole.by_source)
    positions = np.arange(len(parts), dtype=float)[::-1]
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if findings.annotator_agreement is not None:
        ceiling = findings.annotator_agreement.majority
        axes.axvspan(ceiling.lower, ceiling.upper, color=GRID, label="ceiling by label noise")
    axes.plot(
        [part.longer_wins.value for part in parts], positions, "D", color=OTHER, markersize=5, label="longer wins"
    )
    _points_with_intervals(axes, positions, [part.accuracy for part in parts], "model", upright=False)
    axes.set_yticks(positions, [f"{part.name}\n{part.num_pairs:,} pairs" for part in parts])
    axes.set(ylim=(-0.7, len(parts) - 0.3), title="Accuracy by source", xlabel="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="best")


def draw_reliability(axes: Axes, findings: Findings) -> None:
    """Accuracy by predicted probability; calibrated probabilities are on the diagonal."""
    found = findings.probability
    confidence = np.array([part.confidence for part in found.bins])
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _points_with_intervals(axes, confidence, [part.accuracy for part in found.bins], None, upright=True)
    axes.plot(confidence, [part.accuracy.value for part in found.bins], color=MODEL, linewidth=1.2, alpha=0.6)
    axes.text(0.925, 0.955, "calibrated", color=MUTED, fontsize=8.5, ha="right", va="center")
    axes.set(
        title=f"Reliability: calibration error {found.ece:.3f}, temperature {found.temperature:.2f}",
        xlabel="probability of the preferred answer",
        ylabel="accuracy",
        xlim=(0.49, 1.01),
        ylim=(min(0.3, 0.95 * min(part.accuracy.low for part in found.bins)), 1.03),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_rewards(axes: Axes, findings: Findings) -> None:
    """Histograms of the rewards of chosen and rejected completions, with their means."""
    scored, found = findings.scored, findings.gaps
    low, high = np.quantile(np.concatenate([scored.chosen, scored.rejected]), CLIP_QUANTILES)
    edges = np.linspace(low, high, NUM_BINS).tolist()
    for rewards, mean, color, name in (
        (scored.rejected, found.mean_rejected, REJECTED, "rejected"),
        (scored.chosen, found.mean_chosen, CHOSEN, "chosen"),
    ):
        axes.hist(rewards, edges, color=color, alpha=0.25)
        axes.hist(
            rewards, edges, color=color, histtype="step", linewidth=1.4, label=f"{name}, mean {significant(mean)}"
        )
        axes.axvline(mean, color=color, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set(
        title=f"Rewards: mean gap {significant(found.mean_gap.value)}, overlap {found.overlap:.0%}",
        xlabel="reward",
        ylabel="answers",
    )
    axes.grid(visible=False, axis="x")
    axes.legend(loc="best")


def draw_length(axes: Axes, findings: Findings) -> None:
    """Reward against length, with the mean reward of answers of similar length."""
    bias, completions, unit = findings.length_bias, findings.completions, findings.scored.unit
    lengths, rewards = completions.lengths, completions.rewards
    axes.scatter(1 + lengths, rewards, s=7, color=MODEL, alpha=0.22, linewidths=0, rasterized=True)
    axes.plot(*_trend(1 + lengths, rewards), color=OTHER, linewidth=2, marker="o", markersize=3.5, label="mean")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(
        title=(
            f"Reward and length: r = {bias.pearson.value:+.2f}, r² = {bias.r_squared:.2f}, "
            f"within prompts r = {bias.within.value:+.2f}"
        ),
        xlabel=f"length of the answer, {unit}",
        ylabel="reward",
        ylim=np.quantile(rewards, (0.001, 0.999)) + np.array([-0.3, 0.3]) * rewards.std(),
    )
    axes.legend(loc="best")


def draw_style(axes: Axes, findings: Findings) -> None:
    """Slope of the reward on each style feature, both in standard deviations."""
    slopes = findings.style.slopes
    positions = np.arange(len(slopes), dtype=float)[::-1]
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _points_with_intervals(axes, positions, [slope.per_sd for slope in slopes], None, upright=False)
    names = [f"{slope.feature.replace('_', ' ')}\n{slope.num_texts:,} answers" for slope in slopes]
    axes.set_yticks(positions, names)
    axes.set(
        title=f"Length and style: {findings.style.r_squared:.0%} of the variance within prompts",
        xlabel="standard deviations of the reward per standard deviation of the feature",
        ylim=(-0.7, len(slopes) - 0.3),
    )
    axes.grid(visible=False, axis="y")


def draw_overtraining(axes: Axes, findings: Findings) -> None:
    """Accuracy on training pairs beside that on held-out pairs."""
    found = findings.overtraining
    if found is None:
        return
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _points_with_intervals(
        axes, np.array([1.0, 0.0]), [found.train_accuracy, found.held_out_accuracy], None, upright=False
    )
    axes.set_yticks(
        [1, 0],
        [
            f"trained on\n{found.num_train_pairs:,} pairs, gap {significant(found.train_gap)}",
            f"held out\n{findings.accuracy.num_pairs:,} pairs, gap {significant(found.held_out_gap)}",
        ],
    )
    estimates = (found.train_accuracy, found.held_out_accuracy)
    axes.set(
        title=f"Over-training: a difference of {100 * found.lead.value:.1f} points",
        xlabel="accuracy",
        xlim=(
            min(0.45, *(each.low - 0.01 for each in estimates)),
            max(0.75, *(each.high + 0.01 for each in estimates)),
        ),
        ylim=(-0.7, 1.7),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False, axis="y")


def _points_with_intervals(
    axes: Axes, positions: FloatArray, estimates: Sequence[Interval], label: str | None, *, upright: bool
) -> None:
    """Draw dots with error bars: ``positions`` are on the x axis if upright, else on the y axis."""
    values = np.array([estimate.value for estimate in estimates])
    error_bars = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]).clip(min=0)
    x, y = (positions, values) if upright else (values, positions)
    errors: dict[str, Any] = {"yerr" if upright else "xerr": error_bars}
    axes.errorbar(x, y, **errors, fmt="o", color=MODEL, markersize=5.5, elinewidth=1.6, capsize=0, label=label)


def _trend(lengths: FloatArray, rewards: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return median length and mean reward of equally large groups of completions, in order of length."""
    order = np.argsort(lengths, kind="stable")
    groups = np.array_split(order, min(NUM_TREND_POINTS, len(order)))
    return (
        np.array([np.median(lengths[group]) for group in groups]),
        np.array([rewards[group].mean() for group in groups]),
    )
