"""What was measured about ways of scoring, in figures that can be compared: table, plain data and plot.

Pure but for the drawing: it measures nothing and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtest.agreement import Agreement


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way in one round of one workload.

    ``num_computed``: tokens that had to be computed, without padding and without those shared between sequences.
    ``limit_tokens_per_s``: what the machine's matrix products alone allowed in the same round.
    """

    workload: str
    way: str
    round: int
    seconds: float
    num_items: int
    num_tokens: int
    num_computed: int
    limit_tokens_per_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens scored a second; shared ones count for every sequence that has them, padding never."""
        return self.num_tokens / self.seconds

    @property
    def limit_share(self) -> float:
        """The computed tokens a second as a fraction of the limit; on a GPU also called MFU."""
        return self.num_computed / self.seconds / self.limit_tokens_per_s


@dataclass(frozen=True, slots=True)
class Finding:
    """A way's figures over all rounds of a workload: medians, and its agreement with the fp32 reference.

    ``ratio``: of its speed to that of the workload's base line, round by round. ``busy_share``: of the time in which
    the device had work; None on a CPU.
    """

    workload: str
    way: str
    items_per_s: float
    tokens_per_s: float
    limit_share: float
    ratio: float
    agreement: Agreement = field(repr=False)
    busy_share: float | None = None


def findings(
    measurements: Sequence[Measurement],
    agreements: Mapping[tuple[str, str], Agreement],
    base_line: str,
    busy_shares: Mapping[tuple[str, str], float] | None = None,
) -> list[Finding]:
    """Return one finding for each workload and way, in the order of their first measurement.

    Args:
        measurements: every way was measured in the same rounds of a workload.
        agreements: by workload and way.
        base_line: the way that ``ratio`` compares with.
        busy_shares: by workload and way, where they are known.
    """
    found = []
    for workload, way in dict.fromkeys((one.workload, one.way) for one in measurements):
        mine = _by_round(measurements, workload, way)
        base = _by_round(measurements, workload, base_line)
        found.append(
            Finding(
                workload=workload,
                way=way,
                items_per_s=median(one.num_items / one.seconds for one in mine.values()),
                tokens_per_s=median(one.tokens_per_s for one in mine.values()),
                limit_share=median(one.limit_share for one in mine.values()),
                ratio=median(base[round_].seconds / one.seconds for round_, one in mine.items()),
                agreement=agreements[workload, way],
                busy_share=(busy_shares or {}).get((workload, way)),
            )
        )
    return found


def table(found: Sequence[Finding], base_line: str) -> Table:
    """Return the findings for a terminal."""
    drawn = Table(
        "work",
        "way",
        *("items/s", "tokens/s", "ratio", "of limit", "busy", "max diff", "Spearman"),
        caption=f"Ratio to: {base_line}. Differences and rank correlation to plain transformers in fp32.",
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
            f"{one.agreement.max_difference:.2g}",
            f"{one.agreement.spearman:.5f}",
        )
        workload = one.workload
    return drawn


def gains(found: Sequence[Finding]) -> list[str]:
    """Return a line for each workload: how many times faster the last word of a way's name made it."""
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
    """Return findings and single measurements, JSON-ready."""
    return {
        "findings": [asdict(one) for one in found],
        "measurements": [
            asdict(one) | {"tokens_per_s": one.tokens_per_s, "limit_share": one.limit_share} for one in measurements
        ],
    }


def draw_plot(found: Sequence[Finding], limits: Mapping[str, float], title: str, file: Path) -> None:
    """Draw tokens per second of every way, one panel a workload with its limit as a line.

    Args:
        found: at least one finding.
        limits: tokens per second that the machine allows, by workload.
        title: over all panels.
        file: to write; its suffix names the format.
    """
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(one.workload for one in found))
    ways = list(dict.fromkeys(one.way for one in found))
    figure = Figure(figsize=(9, 0.8 + len(workloads) * (0.7 + 0.28 * len(ways))), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    for panel, workload in zip(panels, workloads, strict=True):
        mine = [one for one in found if one.workload == workload]
        bars = panel.barh([one.way for one in mine], [one.tokens_per_s for one in mine], color="#4c78a8")
        panel.bar_label(bars, [f" {one.tokens_per_s:,.0f}" for one in mine], fontsize=8)
        panel.axvline(limits[workload], color="#e45756", linestyle="--", label="limit: matrix products alone")
        panel.invert_yaxis()
        panel.set_title(workload, fontsize=10, loc="left")
        panel.margins(x=0.12)
    panels[0].legend(fontsize=8, loc="lower right")
    panels[-1].set_xlabel("tokens per second")
    figure.savefig(file, dpi=150)


def _by_round(measurements: Sequence[Measurement], workload: str, way: str) -> dict[int, Measurement]:
    return {one.round: one for one in measurements if (one.workload, one.way) == (workload, way)}
