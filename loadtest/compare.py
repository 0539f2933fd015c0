"""Compares the throughput of the service with that of another server, on the same checkpoint, cores and work.

Servers, work, requests and report have modules of their own; arguments are checked before any of them is imported.

    python -m loadtest.compare [--model FOLDER] [--cores 2] [--json FILE]
    python -m loadtest.compare --peer onnxruntime
    python -m loadtest.compare --peer vllm --peer-python VENV/bin/python [--prefix-cache off]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.peers import PEERS
from loadtest.served_dtype import DTYPES
from service.arguments import CommandParser, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command
from service.outputs import check_output_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a server does not start or the rewards differ."""
    return run_command("python -m loadtest.compare", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse(arguments)
    _check_interpreter(options, parser)
    if options.model is not None:
        check_source(str(options.model))
    if options.json is not None:
        check_output_file(options.json, overwrite=True)

    from loadtest.server_comparison import run

    return run(options)


def _check_interpreter(options: argparse.Namespace, parser: CommandParser) -> None:
    if options.peer_python is None:
        if PEERS[options.peer].has_own_environment:
            parser.error(
                f"--peer {options.peer} needs --peer-python: the interpreter of an environment of its own, in which "
                f"pip installed {PEERS[options.peer].install}"
            )
        options.peer_python = Path(sys.executable)
    elif options.peer == "plain":
        parser.error("--peer plain runs in this environment: leave out --peer-python")
    elif not os.access(options.peer_python, os.X_OK) or options.peer_python.is_dir():
        parser.error(f"--peer-python {options.peer_python} is no interpreter")


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint folder (default: a random model of 24M parameters)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of both servers (onnxruntime: of the service); auto: what the service would choose "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--peer", choices=list(PEERS), default="plain", help="server to compare with (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-python", type=Path, metavar="FILE", help="interpreter of the environment in which the peer is installed"
    )
    parser.add_argument(
        "--prefix-cache", choices=("on", "off"), default="on", help="prefix cache of vLLM (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="alternating rounds (default: %(default)s)")
    parser.add_argument(
        "--single-groups",
        type=whole_number(1),
        default=16,
        help="groups of 8 sent as single items in each round (default: %(default)s)",
    )
    parser.add_argument(
        "--bulk-groups",
        type=whole_number(1),
        default=16,
        help="groups of 8 in the bulk request of each round (default: %(default)s)",
    )
    parser.add_argument(
        "--cores",
        type=whole_number(1),
        help="number of cores for both servers and the generator together (default: all)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the texts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
