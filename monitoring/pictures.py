"""Pictures of the dashboard's panels, from the results of their queries on a running Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monitoring.dashboard import EMPTY_WHEN
from monitoring.prometheus_api import Series, Span, query_range

COLUMNS = 24
INCHES_PER_COLUMN = 0.75
INCHES_PER_LINE = 0.36
NUM_POINTS = 200
MAX_LEGENDS = 8
_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_COLORS = {"green": "#2e7d32", "orange": "#ef6c00", "red": "#c62828"}
_UNITS = {"s": " s", "cps": "/s", "reqps": "/s"}


@dataclass(frozen=True, slots=True)
class DrawnPanel:
    """A panel of the dashboard's JSON with the results of its queries, one list of series for each target."""

    panel: dict[str, Any]
    answers: tuple[list[Series], ...]

    @property
    def is_empty(self) -> bool:
        """Whether no query has returned a finite value."""
        return all(series.is_empty for answer in self.answers for series in answer)

    @property
    def empty_reason(self) -> str | None:
        """The reason why the panel may be empty; None where it must not be."""
        _, mark, reason = self.panel["description"].partition(EMPTY_WHEN)
        return reason if mark else None

    def series(self) -> Iterator[tuple[str, Series]]:
        """Yield every series that is not empty, with its name in the legend."""
        for target, answer in zip(self.panel["targets"], self.answers, strict=True):
            for series in answer:
                if not series.is_empty:
                    yield _legend(target["legendFormat"], series.labels), series


def evaluate(plan: dict[str, Any], url: str, span: Span, job: str = ".+") -> list[DrawnPanel]:
    """Evaluate every query of a dashboard.

    Args:
        plan: the dashboard's JSON.
        url: URL of Prometheus.
        span: time range; Grafana's rate interval is replaced by four of its steps.
        job: value of the dashboard's variable of that name.

    Raises:
        QueryError: Prometheus refuses a query.
    """
    interval = f"{max(4, round(4 * span.step_s))}s"

    def answer(target: dict[str, Any]) -> list[Series]:
        return query_range(url, target["expr"].replace("$__rate_interval", interval).replace("$job", job), span)

    return [
        DrawnPanel(panel, tuple(answer(target) for target in panel["targets"]))
        for panel in plan["panels"]
        if panel["type"] != "row"
    ]


def unexplained(panels: Sequence[DrawnPanel]) -> list[str]:
    """Return the titles of panels that are empty and must not be."""
    return [drawn.panel["title"] for drawn in panels if drawn.is_empty and drawn.empty_reason is None]


def draw(plan: dict[str, Any], panels: Sequence[DrawnPanel], span: Span) -> Figure:
    """Draw the panels at their positions in the dashboard's grid."""
    num_lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in plan["panels"])
    size = (COLUMNS * INCHES_PER_COLUMN, num_lines * INCHES_PER_LINE)
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(size)
        for row in plan["panels"]:
            if row["type"] == "row":
                height = 1 - (row["gridPos"]["y"] + 0.7) / num_lines
                figure.text(0.01, height, row["title"], fontsize=12, fontweight="bold")
        for drawn in panels:
            axes = figure.add_axes(_axes_box(drawn.panel["gridPos"], num_lines))
            axes.set_title(drawn.panel["title"], loc="left")
            if drawn.is_empty:
                _write(axes, f"no data: {drawn.empty_reason or 'unexpected'}", color="gray", size=8)
            else:
                _DRAW[drawn.panel["type"]](axes, drawn, span)
    return figure


def _axes_box(grid: dict[str, int], num_lines: int) -> tuple[float, float, float, float]:
    """Return left, bottom, width and height of a panel's axes as shares of the figure, with room for its labels."""
    left, width = (grid["x"] + 1.1) / COLUMNS, (grid["w"] - 1.5) / COLUMNS
    bottom, height = 1 - (grid["y"] + grid["h"] - 1.3) / num_lines, (grid["h"] - 2.3) / num_lines
    return left, bottom, width, height


def _draw_stat(axes: Axes, drawn: DrawnPanel, span: Span) -> None:
    del span
    latest = [series.values[np.isfinite(series.values)][-1] for _, series in drawn.series()]
    color = _COLORS["green"]
    for threshold, name in _thresholds(drawn.panel):
        color = name if latest[0] >= threshold else color
    _write(axes, "  ".join(_formatted(value, drawn.panel) for value in latest), color=color, size=18)


def _draw_lines(axes: Axes, drawn: DrawnPanel, span: Span) -> None:
    lines = [
        axes.plot((series.times - span.end) / 60, series.values, label=legend, linewidth=1)[0]
        for legend, series in drawn.series()
    ]
    for threshold, color in _thresholds(drawn.panel):
        axes.axhline(threshold, color=color, linewidth=0.8, linestyle="--")
    _time_axis(axes, span)
    axes.yaxis.set_major_formatter(lambda value, _: _formatted(value, drawn.panel))
    axes.grid(alpha=0.3)
    axes.legend(handles=lines[:MAX_LEGENDS], loc="upper left", fontsize=6, ncols=2, framealpha=0.6)


def _draw_heatmap(axes: Axes, drawn: DrawnPanel, span: Span) -> None:
    """Draw the count of each bucket: the differences between adjacent cumulative buckets."""
    by_bound = sorted((float(series.labels["le"]), series) for _, series in drawn.series())
    times = np.unique(np.concatenate([series.times for _, series in by_bound]))
    cumulative = np.zeros((len(by_bound), len(times)))
    for row, (_, series) in enumerate(by_bound):
        cumulative[row, np.searchsorted(times, series.times)] = np.nan_to_num(series.values)
    counts = np.diff(cumulative, axis=0, prepend=0.0)
    axes.pcolormesh((times - span.end) / 60, np.arange(len(by_bound)), counts, cmap="Oranges", shading="nearest")
    every = max(1, len(by_bound) // 8)
    axes.set_yticks(range(0, len(by_bound), every), [f"{bound:g}" for bound, _ in by_bound[::every]])
    _time_axis(axes, span)


def _draw_table(axes: Axes, drawn: DrawnPanel, span: Span) -> None:
    del span
    hidden = {"__name__", "instance", "job"}
    rows = [{name: text for name, text in series.labels.items() if name not in hidden} for _, series in drawn.series()]
    names = sorted({name for row in rows for name in row})
    axes.axis("off")
    cells = [[_shortened(row.get(name, "")) for name in names] for row in rows]
    axes.table(cells, colLabels=names, loc="upper left").set_fontsize(7)


_DRAW = {"stat": _draw_stat, "timeseries": _draw_lines, "heatmap": _draw_heatmap, "table": _draw_table}


def _thresholds(panel: dict[str, Any]) -> list[tuple[float, str]]:
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    return [(step["value"], _COLORS[step["color"]]) for step in steps if step["value"] is not None]


def _formatted(value: float, panel: dict[str, Any]) -> str:
    unit = panel["fieldConfig"]["defaults"].get("unit", "")
    return f"{100 * value:.3g} %" if unit == "percentunit" else f"{value:.4g}{_UNITS.get(unit, '')}"


def _legend(pattern: str, labels: dict[str, str]) -> str:
    return _LABEL.sub(lambda name: _shortened(labels.get(name[1], "")), pattern)


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"


def _time_axis(axes: Axes, span: Span) -> None:
    axes.set_xlim((span.start - span.end) / 60, 0.0)
    axes.xaxis.set_major_formatter(lambda minutes, _: f"{minutes:g} min" if minutes else "now")


def _write(axes: Axes, text: str, *, color: str, size: int) -> None:
    axes.axis("off")
    axes.text(
        0.0, 0.5, text, color=color, fontsize=size, verticalalignment="center", transform=axes.transAxes, wrap=True
    )
