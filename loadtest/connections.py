"""Measures a running service by single items at once: over persistent connections, and with a new one for each.

OpenRLHF and verl send one item per request, each on a new TCP connection. This is their load, in OpenRLHF's format.

    python -m loadtest.connections [--url URL] [--in-flight 256]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, whole_number
from service.commands import run_command
from service.outputs import check_output_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a connection is refused or an item gets no reward."""
    return run_command("python -m loadtest.connections", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    if options.json is not None:
        check_output_file(options.json, overwrite=True)

    from loadtest.connection_cost import run

    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.connections", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="root URL of the service (default: %(default)s)")
    parser.add_argument(
        "--in-flight", type=whole_number(1), default=256, help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=whole_number(1), default=1024, help="single items of each pass (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="alternating rounds (default: %(default)s)")
    parser.add_argument(
        "--workload", choices=list(WORKLOADS), default="short", help="lengths of the texts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the texts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
