"""Measures the latency of single items by stage: the forward pass alone, one request at a time, and under half load.

It starts the service itself, with each runtime of ``--runtime``. Arguments are checked before anything heavy is
imported; measurement and report have modules of their own.

    python -m loadtest.latency [--model DIR] [--runtime local ray] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.served_dtype import DTYPES
from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, number_between, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command
from service.outputs import check_output_file

RUNTIMES = ("local", "ray")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a server does not start or a request gets no reward."""
    return run_command("python -m loadtest.latency", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    if options.model is not None:
        check_source(str(options.model))
    if options.json is not None:
        check_output_file(options.json, overwrite=True)

    from loadtest.latency_run import run

    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.latency", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="checkpoint folder (default: a random model of 24M parameters)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: what the service would choose (default: %(default)s)")
    add("--runtime", choices=RUNTIMES, nargs="+", default=["local"], help="of the service (default: local)")
    add("--workload", choices=list(WORKLOADS), default="independent", help="lengths (default: %(default)s)")
    add("--requests", type=whole_number(1), default=200, help="one at a time, and passes (default: %(default)s)")
    add("--capacity-s", type=number_between(0.1, 3600), default=15.0, help="of full load (default: %(default)s)")
    add("--load-s", type=number_between(0.1, 3600), default=60.0, help="of partial load (default: %(default)s)")
    add("--load", type=number_between(0.01, 1), default=0.5, help="share of the capacity (default: %(default)s)")
    add("--cores", type=whole_number(1), help="number of cores for server and generator together (default: all)")
    add("--seed", type=int, default=1, help="of the texts and arrivals (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
