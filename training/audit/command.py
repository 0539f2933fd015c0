"""``reward-audit``: reports how well a checkpoint or a running service predicts human preferences."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from reward_client import RewardClient
from reward_client.errors import ClientError
from rich.console import Console

from service.console import progress_bar
from service.errors import SettingsError, StartupError
from service.settings import DEMO_MODEL
from service.version import add_version_option
from training.audit.conclusions import conclusions_of
from training.audit.findings import Findings, investigate
from training.audit.report import write_report
from training.audit.scored_pairs import ScoredPairs
from training.audit.scoring import Scorer, ServiceScorer, load_checkpoint_scorer, score_pairs
from training.failures import describe_reasons
from training.preferences import PreferencePair, read_pairs
from training.sources import Source, source_hashes

MAX_TRAIN_PAIRS = 1000
START_WAIT_S = 5.0
"""Seconds for which a service that does not answer is tried."""
"""Training pairs that are scored for the over-training check; all of them are searched for leaked prompts."""

_COLOURS = {"good": "green", "warning": "yellow", "bad": "red", "unknown": "dim"}


def audit(
    scorer: Scorer,
    sources: Sequence[Source],
    out_dir: Path,
    *,
    train_sources: Sequence[Source] = (),
    max_train_pairs: int = MAX_TRAIN_PAIRS,
    hide_texts: bool = False,
    console: Console | None = None,
) -> Findings:
    """Score the pairs of the sources, compute all measures and write the report to ``out_dir``.

    Args:
        scorer: the model.
        sources: pairs that it was not trained on.
        out_dir: created if it does not exist; receives ``audit.html``, ``audit.json`` and ``pictures/``.
        train_sources: pairs that it was trained on, for the checks of leakage and over-training.
        max_train_pairs: number of them that are scored, sampled with a fixed seed.
        hide_texts: leave the texts of the highest completions out of the report.
        console: for the progress bar and for what was found in the data; None: neither is shown.

    Raises:
        DatasetError: a source cannot be read, or too few pairs have a reward.
        ClientError: the service refuses a request or cannot be reached.
    """
    console = console or Console(quiet=True)
    tell = partial(console.print, markup=False, highlight=False)
    pairs, train_pairs = list(read_pairs(sources, tell)), list(read_pairs(train_sources, tell))
    drawn = random.Random(0).sample(train_pairs, min(max_train_pairs, len(train_pairs)))  # noqa: S311 - no secret
    scored, trained = _score(scorer, pairs, drawn, console)
    for part, name in ((scored, "pairs"), (trained, "training pairs")):
        if part.failures:
            tell(f"{part.num_failed:,} {name} have no reward: {describe_reasons(part.failures)}.")
    findings = investigate(
        scored,
        model=scorer.description(),
        data=_describe_data(sources, train_sources, scored),
        trained=trained if train_sources else None,
        train_pairs=train_pairs if train_sources else None,
        hide_texts=hide_texts,
    )
    write_report(findings, out_dir)
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-audit``; returns the exit status: 0, or 1 after one sentence on standard error."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        with ExitStack() as opened:
            scorer, pairs = _scorer_and_pairs(options, opened)
            findings = audit(
                scorer,
                pairs,
                options.out,
                train_sources=options.train_pairs,
                max_train_pairs=options.max_train_pairs,
                hide_texts=options.hide_texts,
                console=console,
            )
    except (StartupError, ClientError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    for conclusion in conclusions_of(findings):
        console.print(f"{conclusion.question}: ", end="", highlight=False)
        console.print(conclusion.answer, style=_COLOURS[conclusion.level], highlight=False)
        console.print(f"  {conclusion.reason}", style="dim", markup=False, highlight=False)
    console.print(f"The report is {options.out / 'audit.html'}", markup=False, highlight=False)
    return 0


def _score(
    scorer: Scorer, pairs: Sequence[PreferencePair], train_pairs: Sequence[PreferencePair], console: Console
) -> tuple[ScoredPairs, ScoredPairs]:
    with progress_bar(console, "Scoring", 2 * (len(pairs) + len(train_pairs))) as advance:
        return score_pairs(pairs, scorer, advance), score_pairs(train_pairs, scorer, advance)


def _describe_data(
    sources: Sequence[Source], train_sources: Sequence[Source], scored: ScoredPairs
) -> Mapping[str, Any]:
    def files(named: Sequence[Source]) -> list[dict[str, str]]:
        return [{"name": name, "sha256": digest} for name, digest in source_hashes(named).items()]

    return {
        "files": files(sources),
        "train_files": files(train_sources),
        "pairs_without_reward": dict(scored.failures),
        "pairs_of_identical_completions": scored.num_ties,
    }


def _scorer_and_pairs(options: argparse.Namespace, opened: ExitStack) -> tuple[Scorer, list[str]]:
    """Create the scorer; without a URL the first input is the model."""
    if options.url is not None:
        client = opened.enter_context(RewardClient(options.url, wait_for_start_s=START_WAIT_S))
        return ServiceScorer(client, options.truncation), options.inputs
    model, *pairs = options.inputs
    if model != DEMO_MODEL and not Path(model).is_dir():
        raise SettingsError(
            f"There is no folder {model}; give a checkpoint folder, {DEMO_MODEL}, or a service with --url."
        )
    if not pairs:
        raise SettingsError("Give files of held-out pairs after the checkpoint folder.")
    scorer = load_checkpoint_scorer(
        Path(model),
        truncation=options.truncation,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.threads,
    )
    return scorer, pairs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reward-audit",
        usage="reward-audit (DIR | --url URL) PAIRS... --out DIR [options]",
        description="Report whether a reward model measures preference or mostly length.",
    )
    add_version_option(parser)
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="DIR PAIRS",
        help=f"checkpoint folder or {DEMO_MODEL} (not with --url), then files of held-out pairs",
    )
    add("--url", help="a running service instead of a checkpoint folder")
    add("--out", type=Path, required=True, help="folder for audit.html, audit.json and pictures/")
    add(
        "--train-pairs",
        nargs="+",
        default=[],
        help="pairs that it was trained on, for the checks of leakage and over-training",
    )
    add(
        "--max-train-pairs",
        type=int,
        default=MAX_TRAIN_PAIRS,
        help="number of training pairs that are scored (default: 1000)",
    )
    add("--hide-texts", action="store_true", help="leave the texts of the completions with the highest rewards out")
    add(
        "--truncation",
        choices=("error", "prompt_left"),
        default="error",
        help="for conversations above the token limit: leave the pair out, or truncate the prompt on the left",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (checkpoint folder only)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="checkpoint folder only")
    add("--threads", type=int, help="CPU threads of the forward pass (default: all; checkpoint folder only)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
