"""Measures when the drift monitor detects a policy that slowly turns to a plausible hack, and how often it errs.

python -m loadtest.slow_drift measure OUTPUT [--data PAIRS ...] [--held-out PAIRS ...] [--model DIR --edited N]
python -m loadtest.slow_drift run OUTPUT [--runs 10] [--clean-batches 10000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from service.arguments import CommandParser, not_empty, whole_number
from service.commands import run_command
from service.data.rows import dataset_files
from service.errors import DatasetError
from service.outputs import check_output_file, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command("python -m loadtest.slow_drift", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    return _measure(options) if options.command == "measure" else _stage(options)


def _measure(options: argparse.Namespace) -> int:
    for path in (*options.data, *options.held_out):
        dataset_files(path)
    check_output_file(options.output, overwrite=True)

    from loadtest.worded_items import edited, measure, read_exchanges

    rows = list(edited(read_exchanges(options.data, options.held_out), options.edited))
    served = None
    if options.model is not None:
        from service.assembly import assemble
        from service.settings import read_settings

        served = assemble(read_settings({"model": {"path": options.model}}))
    measure(rows, served, options.output)
    return 0


def _stage(options: argparse.Namespace) -> int:
    if not options.items.is_file():
        raise DatasetError(f"There is no file {options.items}.")
    if options.json:
        check_output_file(options.json, overwrite=True)

    from loadtest.slow_drift_streams import print_report, run
    from loadtest.worded_items import read_measured

    report = run(
        read_measured(options.items),
        runs=options.runs,
        clean_batches=options.clean_batches,
        num_prompts=options.prompts,
    )
    print_report(report)
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.slow_drift", description="Measure when slow drift is detected.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    measured = commands.add_parser("measure", help="measure completions and their edits, and store them without text")
    measured.add_argument("output", type=Path, help=".npz file")
    measured.add_argument("--data", type=Path, nargs="+", default=[], help="pairs: prompt, chosen, rejected")
    measured.add_argument(
        "--held-out", type=Path, nargs="+", default=[], help="pairs of which only the held-out prompts are used"
    )
    measured.add_argument(
        "--model", type=not_empty, metavar="DIR", help="calibrated model that also gives states; default: texts only"
    )
    measured.add_argument("--edited", type=whole_number(1), metavar="N", help="prompts that are edited; default: all")
    stage = commands.add_parser("run", help="stage every edit")
    stage.add_argument("items", type=Path, help="output of the measure command")
    stage.add_argument("--runs", type=whole_number(1), default=10, help="of each variant (default: %(default)s)")
    stage.add_argument(
        "--clean-batches", type=whole_number(1), default=10_000, help="without a hack (default: %(default)s)"
    )
    stage.add_argument(
        "--prompts",
        type=whole_number(16),
        default=128,
        help="of a batch, monitors.drift_prompts (default: %(default)s)",
    )
    stage.add_argument("--json", type=Path, help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
