"""``reward-audit``: reports how well a checkpoint or a running service predicts human preferences.

Arguments, files, rows and the output folder are checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from service.arguments import CommandParser, device, named_weight, not_empty, whole_number
from service.checkpoints.hub import check_source, local_folder
from service.commands import run_command, tell_on_standard_error
from service.errors import SettingsError
from service.outputs import check_output_folder
from service.records import DEMO_MODEL
from training.audit.data import MAX_TRAIN_PAIRS, read_data
from training.audit.files import REPORT_ENTRIES

if TYPE_CHECKING:
    from rich.console import Console

    from service.edits.probe import Probe
    from training.audit.findings import Findings
    from training.audit.scoring import Scorer

START_WAIT_S = 5.0
"""Seconds for which a service that does not answer is tried."""

PROBE_COMPLETIONS = 200
"""Default number of completions of a probe: intervals of about a tenth of the reward's standard deviation."""

_COLOURS = {"good": "green", "warning": "yellow", "bad": "red", "unknown": "dim"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-audit``; returns the exit status: 0, or 1 after one sentence on standard error."""
    return run_command("reward-audit", "train", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = command_parser().parse(arguments)
    model, sources = _model_and_sources(options)
    check_output_folder(options.out, overwrite=options.overwrite, entries=REPORT_ENTRIES)
    data = read_data(sources, options.train_pairs, tell_on_standard_error)
    if model is None:
        _check_service(options.url)
    elif model != DEMO_MODEL:
        model = str(local_folder(model))

    from rich.console import Console

    from training.audit.run import audit

    console = Console(stderr=True, soft_wrap=True)
    with ExitStack() as opened:
        findings = audit(
            _scorer(options, model, opened),
            data,
            options.out,
            max_train_pairs=options.max_train_pairs,
            hide_texts=options.hide_texts,
            probe_completions=options.probe_completions if options.probe else 0,
            overwrite=options.overwrite,
            console=console,
        )
    _print(findings, options.out, console)
    return 0


def _print(findings: Findings, out: Path, console: Console) -> None:
    from training.audit.conclusions import conclusions_of, summary_of
    from training.audit.files import HTML_FILE

    console.print(summary_of(findings), style="bold", markup=False, highlight=False)
    for conclusion in conclusions_of(findings):
        console.print(f"{conclusion.question}: ", end="", highlight=False)
        console.print(conclusion.answer, style=_COLOURS[conclusion.level], highlight=False)
        console.print(f"  {conclusion.reason}", style="dim", markup=False, highlight=False)
    for output in findings.outputs:
        pairs = f"{output.num_pairs:,} {'pairs of its own' if output.labelled else 'pairs, all of them'}"
        console.print(
            f"Output {output.name}: accuracy {output.accuracy.value:.1%} on {pairs}; the longer answer "
            f"{output.longer_wins.value:.1%}; correlation with length within prompts {output.length_within.value:+.2f}",
            markup=False,
            highlight=False,
        )
    if findings.probe is not None:
        _print_probe(findings.probe, console)
    console.print(f"The report is {out / HTML_FILE}", markup=False, highlight=False)


def _print_probe(probe: Probe, console: Console) -> None:
    console.print(f"Edits of {probe.num_completions:,} chosen answers, and how they move the reward:", highlight=False)
    for one in probe.effects:
        console.print(
            f"  {one.description}: {one.effect:+.3f} ({one.low:+.3f} to {one.high:+.3f}), "
            f"{one.effect_sd:+.2f} standard deviations",
            style="yellow" if one.pays else "",
            markup=False,
            highlight=False,
        )
    pays = ", ".join(one.description for one in probe.paying())
    console.print(f"It pays for: {pays or 'none of them'}", style="bold", markup=False, highlight=False)


def _model_and_sources(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return the model, which is the first input, or None with a URL; and the files of held-out pairs."""
    if options.url is not None:
        from reward_client.addresses import service_url

        service_url(options.url)
        return None, options.inputs
    model, *sources = options.inputs
    if model != DEMO_MODEL:
        check_source(model)
    if not sources:
        raise SettingsError("Give files of held-out pairs after the checkpoint folder.")
    return model, sources


def _check_service(url: str) -> None:
    """Ask a service for its model before pairs are sent to it.

    Raises:
        SettingsError: no service answers there.
        ClientError: the URL is not a root URL, or the service does not answer as one of ours.
    """
    from reward_client import RewardClient
    from reward_client.errors import ServiceUnreachable

    try:
        with RewardClient(url, wait_for_start_s=START_WAIT_S) as client:
            client.model()
    except ServiceUnreachable as error:
        raise SettingsError(
            f"No reward service answers at {error.url} ({error.reason}): start it, or check the URL."
        ) from error


def _scorer(options: argparse.Namespace, model: str | None, opened: ExitStack) -> Scorer:
    from reward_client import RewardClient

    from training.audit.scoring import ServiceScorer, load_checkpoint_scorer

    weights = dict(options.weights) if options.weights else None
    if model is None:
        return ServiceScorer(opened.enter_context(RewardClient(options.url)), options.truncation, weights)
    return load_checkpoint_scorer(
        Path(model),
        truncation=options.truncation,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.threads,
        reward_weights=weights,
    )


def command_parser() -> CommandParser:
    """Return the parser of ``reward-audit``."""
    parser = CommandParser(
        prog="reward-audit",
        usage="reward-audit (DIR | --url URL) PAIRS... --out DIR [options]",
        description="Report whether a reward model measures preference or mostly length.",
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="DIR PAIRS",
        help=f"checkpoint folder, hub id or {DEMO_MODEL} (not with --url), then files of held-out pairs",
        type=not_empty,
    )
    _add_report_options(parser.add_argument_group("the report"))
    _add_pairs_options(parser.add_argument_group("the pairs"))
    _add_model_options(parser.add_argument_group("the model"))
    return parser


def _add_report_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, help=f"folder for {', '.join(REPORT_ENTRIES)}")
    add("--overwrite", action="store_true", help="replace an earlier report in --out")
    add("--hide-texts", action="store_true", help="leave the texts of the completions with the highest rewards out")


def _add_pairs_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--train-pairs",
        nargs="+",
        default=[],
        help="pairs that it was trained on, for the checks of leakage and over-training",
    )
    add(
        "--max-train-pairs",
        type=whole_number(1),
        default=MAX_TRAIN_PAIRS,
        help="number of training pairs that are scored (default: 1000)",
    )
    add("--probe", action="store_true", help="edit chosen completions and report which edits the reward pays for")
    add(
        "--probe-completions",
        type=whole_number(1),
        default=PROBE_COMPLETIONS,
        metavar="N",
        help=f"completions that --probe edits, in some 18 ways each (default: {PROBE_COMPLETIONS})",
    )
    add(
        "--truncation",
        choices=("error", "prompt_left"),
        default="error",
        help="for conversations above the token limit: leave the pair out, or truncate the prompt on the left",
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", type=not_empty, help="a running service instead of a checkpoint folder")
    add(
        "--weights",
        nargs="+",
        type=named_weight,
        metavar="NAME=WEIGHT",
        help="of the outputs of a model with several, whose weighted sum is audited (default: the model's own)",
    )
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (checkpoint folder only)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="checkpoint folder only")
    add(
        "--threads", type=whole_number(1), help="CPU threads of the forward pass (default: all; checkpoint folder only)"
    )


if __name__ == "__main__":
    sys.exit(main())
