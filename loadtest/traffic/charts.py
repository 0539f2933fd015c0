"""The plots of a report: what became of the offered items, latency by percentile, and goodput by offered load."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from loadtest.traffic.latencies import curve_of
from loadtest.traffic.scenarios import RECOVERY
from loadtest.traffic.summary import StreamSummary

OUTCOMES = {"good": "#0f766e", "late": "#b45309", "refused": "#9aa5b1", "failed": "#b91c1c"}


def draw_all(summaries: Sequence[StreamSummary]) -> dict[str, Figure]:
    """Return the plots that the phases have data for, by title."""
    figures = {"Items per second, by what became of them": draw_outcomes(summaries)}
    if any(one.latency_s.count for one in summaries):
        figures["Latency of answers from the intended start, by percentile"] = draw_latencies(summaries)
    if steps := [one for one in summaries if one.factor is not None and one.phase != RECOVERY]:
        figures["Goodput by offered load"] = draw_overload(steps)
    return figures


def draw_outcomes(summaries: Sequence[StreamSummary]) -> Figure:
    """Draw the seconds of all streams one after the other."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots()
    seconds = [second for one in summaries for second in one.seconds]
    # The last value again, because a step ends where the next one begins.
    counts = [[getattr(second, outcome) for second in [*seconds, *seconds[-1:]]] for outcome in OUTCOMES]
    axes.stackplot(range(len(seconds) + 1), counts, labels=list(OUTCOMES), colors=list(OUTCOMES.values()), step="post")
    begin = 0
    for one in summaries:
        axes.axvline(begin, color="#616e7c", linewidth=0.6)
        axes.text(begin, 1.01, f" {one.stream}", transform=axes.get_xaxis_transform(), fontsize="x-small")
        begin += len(one.seconds)
    axes.set(xlabel="seconds of the intended start, stream after stream", ylabel="items/s", xlim=(0, begin))
    axes.legend(fontsize="small", loc="upper right")
    axes.grid(alpha=0.25)
    return figure


def draw_latencies(summaries: Sequence[StreamSummary]) -> Figure:
    """Draw latencies over percentiles, the axis stretched towards 100."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for one in summaries:
        if one.latency_s.count:
            percentiles, seconds = curve_of(one.latency_s.histogram)
            label = one.stream if one.stream == one.phase else f"{one.stream} ({one.phase})"
            axes.plot([100 / (100 - percentile) for percentile in percentiles], seconds, label=label)
    axes.set(xlabel="percentile", ylabel="seconds", xscale="log", yscale="log")
    axes.set_xticks([1, 2, 10, 100, 1000, 10_000], ["0", "50", "90", "99", "99.9", "99.99"])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    axes.grid(alpha=0.25)
    return figure


def draw_overload(steps: Sequence[StreamSummary]) -> Figure:
    """Draw goodput and answered items over the offered load of the steps of an overload."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = sorted(steps, key=lambda one: one.offered_items_per_s)
    offered = [one.offered_items_per_s for one in steps]
    axes.plot(offered, offered, color="#9aa5b1", linestyle="--", label="offered")
    axes.plot(offered, [one.goodput_items_per_s for one in steps], marker="o", color=OUTCOMES["good"], label="good")
    axes.plot(
        offered, [one.answered_items_per_s for one in steps], marker=".", color=OUTCOMES["late"], label="answered"
    )
    axes.set(xlabel="offered items/s", ylabel="items/s", ylim=(0, 1.6 * max(one.answered_items_per_s for one in steps)))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.25)
    return figure
