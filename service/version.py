"""The version of the installed distribution, and the option that prints it."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "reward-service"


def distribution_version() -> str:
    """Return the version of the installed distribution; ``0+unknown`` where the code runs without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+unknown"


def add_version_option(parser: ArgumentParser) -> None:
    """Give a command the option ``--version``, which prints its name and the distribution's version."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {distribution_version()}")
