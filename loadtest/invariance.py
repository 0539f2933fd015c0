"""Measures batch invariance: rewards of the same texts alone and in shuffled batches, for each engine and dtype.

Prefixes are shared within batches and cached between them, as in the service. It measures no time and needs neither Ray
nor a network.

    python -m loadtest.invariance [--model DIR | --shape 24M] [--onnx BUNDLE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.random_checkpoint import SHAPES
from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, device, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command
from service.outputs import check_output_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if an engine cannot be loaded."""
    return run_command("python -m loadtest.invariance", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    for folder in (*([options.model] if options.model else []), *options.onnx):
        check_source(str(folder))
    if options.json is not None:
        check_output_file(options.json, overwrite=True)

    from loadtest.batch_effect import run

    return run(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.invariance", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: a random model)")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="24M", help="size of the random model (default: %(default)s)"
    )
    parser.add_argument(
        "--onnx", type=Path, nargs="+", metavar="DIR", default=[], help="bundles of the same checkpoint"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--int8", action="store_true", help="on a CPU, also measure linear layers in int8")
    parser.add_argument("--deterministic", action="store_true", help="as the setting: a forward pass for every text")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="as the setting, for the torch engine: verified blocks of rows"
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="groups of 8")
    parser.add_argument("--items", type=whole_number(1), default=64, help="number of texts (default: %(default)s)")
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--seed", type=int, default=1, help="seed of texts and orders (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
