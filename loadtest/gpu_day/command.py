"""Tests and measures everything that runs on a GPU, section by section, and writes one report.

It needs torch 2.11 or newer, transformers 5.17 or newer, the packages of requirements/gpu-day.txt, and a clone of the
repository, from whose root it is run; neither Ray nor a network. A section that fails or takes too long does not end
the run.

    python -m loadtest.gpu_day [--minutes 25] [--device cuda] [--out gpu-day] [--sections load ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadtest.gpu_day.plan import KINDS
from service.arguments import CommandParser, device, number_between
from service.commands import run_command
from service.outputs import check_output_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a section failed or ran out of time."""
    return run_command("python -m loadtest.gpu_day", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)

    from loadtest.gpu_day.day import run
    from loadtest.gpu_day.report import FILES

    check_output_folder(options.out, overwrite=options.overwrite, entries=FILES, option="--out")
    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.gpu_day", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=number_between(1, 600), default=25.0, help="time for all sections (default: 25)")
    add(
        "--device",
        type=device,
        default="cuda",
        help="cuda, cuda:N, or cpu: the same sections on tiny models (default: %(default)s)",
    )
    add(
        "--sections",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        metavar="KIND",
        help=f"any of: {', '.join(KINDS)} (default: all)",
    )
    add("--out", type=Path, default=Path("gpu-day"), metavar="DIR", help="folder of the report (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a report that is there")
    return parser
