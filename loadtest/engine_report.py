"""Presents the measurements of an engine comparison: table, JSON and plot.

It measures nothing and loads no model; drawing the plot is its only effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtest.reward_comparison import RewardComparison


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way of scoring in one round of one workload."""

    workload: str
    way: str
    round: int
    seconds: float
    num_items: int

    num_tokens: int
    """Tokens of all items, without padding."""

    num_computed: int
    """Tokens that had to be computed: without padding, and those that sequences share only once."""

    limit_tokens_per_s: float
    """Speed of the model's matrix products alone in the same round."""

    @property
    def tokens_per_s(self) -> float:
        """Scored tokens per second: shared tokens count for every sequence, padding never."""
        return self.num_tokens / self.seconds

    @property
    def limit_share(self) -> float:
        """Computed tokens per second divided by the limit; on a GPU also called MFU."""
        return self.num_computed / self.seconds / self.limit_tokens_per_s


@dataclass(frozen=True, slots=True)
class Finding:
    """The figures of one way over all rounds of a workload: medians, and the comparison with the fp32 reference."""

    workload: str
    way: str
    items_per_s: float
    tokens_per_s: float
    limit_share: float

    ratio: float
    """Speed divided by that of the baseline; the median of the ratios within each round."""

    comparison: RewardComparison = field(repr=False)

    busy_share: float | None = None
    """Share of the time in which the device was busy; None on a CPU."""


def findings(
    measurements: Sequence[Measurement],
    comparisons: Mapping[tuple[str, str], RewardComparison],
    baseline: str,
    busy_shares: Mapping[tuple[str, str], float] | None = None,
) -> list[Finding]:
    """Return one finding for each workload and way, in the order of their first measurement.

    Args:
        measurements: of a workload, each way has the same rounds.
        comparisons: with the reference, by workload and way.
        baseline: the way that ``ratio`` divides by.
        busy_shares: by workload and way, where they were measured.
    """
    found = []
    for workload, way in dict.fromkeys((one.workload, one.way) for one in measurements):
        own = _by_round(measurements, workload, way)
        base = _by_round(measurements, workload, baseline)
        found.append(
            Finding(
                workload=workload,
                way=way,
                items_per_s=median(one.num_items / one.seconds for one in own.values()),
                tokens_per_s=median(one.tokens_per_s for one in own.values()),
                limit_share=median(one.limit_share for one in own.values()),
                ratio=median(base[round_].seconds / one.seconds for round_, one in own.items()),
                comparison=comparisons[workload, way],
                busy_share=(busy_shares or {}).get((workload, way)),
            )
        )
    return found


def table(found: Sequence[Finding], baseline: str) -> Table:
    """Return the findings for a terminal."""
    drawn = Table(
        "work",
        "way",
        *("items/s", "tokens/s", "ratio", "of limit", "busy", "max diff", "Spearman"),
        caption=f"Ratio to: {baseline}. Difference and rank correlation: to plain transformers in fp32.",
    )
    drawn.columns[1].no_wrap = True
    for column in drawn.columns[2:]:
        column.justify = "right"
    workload = ""
    for one in found:
        if workload and one.workload != workload:
            drawn.add_section()
        drawn.add_row(
            one.workload if one.workload != workload else "",
            one.way,
            f"{one.items_per_s:,.1f}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.ratio:.2f}",
            f"{one.limit_share:.0%}",
            "" if one.busy_share is None else f"{one.busy_share:.0%}",
            f"{one.comparison.max_difference:.2g}",
            f"{one.comparison.spearman:.5f}",
        )
        workload = one.workload
    return drawn


def speed_ups(found: Sequence[Finding]) -> list[str]:
    """Return a line for each workload with the speed-up by the last part of each way's name.

    A way is compared with the way whose name lacks its last part.
    """
    speeds = {(one.workload, one.way): one.tokens_per_s for one in found}
    lines = []
    for workload in dict.fromkeys(one.workload for one in found):
        factors = []
        for (of, way), speed in speeds.items():
            without, _, extra = way.rpartition(", ")
            if of == workload and (of, without) in speeds:
                factors.append(f"{extra} x {speed / speeds[of, without]:.2f}")
        if factors:
            lines.append(f"{workload}: {', '.join(factors)}")
    return lines


def as_data(found: Sequence[Finding], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return findings and measurements, JSON-ready."""
    return {
        "findings": [asdict(one) for one in found],
        "measurements": [
            asdict(one) | {"tokens_per_s": one.tokens_per_s, "limit_share": one.limit_share} for one in measurements
        ],
    }


def draw_plot(found: Sequence[Finding], limits: Mapping[str, float], title: str, file: Path) -> None:
    """Draw tokens per second of every way, with one panel for each workload and the limit as a line.

    Args:
        found: at least one finding.
        limits: tokens per second of the matrix products alone, by workload.
        title: of the figure.
        file: to write; its suffix determines the format.
    """
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(one.workload for one in found))
    ways = list(dict.fromkeys(one.way for one in found))
    figure = Figure(figsize=(9, 0.8 + len(workloads) * (0.7 + 0.28 * len(ways))), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    for panel, workload in zip(panels, workloads, strict=True):
        own = [one for one in found if one.workload == workload]
        bars = panel.barh([one.way for one in own], [one.tokens_per_s for one in own], color="#4c78a8")
        panel.bar_label(bars, [f" {one.tokens_per_s:,.0f}" for one in own], fontsize=8)
        panel.axvline(limits[workload], color="#e45756", linestyle="--", label="limit: matrix products alone")
        panel.invert_yaxis()
        panel.set_title(workload, fontsize=10, loc="left")
        panel.margins(x=0.12)
    panels[0].legend(fontsize=8, loc="lower right")
    panels[-1].set_xlabel("tokens per second")
    figure.savefig(file, dpi=150)


def _by_round(measurements: Sequence[Measurement], workload: str, way: str) -> dict[int, Measurement]:
    return {one.round: one for one in measurements if (one.workload, one.way) == (workload, way)}
