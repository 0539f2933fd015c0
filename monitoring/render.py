"""Draws the dashboard without Grafana: ``python -m monitoring.render --url http://127.0.0.1:9090 dashboard.png``.

Every query of the dashboard's JSON is evaluated on a running Prometheus and drawn at its panel's position. It is not
Grafana's rendering; it shows the contents of the panels, and fails where a query fails or a panel is empty without a
stated reason.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.dashboard import PATH
from service.arguments import CommandParser, number_between
from service.commands import run_command
from service.errors import SettingsError
from service.outputs import check_output_file, new_file

NAME = "python -m monitoring.render"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 where a query fails or a panel is empty without a stated reason."""
    return run_command(NAME, "monitoring", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    check_output_file(options.output, overwrite=True)
    plan = _read_dashboard(options.dashboard)

    from monitoring.pictures import NUM_POINTS, draw, evaluate, unexplained
    from monitoring.prometheus_api import QueryError, Span

    end = time.time()
    span = Span(end - 60 * options.minutes, end, max(1.0, 60 * options.minutes / NUM_POINTS))
    try:
        panels = evaluate(plan, options.url, span, options.job)
    except QueryError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    with new_file(options.output) as unfinished:
        suffix = options.output.suffix.removeprefix(".") or "png"
        draw(plan, panels, span).savefig(unfinished, dpi=80, format=suffix)
    holes = unexplained(panels)
    for title in holes:
        print(f"Panel without data: {title}", file=sys.stderr)
    return 1 if holes else 0


def _read_dashboard(file: Path) -> dict[str, Any]:
    try:
        plan = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"The dashboard {file} cannot be read as JSON: {type(error).__name__}.") from None
    if not isinstance(plan, dict) or "panels" not in plan:
        raise SettingsError(f"{file} is no Grafana dashboard: it has no panels.")
    return plan


def _parser() -> CommandParser:
    parser = CommandParser(prog=NAME, description="Draw the dashboard as a picture.")
    parser.add_argument("output", type=Path, help="PNG, SVG or PDF, by its extension")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="URL of Prometheus (default: %(default)s)")
    parser.add_argument("--dashboard", type=Path, default=PATH, help="the dashboard's JSON (default: the shipped one)")
    parser.add_argument(
        "--minutes",
        type=number_between(0.1, 525_600),
        default=60.0,
        help="length of the time range up to now (default: %(default)s)",
    )
    parser.add_argument("--job", default=".+", help="regular expression of the job label (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
