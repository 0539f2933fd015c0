"""The console on which the measuring commands print their tables."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH_IN_FILES = 130
"""Characters; without a terminal rich assumes 80, too few for the tables."""


def report_console() -> Console:
    """Return a console as wide as the terminal, or wide enough for the tables where there is none."""
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_known else WIDTH_IN_FILES)
