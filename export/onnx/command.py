"""The command ``reward-export``: its arguments are checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.arguments import CommandParser, not_empty, number_between, whole_number
from service.checkpoints.files import BUNDLE_MANIFEST_FILE
from service.checkpoints.hub import check_source, local_folder
from service.commands import run_command, tell_on_standard_error
from service.data.reading import read_examples
from service.errors import DatasetError, OutputError
from service.outputs import check_output_folder
from service.records import DEMO_MODEL, StateTap

if TYPE_CHECKING:
    from export.onnx.bundle_export import ExportPlan
    from service.checkpoints.bundle import Manifest

PRECISIONS = ("fp32", "fp16", "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-export``; returns the exit status: 0, or 1 after one sentence on standard error."""
    return run_command("reward-export", "export", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = command_parser().parse(arguments)
    check_output_folder(options.out, overwrite=options.overwrite, marker=BUNDLE_MANIFEST_FILE)
    source = options.source
    if source != DEMO_MODEL:
        check_source(source)
        if Path(source).expanduser().resolve().is_relative_to(options.out.expanduser().resolve()):
            raise OutputError(f"{options.out} holds the checkpoint itself: choose another folder.")
    if options.items is not None:
        _check_items(options.items)
    if source != DEMO_MODEL:
        local_folder(source)  # downloads a hub id

    import onnx  # noqa: F401 - whether the extra is installed shows before the model is loaded
    import onnxscript  # noqa: F401
    from rich.console import Console

    from export.onnx.bundle_export import export_bundle
    from service.console import stages

    console = Console(stderr=True, soft_wrap=True)
    with stages(console) as stage:
        manifest = export_bundle(source, options.out, _plan(options), stage, overwrite=options.overwrite)
    for line in report(manifest, options.out):
        console.print(line, markup=False, highlight=False)
    return 0


def _check_items(file: Path) -> None:
    """Parse the rows of a data file.

    Raises:
        DatasetError: it cannot be read, has no row, or a row is not valid.
    """
    if not any(parsed.completions for _, parsed in read_examples(file, tell=tell_on_standard_error)):
        raise DatasetError(f"{file} has no row.")


def _plan(options: argparse.Namespace) -> ExportPlan:
    from export.onnx.bundle_export import ExportPlan
    from export.onnx.reward_comparison import BOUNDS, Bounds

    bounds = BOUNDS[options.precision]
    if options.max_difference is not None or options.min_spearman is not None:
        bounds = Bounds(options.max_difference, options.min_spearman)
    return ExportPlan(
        precision=options.precision,
        taps=None if options.taps is None else tuple(options.taps),
        items=options.items,
        bounds=bounds,
        max_input_tokens=options.max_input_tokens,
    )


def report(manifest: Manifest, out: Path) -> list[str]:
    """Return the result as lines for a terminal."""
    parity = manifest.parity
    return [
        f"{out} is an ONNX bundle of {manifest.architecture} in {manifest.precision}.",
        f"  compared with     plain transformers in float32, {parity.num_texts} texts ({parity.text_source})",
        f"  difference        {parity.max_difference:.3g} at most, {parity.mean_difference:.3g} on average",
        f"  rank correlation  {parity.spearman:.5f}",
        f"  pairs in order    {parity.pair_agreement:.2%}",
        f"Serve it with: reward-serve --model {out}",
    ]


def parse_tap(text: str) -> StateTap:
    """Parse a tap of the command line, such as ``12:mean``.

    Raises:
        ValueError: it has another form.
    """
    layer, _, pooling = text.partition(":")
    if pooling == "mean":
        return StateTap(int(layer), "mean")
    if pooling == "last":
        return StateTap(int(layer), "last")
    raise ValueError(text)


def _tap(text: str) -> StateTap:
    try:
        return parse_tap(text)
    except ValueError:
        raise argparse.ArgumentTypeError("give a layer and a pooling, such as 12:mean or 12:last") from None


def command_parser() -> CommandParser:
    """Return the parser of ``reward-export``."""
    parser = CommandParser(
        prog="reward-export", description="Export a scalar-head checkpoint to an ONNX bundle for reward-serve."
    )
    add = parser.add_argument
    add("source", type=not_empty, metavar="DIR", help="checkpoint folder, PEFT adapter or hub id, or 'demo'")
    add("out", type=Path, metavar="OUT", help="the folder to write; must not exist or be empty")
    _add_bundle_options(parser.add_argument_group("the bundle"))
    _add_comparison_options(parser.add_argument_group("the comparison with plain transformers"))
    return parser


def _add_bundle_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--precision", choices=PRECISIONS, default="fp32", help="fp16: for GPUs; int8: for CPUs (default: fp32)")
    add("--taps", type=_tap, nargs="+", metavar="LAYER:POOLING", help="where states are read, for example 12:mean")
    add("--max-input-tokens", type=whole_number(1), metavar="N", help="tokens of the longest text that may be scored")
    add("--overwrite", action="store_true", help="replace an earlier bundle in OUT")


def _add_comparison_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--items",
        type=Path,
        metavar="FILE",
        help="items or pairs to compare on (JSON lines, Parquet); default: built-in texts",
    )
    add(
        "--max-difference",
        type=number_between(0, float("inf")),
        metavar="X",
        help="limit of the largest difference, instead of the default",
    )
    add(
        "--min-spearman",
        type=number_between(-1, 1),
        metavar="X",
        help="limit of the rank correlation, instead of the default",
    )


if __name__ == "__main__":
    raise SystemExit(main())
