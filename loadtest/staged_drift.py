"""Measures when the monitors detect staged hacks, on items that a running service scored.

python -m loadtest.staged_drift score CLEAN HACKS OUTPUT [--url URL]
python -m loadtest.staged_drift run OUTPUT CALIBRATION [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from service.arguments import CommandParser, whole_number
from service.commands import run_command
from service.data.rows import dataset_files
from service.errors import CalibrationError
from service.outputs import check_output_file, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command("python -m loadtest.staged_drift", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    return _score(options) if options.command == "score" else _stage(options)


def _score(options: argparse.Namespace) -> int:
    for path in (options.clean, options.hacks):
        dataset_files(path)
    check_output_file(options.output, overwrite=True)

    from loadtest.staged_hacks import score_items

    score_items(options.url, options.clean, options.hacks, options.output)
    return 0


def _stage(options: argparse.Namespace) -> int:
    dataset_files(options.items)
    if not options.calibration.is_file():
        raise CalibrationError(f"There is no calibration file {options.calibration}.")
    if options.json:
        check_output_file(options.json, overwrite=True)

    from loadtest.staged_hacks import print_report, read_pools, run
    from service.diagnostics.calibration import read_calibration

    report = run(
        read_pools(options.items),
        read_calibration(options.calibration).monitors,
        runs=options.runs,
        clean_batches=options.clean_batches,
        run_length=options.false_alarm_batches,
    )
    print_report(report)
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m loadtest.staged_drift", description="Measure when the monitors detect staged hacks."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    score = commands.add_parser("score", help="score clean pairs and hacked responses with a running service")
    score.add_argument("clean", type=Path, help="pairs: prompt, chosen, rejected")
    score.add_argument("hacks", type=Path, help="folder of rows: category, prompt, response")
    score.add_argument("output", type=Path, help="JSON lines of scored items, without text")
    score.add_argument("--url", default="http://127.0.0.1:8000")
    stage = commands.add_parser("run", help="stage every hack with scored items")
    stage.add_argument("items", type=Path, help="output of the score command")
    stage.add_argument("calibration", type=Path, help="calibration file of the model that scored them")
    stage.add_argument(
        "--runs",
        type=whole_number(1),
        default=10,
        help="runs of each hack, of which the median is reported (default: %(default)s)",
    )
    stage.add_argument(
        "--clean-batches",
        type=whole_number(1),
        default=10_000,
        help="clean batches in which false alarms are counted (default: %(default)s)",
    )
    stage.add_argument(
        "--false-alarm-batches",
        type=whole_number(1),
        default=10_000,
        help="batches between false alarms that the thresholds are designed for (default: %(default)s)",
    )
    stage.add_argument("--json", type=Path, help="write the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
