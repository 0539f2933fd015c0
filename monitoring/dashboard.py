"""The dashboard's file, and the command that writes it from the panels: ``python -m monitoring.dashboard``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from service.arguments import CommandParser
from service.commands import run_command
from service.outputs import write_text

PATH = Path(__file__).with_name("dashboard.json")
EMPTY_WHEN = "May be empty when "
"""Start of the sentence in a description that gives the reason why a panel may be empty."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboard's JSON; returns the exit status."""
    return run_command("python -m monitoring.dashboard", "monitoring", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    CommandParser(prog="python -m monitoring.dashboard", description=f"Write {PATH.name}.").parse(arguments)

    from monitoring.grafana import dashboard_text

    write_text(PATH, dashboard_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
