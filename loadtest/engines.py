"""Measures every way of scoring with one checkpoint, and the speed of its matrix products alone, in one run.

This module opens the model and prints the findings; work, ways, rounds and report have modules of their own. It needs
no server, no Ray and no network.

    python -m loadtest.engines [--model DIR | --shape 135M] [--workloads "groups of 8"] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.random_checkpoint import SHAPES
from loadtest.served_dtype import DTYPES
from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, device, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command
from service.data.rows import read_rows
from service.errors import DatasetError
from service.outputs import check_output_file

CLOCKS = ("wall", "cpu")

GPU_OPTIONS = {
    "--synchronous": "with each pass complete before the next one is launched",
    "--cuda-graphs": "with CUDA graphs for short batches",
    "--cascade": "with cascade attention to shared prefixes",
    "--fp8": "with linear layers in fp8",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if the model cannot be opened or a way fails."""
    return run_command("python -m loadtest.engines", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    for folder in (*([options.model] if options.model else []), *options.onnx):
        check_source(str(folder))
    if options.rows is not None and next(read_rows(options.rows), None) is None:
        raise DatasetError(f"{options.rows} has no row.")
    for file in (options.json, options.plot):
        if file is not None:
            check_output_file(file, overwrite=True)

    from loadtest.engine_comparison import run

    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.engines", description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: a random model)")
    model.add_argument("--shape", choices=SHAPES, default="24M", help="size of the random model (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: what the service would choose (default: %(default)s)"
    )
    _add_ways(parser.add_argument_group("further ways of scoring"))
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="leave out a way of the service that fails, with its traceback in --json, instead of ending",
    )
    _add_work(parser)
    _add_machine(parser.add_argument_group("machine and batches"))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write findings and measurements, after each workload"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the findings; the suffix determines the format")
    return parser


def _add_ways(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--onnx", type=Path, nargs="+", default=[], metavar="DIR", help="bundles exported from the same checkpoint")
    add("--compile", action="store_true", help="also measure the engine with compiled blocks")
    for option, meaning in GPU_OPTIONS.items():
        add(option, action="store_true", help=f"on a GPU, also measure the engine {meaning}")
    add("--batch-invariant", action="store_true", help="also measure the engine with batch-invariant rewards")
    add("--deterministic", action="store_true", help="also measure the engine with a forward pass for every item")
    add("--int8", action="store_true", help="on a CPU, also measure the engine with linear layers in int8")


def _add_work(parser: CommandParser) -> None:
    names = ", ".join(WORKLOADS)
    work = parser.add_mutually_exclusive_group()
    work.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"any of: {names} (default: all)",
    )
    work.add_argument(
        "--rows", type=Path, metavar="FILE", help="score the items or pairs of a data file instead of a workload"
    )
    add = parser.add_argument
    add("--items", type=whole_number(1), help="items of each workload (default: 128 on CPU, 1,024 on CUDA)")
    add("--rounds", type=whole_number(1), default=3, help="interleaved rounds (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of the texts (default: %(default)s)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=whole_number(1), help="CPU threads (default: all cores)")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds, for a CPU that other processes use too; with --threads 1 (default: %(default)s)",
    )
    add("--batch-tokens", type=whole_number(1), help="batch budget of the engine (default: as the service)")
    add(
        "--padded-items",
        type=whole_number(1),
        default=16,
        help="items of a padded batch of transformers (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
