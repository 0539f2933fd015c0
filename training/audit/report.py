"""Writes the report of an audit: a self-contained HTML file, the figures as JSON, the pictures as PNG."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from service.outputs import new_folder
from training.audit.charts import draw_all
from training.audit.conclusions import NO_PAIR, conclusions_of, summary_of
from training.audit.files import HTML_FILE, JSON_FILE, PICTURE_FOLDER, REPORT_ENTRIES
from training.audit.findings import Findings
from training.audit.intervals import Interval, significant
from training.failures import describe_reasons

PNG_DPI = 160
_DATA_FIELDS = ("scored", "completions")
"""Fields of the findings that are data and not results; they are not written."""


def write_report(findings: Findings, folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``audit.html``, ``audit.json`` and ``pictures/*.png`` into a folder, created if needed; return the HTML.

    Raises:
        OutputError: the folder has an earlier report that may not be replaced, or it cannot be written.
    """
    figures = draw_all(findings)
    texts = {
        JSON_FILE: json.dumps(as_json(findings), indent=2, allow_nan=False) + "\n",
        HTML_FILE: render_html(findings, figures),
    }
    with new_folder(folder, overwrite=overwrite, entries=REPORT_ENTRIES) as unfinished:
        pictures = unfinished / PICTURE_FOLDER
        pictures.mkdir()
        for name, figure in figures.items():
            figure.savefig(pictures / f"{name}.png", dpi=PNG_DPI, metadata={"Software": None})
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
    return folder / HTML_FILE


def as_json(findings: Findings) -> dict[str, Any]:
    """Return the figures, JSON-ready: summary and conclusions first, null where there were no data."""
    results = {
        field.name: getattr(findings, field.name)
        for field in dataclasses.fields(findings)
        if field.name not in _DATA_FIELDS
    }
    plain: dict[str, Any] = _plain(
        {"summary": summary_of(findings), "conclusions": conclusions_of(findings), **results}
    )
    return plain


def render_html(findings: Findings, figures: Mapping[str, Figure]) -> str:
    """Return the report as one HTML document with embedded pictures; it loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training", "audit"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": _interval,
        "signed": _signed_interval,
        "reasons": describe_reasons,
        "significant": significant,
    }
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        summary=summary_of(findings),
        conclusions=conclusions_of(findings),
        pictures={name: _data_uri(figure) for name, figure in figures.items() if name != "overview"},
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=version("reward-service"),
    )


def _data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", dpi=PNG_DPI, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _percent(value: float) -> str:
    return NO_PAIR if math.isnan(value) else f"{value:.1%}"


def _interval(estimate: Interval) -> str:
    """Format a share with its interval, in percent."""
    if math.isnan(estimate.value):
        return NO_PAIR
    return f"{_percent(estimate.value)} ({_percent(estimate.low)} to {_percent(estimate.high)})"


def _signed_interval(estimate: Interval) -> str:
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _plain(value: Any) -> Any:
    """Convert records to dictionaries recursively; numbers that are not finite become None, since JSON has no NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
