"""Starts the plain server that the service is compared with (``loadtest.padded_server``).

python -m loadtest.baseline --model FOLDER --port 8001 --dtype bfloat16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from service.arguments import CommandParser, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until a signal stops it; returns the exit status."""
    return run_command("python -m loadtest.baseline", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    check_source(str(options.model))

    from loadtest.padded_server import serve

    serve(options.model, options.port, options.dtype)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.baseline", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with a one-label head")
    parser.add_argument("--port", type=whole_number(1), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
