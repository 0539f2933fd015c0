"""The reference of metrics, from their declarations."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from docs.site.markdown import page, table
from service.metrics import Metrics


def metrics_reference() -> str:
    """Return the page."""
    metrics = Metrics()
    declared = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    rows = [_row(one) for one in declared]
    return page(
        "Metrics",
        "What `GET /metrics` has, in the order of its exposition. Each sample also has the label `replica`. The gauge "
        "`rm_metrics_scrape_incomplete` is 1 when some replica did not answer a scrape. How to read the monitors, and "
        "queries to start with: [monitoring.md](../monitoring.md).",
        table(("metric", "type", "labels", "meaning"), rows),
    )


def _row(metric: MetricWrapperBase) -> tuple[str, str, str, str]:
    """Return name, type, labels and meaning; what a metric was declared with has no public names."""
    kind, labels = str(metric._type), metric._labelnames  # noqa: SLF001
    # In the exposition the name of a counter ends in _total, and that of an info in _info.
    name = metric._name + {"counter": "_total", "info": "_info"}.get(kind, "")  # noqa: SLF001
    return f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), metric._documentation  # noqa: SLF001
