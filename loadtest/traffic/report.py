"""Writes the report of a load test: the figures as JSON and, self-contained, as HTML with plots."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich.table import Table

from loadtest.traffic.fault_actions import CausedFault
from loadtest.traffic.scenarios import RECOVERY
from loadtest.traffic.summary import UNANSWERED, StreamSummary, recovered_after_s
from service.outputs import new_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_FILE, HTML_FILE = "loadtest.json", "loadtest.html"
BUSY_GENERATOR = 0.8
"""Of a core; a generator that uses more is late itself, and its figures are not the server's."""


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What a phase cost, where generator and server share a machine."""

    phase: str
    wall_s: float
    """Until the last answer."""

    generator_cores: float
    """CPU seconds of the generator per second."""

    server_cores: float | None
    """The same of the server and all its processes; None where it is not known which these are."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    """A finished load test."""

    arguments: Sequence[str]
    """The command line, without a key."""
    within_s: float
    rewards_known: bool
    """Whether every reward was compared with the one that its text must have."""
    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    summaries: Sequence[StreamSummary]
    faults: Sequence[CausedFault]

    generator_share: float
    """CPU seconds of the generator per second."""

    costs: Sequence[PhaseCost]

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before the figures."""
        found = []
        if self.generator_share > BUSY_GENERATOR:
            found.append(f"The generator used {self.generator_share:.0%} of a core: its figures are void.")
        if wrong := sum(one.wrong_items for one in self.summaries):
            found.append(f"{wrong:,} items got a wrong reward or none.")
        if unexplained := sum(one.unexplained for one in self.summaries):
            found.append(f"{unexplained:,} answers were neither rewards nor a problem with a code.")
        if unanswered := sum(one.statuses.get(UNANSWERED, 0) for one in self.summaries):
            found.append(f"{unanswered:,} requests got no answer: their connection was refused, or broke.")
        for one in self.summaries:
            if one.stream == RECOVERY:
                after_s = recovered_after_s(one)
                recovered = "in no second" if after_s is None else f"from second {after_s:g} on"
                found.append(f"After the overload at least 95 percent of the items were good {recovered}.")
        return found

    @property
    def is_right(self) -> bool:
        """Whether every answer was rewards of its own items, or a typed refusal."""
        return not any(one.wrong_items or one.unexplained for one in self.summaries)


def write_report(test: LoadTest, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``loadtest.json`` and ``loadtest.html`` into a folder and return the HTML.

    Raises:
        OutputError: the folder has an earlier report that may not be replaced, or it cannot be written.
    """
    texts = {JSON_FILE: json.dumps(as_json(test), indent=1, allow_nan=False) + "\n", HTML_FILE: render_html(test)}
    with new_folder(folder, overwrite=overwrite, entries=tuple(texts)) as unfinished:
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
    return folder / HTML_FILE


def as_json(test: LoadTest) -> dict[str, Any]:
    """Return all figures, JSON-ready; a latency that nothing was measured for is null."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(test) | {"remarks": test.remarks})
    return plain


def render_html(test: LoadTest) -> str:
    """Return the report as one HTML document with embedded plots; it loads nothing."""
    from loadtest.traffic.charts import draw_all

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loadtest", "traffic"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"milliseconds": milliseconds, "counts": counts}
    return environment.get_template("report.html.jinja").render(
        test=test,
        figures={title: _data_uri(figure) for title, figure in draw_all(test.summaries).items()},
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def table(test: LoadTest) -> Table:
    """Return the main figures for a terminal."""
    drawn = Table(
        "phase", "stream", "items/s", "answered", "good", "p50 ms", "p99 ms", "max ms", "503 p99 ms", "statuses"
    )
    for column in drawn.columns[2:9]:
        column.justify = "right"
    for one in test.summaries:
        drawn.add_row(
            one.phase,
            one.stream,
            f"{one.offered_items_per_s:,.0f}",
            f"{one.answered_items_per_s:,.0f}",
            f"{one.goodput_items_per_s:,.0f}",
            milliseconds(one.latency_s.quantiles["p50"]),
            milliseconds(one.latency_s.quantiles["p99"]),
            milliseconds(one.latency_s.max),
            milliseconds(one.refusal_s.quantiles["p99"]),
            counts(one.statuses),
        )
    return drawn


def cost_table(costs: Sequence[PhaseCost]) -> Table:
    """Return the processor time of the phases for a terminal."""
    drawn = Table("phase", "seconds", "cores of the generator", "cores of the server")
    drawn.caption = "Processes of the server that ended within a phase do not count."
    for column in drawn.columns[1:]:
        column.justify = "right"
    for one in costs:
        server = "" if one.server_cores is None else f"{one.server_cores:.2f}"
        drawn.add_row(one.phase, f"{one.wall_s:.1f}", f"{one.generator_cores:.2f}", server)
    return drawn


def milliseconds(seconds: float) -> str:
    """Return a duration for a table; empty where there is none."""
    return "" if math.isnan(seconds) else f"{1000 * seconds:,.1f}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def counts(numbers: Mapping[str, int]) -> str:
    """Return counts by name for a table."""
    return ", ".join(f"{count:,} x {name}" for name, count in sorted(numbers.items()))


def _data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
