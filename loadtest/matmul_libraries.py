"""Compares the fp32 matrix products of CPU libraries on a model's layer shapes, alternately in one process.

It also tells which of them give a row the same bits whatever it is multiplied with, as a reward service needs.
Variables that limit the instruction set apply: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS,
OPENBLAS_CORETYPE. ONNX Runtime has none and always uses what the CPU has.

    python -m loadtest.matmul_libraries [--shapes 24M 135M] [--rows 2048] [--threads 2]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loadtest.random_checkpoint import SHAPES
from service.arguments import CommandParser, whole_number
from service.commands import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command("python -m loadtest.matmul_libraries", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)

    from loadtest.library_comparison import run

    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.matmul_libraries", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shapes", choices=SHAPES, nargs="+", default=["24M", "135M"], help="models (default: 24M 135M)")
    add("--rows", type=whole_number(1), default=2048, help="tokens of a batch (default: %(default)s)")
    add("--rounds", type=whole_number(1), default=5, help="alternating rounds (default: %(default)s)")
    add("--threads", type=whole_number(1), help="CPU threads (default: all cores)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU seconds, for a CPU that other processes use too; with --threads 1 (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
