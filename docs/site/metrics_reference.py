"""The reference of metrics, from their declarations."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from docs.site.markdown import page, table
from service.metrics import Metrics


def metrics_reference() -> str:
    """Return the page."""
    metrics = Metrics()
    declared = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    rows = [(f"`{_name(one)}`", one._type, ", ".join(f"`{label}`" for label in one._labelnames), one._documentation)  # noqa: SLF001
            for one in declared]  # fmt: skip
    return page(
        "Metrics",
        "What `GET /metrics` has, in the order of its exposition. Each sample also has the label `replica`. The gauge "
        "`rm_metrics_scrape_incomplete` is 1 when some replica did not answer a scrape. How to read the monitors, and "
        "queries to start with: [monitoring.md](../monitoring.md).",
        table(("metric", "type", "labels", "meaning"), rows),
    )


def _name(metric: MetricWrapperBase) -> str:
    """Return the name in the exposition, where the name of a counter ends in _total and that of an info in _info."""
    suffix = {"counter": "_total", "info": "_info"}.get(metric._type, "")  # noqa: SLF001 - it has no public name
    return metric._name + suffix  # noqa: SLF001
