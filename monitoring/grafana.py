"""Builds the Grafana dashboard from the panels, with Grafana's own SDK.

A test verifies that the JSON in this folder is what this module writes. Import it into Grafana 11.6 or later, or
provision it from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders.common import GraphThresholdsStyleConfig, ReduceDataOptions
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.dashboard import EMPTY_WHEN
from monitoring.panels import ROWS, Panel, Row

SOURCE = DataSourceRef("prometheus", "${datasource}")

_BUILDERS: dict[str, Any] = {
    "stat": stat.Panel,
    "timeseries": timeseries.Panel,
    "heatmap": heatmap.Panel,
    "table": table.Panel,
}
_NORMAL, _ALERT = "green", "red"


def build_dashboard(rows: Sequence[Row] = ROWS) -> dict[str, Any]:
    """Return the dashboard, JSON-ready."""
    built = (
        dashboard.Dashboard("Reward service")
        .uid("reward-service")
        .description("Latency, throughput, health and reliability of a reward model. Built by monitoring/dashboard.py.")
        .tags(["reward-model"])
        .readonly()
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("job")
            .label("Service")
            .datasource(SOURCE)
            .query("label_values(rm_ready, job)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
        )
    )
    for row in rows:
        built = built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            built = built.with_panel(_build_panel(panel))
    plain: dict[str, Any] = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    return plain


def dashboard_text() -> str:
    """Return the content of the dashboard's file."""
    return json.dumps(build_dashboard(), indent=1, sort_keys=True) + "\n"


def _build_panel(panel: Panel) -> Any:
    description = panel.description
    if panel.empty_when is not None:
        description += f" {EMPTY_WHEN}{panel.empty_when}"
    built = (
        _BUILDERS[panel.kind]()
        .title(panel.title)
        .description(description)
        .datasource(SOURCE)
        .span(panel.width)
        .height(panel.height)
        .unit(panel.unit)
    )
    for index, query in enumerate(panel.queries):
        target = (
            Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index)).datasource(SOURCE)
        )
        if panel.kind == "heatmap":
            target = target.format(PromQueryFormat.HEATMAP)
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE).instant()
        built = built.with_target(target)
    if panel.thresholds:
        built = built.thresholds(_thresholds(panel.thresholds))
    if panel.kind == "timeseries":
        built = built.line_width(1).fill_opacity(5)
        if panel.thresholds:
            built = built.thresholds_style(GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.LINE))
    if panel.kind == "stat":
        built = built.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return built


def _thresholds(values: Sequence[float]) -> dashboard.ThresholdsConfig:
    colors = ["orange", _ALERT][-len(values) :]
    steps = [Threshold(None, _NORMAL), *(Threshold(value, color) for value, color in zip(values, colors, strict=True))]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
