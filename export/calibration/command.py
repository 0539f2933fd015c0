"""The command ``reward-calibrate``: makes the calibration of a reward model from completions that are normal.

The calibration is written to the checkpoint folder and is bound to the checkpoint. The command fails when the
false-alarm rate is out of tolerance on prompts that nothing was fitted to. Arguments, files and rows are checked before
anything heavy is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.calibration.data import CalibrationData, read_items, require_enough, sample_prompts
from export.calibration.hacks import SUITE
from service.arguments import CommandParser, device, named_weight, not_empty, whole_number
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CALIBRATION_FILE
from service.checkpoints.hub import check_source, local_folder
from service.commands import run_command, tell_on_standard_error
from service.errors import DatasetError, OutputError
from service.outputs import check_output_file
from service.records import DEMO_MODEL

LOG_WIDTH = 140
PROBE_COMPLETIONS = 32
"""Default number of completions of the probe, each of another prompt: with all edits some 600 texts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 for success, 1 when nothing was written, 3 when a false-alarm rate is out of tolerance.
    """
    return run_command("reward-calibrate", "export", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_parser()
    options = parser.parse(arguments)
    if options.test_only and not (options.test or options.ood):
        parser.error("--test-only needs --test or --ood: the data to test on")
    if options.model != DEMO_MODEL:
        check_source(options.model)
    _check_outputs(options)
    data = _read_data(options)
    if options.model != DEMO_MODEL:
        local_folder(options.model)  # downloads a hub id

    from rich.console import Console

    from export.calibration.run import calibrate

    return calibrate(options, data, Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH))


def _check_outputs(options: argparse.Namespace) -> None:
    """Check the files that will be written, where they are known before the checkpoint is opened."""
    if options.json:
        check_output_file(Path(options.json), overwrite=options.overwrite)
    if options.cache and Path(options.cache).exists() and not Path(options.cache).is_dir():
        raise OutputError(f"--cache is {options.cache}, which is a file: give a folder.")
    if options.test_only:
        return
    folder = Path(options.model).expanduser()
    if options.out:
        check_output_file(Path(options.out), overwrite=options.overwrite)
    elif options.model != DEMO_MODEL and folder.is_dir() and not (folder / ADAPTER_CONFIG_FILE).is_file():
        check_output_file(folder / CALIBRATION_FILE, overwrite=options.overwrite)


def _read_data(options: argparse.Namespace) -> CalibrationData:
    """Read all rows.

    Raises:
        DatasetError: a file cannot be read, or a row is not valid.
        CalibrationError: there are too few items to calibrate on.
    """
    items = []
    if not options.test_only:
        items = list(read_items(Path(options.data), held_out_only=options.held_out, tell=tell_on_standard_error))
        if options.max_items and len(items) > options.max_items:
            items = sample_prompts(items, options.max_items, options.seed)
        require_enough(items, options.data)
    paths = [Path(path) for path in (*options.test, *options.ood)]
    test_items = [item for path in paths for item in read_items(path, tell=tell_on_standard_error)]
    if paths and not test_items:
        raise DatasetError("The files of --test and --ood have no row.")
    return CalibrationData(items, test_items)


def command_parser() -> CommandParser:
    """Return the parser of ``reward-calibrate``."""
    parser = CommandParser(
        prog="reward-calibrate", description="Make the calibration of a reward model from completions that are normal."
    )
    parser.add_argument(
        "model", type=not_empty, metavar="DIR", help=f"checkpoint folder or hub id; {DEMO_MODEL}: the demo model"
    )
    parser.add_argument(
        "data",
        type=not_empty,
        metavar="DATA",
        help="items (prompt, completion) or pairs (prompt, chosen, rejected)",
    )
    _add_data_options(parser.add_argument_group("the data"))
    _add_output_options(parser.add_argument_group("what is written"))
    _add_test_options(parser.add_argument_group("tests on data of your own"))
    _add_model_options(parser.add_argument_group("the model"))
    return parser


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--max-items",
        type=whole_number(1),
        metavar="N",
        help="use about N items of DATA; prompts are sampled at random",
    )
    add("--held-out", action="store_true", help="only prompts that the demo model was not trained on")
    add(
        "--items-per-set",
        type=whole_number(1),
        default=40,
        metavar="N",
        help="items of each set of hacks; default 40",
    )
    add(
        "--drop-set", action="append", default=[], choices=[entry.name for entry in SUITE], metavar="NAME",
        help="a built-in set that is normal in your traffic (code_dump, chinese, ...); repeatable",
    )  # fmt: skip
    add(
        "--probe-completions",
        type=whole_number(0),
        default=PROBE_COMPLETIONS,
        metavar="N",
        help=f"completions that are edited to show what the reward pays for; default {PROBE_COMPLETIONS}, 0: no probe",
    )
    add("--seed", type=int, default=0, help="of the random choices; default 0")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--out",
        type=not_empty,
        metavar="FILE",
        help=f"default: {CALIBRATION_FILE} in the checkpoint folder (demo: in the clone)",
    )
    add("--json", metavar="FILE", help="write all figures to this file")
    add("--cache", metavar="FOLDER", help="store scores there for later fits")
    add("--overwrite", action="store_true", help="replace an existing calibration, and --json's file")
    add("--force", action="store_true", help="write the calibration even if it detects hardly anything")


def _add_test_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--test", action="append", default=[], metavar="DATA", help="test on these items; repeatable")
    add(
        "--ood", action="append", default=[], metavar="FOLDER",
        help="test on rows with prompt, response, category and is_ood; repeatable",
    )  # fmt: skip
    add("--test-only", action="store_true", help="test the existing calibration; DATA is not read")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="arithmetic of the body; default: as reward-serve",
    )
    add("--device", type=device, help="auto, cpu, cuda or cuda:N")
    add("--max-input-tokens", type=whole_number(1), metavar="N", help="token limit of the service")
    add(
        "--weights",
        nargs="+",
        type=named_weight,
        metavar="NAME=WEIGHT",
        help="of the outputs of a model with several, whose weighted sum is calibrated; default: the model's own",
    )


if __name__ == "__main__":
    sys.exit(main())
